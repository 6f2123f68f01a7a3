"""
sources.py: all texts, wherever they come from, before they become tokens.

    builtin  builtin-world  builtin-code  builtin-docs     made on this machine: documents.py, chats.py
    texts/  a.txt  b.jsonl  c.jsonl.gz  d.json  e.parquet  local files: files.py
    fineweb-edu-dedup ...                                  SmolLM's corpora on the hub: hub.py
    owner/name  owner/name/config                          any data set on the hub with a column "text"

Each source becomes a stream of *records*. A record is (place, make): its place, for error messages, and a
function that returns its text or raises Bad. Nothing is parsed or fetched before make() is called, and so
three things are easy:

    resume after record 1,000          skip 1,000 records and call nothing
    do part 3 of 64                    take every 64th record, or every 64th file if there are that many
    fetch slow texts (python-edu)      call make() in threads for the next records

    for text in Documents("texts/", cfg): ...
"""

import difflib
import hashlib
import json
import os
import platform
import re
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from config import Config, UserError
from corpus.chats import SMALL_TALK, chats, transcripts
from corpus.documents import documents
from corpus.files import READERS, Bad, LeftOut, clean, has_nul, parquet_records, reader_of, text_of
from corpus.hub import HUB, Hub, hub_records, open_hub, prefetch
from corpus.pairs import pairs
from plumbing import disk

MAKERS: dict[str, Callable] = {
    "world": partial(documents, "world"), "transcripts": transcripts, "code": partial(documents, "code"),
    "docs": partial(documents, "docs"), "chats": chats, "lessons": partial(chats, without=SMALL_TALK),
    "pairs": pairs}
BUILTIN: dict[str, tuple] = {f"builtin-{kind}": (kind,) for kind in MAKERS}
BUILTIN["builtin"] = ("world", "transcripts", "code", "docs")  # all that is text
WRITERS = (*(f"corpus/{name}.py" for name in ("documents", "seeds", "chats", "pairs", "held_out")),
           "corpus/*.txt", "corpus/*.json")
READING = ("corpus/files.py", "corpus/sources.py", "corpus/hub.py", "plumbing/shards.py")  # files to tokens
MARKS = re.compile(r"<\|(?:endoftext|im_start|im_end)\|>|<(?:repo_name|reponame|file_sep|filename|gh_stars)>"
                   r"|<(?:issue_(?:start|comment|closed)|jupyter_(?:start|text|code|output|script))>"
                   r"|<empty_output>")  # tokenizer.SPECIAL
STORED = 2**26  # bytes of files whose digests are worth storing
FEW, TAIL = 20, 100  # local sources with fewer records split texts whose tail has at least so many characters


class Documents:
    """The texts of one source, or what item(row) makes of its rows; and an account of what was left out.

    read      records of this machine's part so far, including those without a text
    bad       how many of them were bad
    left_out  Counter of the reasons why records were left out, bad or not
    notes     Counter of what a user may want to know about those that are used
    files     of a stream from the hub: the first record of each file so far

    To resume after the last text, pass state() to a new Documents. With a fraction, the same share of the
    texts is used each time.
    """

    def __init__(self, source: str | Hub, cfg: Config, state: dict | None = None, item: Callable = text_of,
                 fraction: float = 1.0) -> None:
        self.source, self.cfg, self.item, self.fraction = source, cfg, item, fraction
        self.unnoted = {"text", *ignored(cfg)}  # columns of a document that need no note
        state = state or {"read": 0, "bad": 0, "left_out": {}, "notes": {}, "files": []}
        self.read, self.bad, self.files = state["read"], state["bad"], list(state["files"])
        self.left_out, self.notes = Counter(state["left_out"]), Counter(state["notes"])
        self.faults: set[str] = set()  # which of the reasons are those of bad records
        locate(source)  # a misspelled name is reported before any work

    def state(self) -> dict:
        """What a later Documents needs to resume here, for JSON."""
        return {"source": str(self.source), "read": self.read, "bad": self.bad,
                "left_out": dict(self.left_out), "notes": dict(self.notes), "files": list(self.files)}

    def __iter__(self) -> Iterator:
        good = 0
        found = records(self.source, self.cfg, self.read, self.item is text_of, self.files)
        for place, make in self.readable(found):
            self.read += 1
            try:
                row = make()
                if self.item is text_of:
                    text = clean(text_of(row))
                else:
                    row = clean(row)
                    text = self.item(row)
                if isinstance(text, str) and not text.strip():
                    raise Bad("empty document")
                if has_nul(text if self.item is text_of else row):
                    raise Bad("contains NUL characters", "is this a binary file, or UTF-16?")
            except Bad as bad:
                self.count_bad(place, *bad.args)
            except LeftOut as reason:
                self.left_out[str(reason)] += 1
            else:
                good += 1
                if key_of(self.cfg.data_seed, self.source, good - 1) < self.fraction * 2**64:
                    self.take_notes(row, text)
                    yield text
                else:
                    self.left_out[f"beyond the fraction {self.fraction:g} of `data`"] += 1
        self.check_bad("the end")

    def take_notes(self, row: object, text: object) -> None:
        """Count columns of a document that are not read, and names of special tokens in its text."""
        if isinstance(row, dict) and self.item is text_of:
            self.notes.update(f"have a column {name!r}, which is not read"
                              for name in row if name not in self.unnoted)
        said = text if isinstance(text, str) else str(text)
        self.notes.update(f"contain {mark}: letters here, not a special token" for mark in
                          dict.fromkeys(MARKS.findall(said)))

    def readable(self, stream: Iterator) -> Iterator:
        """The records of a stream. A file that cannot be read is the user's to fix."""
        while True:
            try:
                record = next(stream, None)
            except (OSError, UnicodeError) as error:
                raise UserError(f"{self.source} cannot be read: {error}") from None
            if record is None:
                return
            yield record

    def count_bad(self, place: str, reason: str, detail: object = "") -> None:
        """Count a bad record, or stop at it if cfg.on_bad says so."""
        if self.cfg.on_bad == "stop":
            detail = f" ({' '.join(str(detail).split())[:300]})" if detail else ""
            raise UserError(f"{place}: {reason}{detail}; fix it, or skip such records with --on_bad=skip")
        self.bad += 1
        self.left_out[reason] += 1
        self.faults.add(reason)
        if self.read >= 1000:
            self.check_bad(place)

    def check_bad(self, place: str) -> None:
        """Stop if more than a share cfg.max_bad of the records is bad: a few are normal, many mean a wrong
        file. One is always allowed, or a small file could not have any."""
        if self.bad > max(1, self.cfg.max_bad * self.read):
            reasons = ", ".join(f"{n:,} times {reason}" for reason, n in self.left_out.most_common()
                                if reason in self.faults)
            raise UserError(f"{self.source}: {self.bad:,} of {self.read:,} records are bad up to {place}, "
                            f"more than --max_bad={self.cfg.max_bad:g} allows ({reasons}); raise --max_bad, "
                            "or see the first one with --on_bad=stop")

    def split(self, text: Any) -> list[tuple[str, Any]]:
        """[("train" or "val", text)]: what a run with this cfg learns from, and what it keeps to itself.

        A file or two of long texts could not give a tenth of its texts to validation. So a local source with
        fewer than FEW texts gives the last val_fraction of each long one.
        """
        share = self.cfg.val_fraction
        if not isinstance(text, str) or len(text) * share < TAIL or not has_few(self.source):
            return [(split_of(text, share), text)]
        middle = round(len(text) * (1 - share))
        breaks = (text.rfind(mark, middle - middle // 20, middle) + 1 for mark in ("\n", " "))  # close by
        cut = next(filter(None, breaks), middle)
        parts = (("train", text[:cut]), ("val", text[cut:]))
        self.notes[f"gave their last {share:g} to validation, since the source has fewer than {FEW}"] += 1
        return [(split, part) for split, part in parts if part.strip()]


def ignored(cfg: Config) -> frozenset[str]:
    """The columns, or keys of messages, that --ignore names."""
    return frozenset(name.strip() for name in cfg.ignore.split(",") if name.strip())


def account(source: str, read: int, left_out: dict[str, int], notes: dict[str, int], bad: int = 0,
            files: list[int] | None = None) -> str:
    """The closing table of a source: how many records it had, which were left out, and why. Its arguments are
    what Documents.state() returns."""
    rows = [(read, "records read"), *((n, f"left out: {reason}") for reason, n in left_out.items()),
            *((n, note) for note, n in notes.items())]
    lines = [str(source), *(f"  {n:>12,}  {what}" for n, what in rows)]
    found, unread = files_of(source)
    if unread:
        names = ", ".join(path.name for path in unread[:5]) + (", ..." if len(unread) > 5 else "")
        lines.append(f"  {len(unread):>12,}  files not read, since they do not end in {', '.join(READERS)} "
                     f"or are links to nowhere or to folders: {names}")
    sizes = Counter(path.stat().st_size for path in found)
    alike = [path for path in found if sizes[path.stat().st_size] > 1]
    copies = Counter(digest for digest in file_digests(alike).values())
    if twice := copies.total() - len(copies):
        what = "file is a copy of another" if twice == 1 else "files are copies of others"
        lines.append(f"  {twice:>12,}  {what}")
    return "\n".join(lines)


def add_reading_flags(parser: ArgumentParser) -> None:
    """Flags of other commands that read texts, with the meaning that they have in a Config."""
    parser.add_argument("--on_bad", default="stop",
                        help="at a bad record: stop, or skip and count it (default %(default)s)")
    parser.add_argument("--max_bad", type=float, default=Config().max_bad, metavar="SHARE",
                        help="share of bad records that is skipped (default %(default)s); one always is")


def reading(args: Namespace, **more: Any) -> Config:
    """The Config of a reader with these flags."""
    return Config(on_bad=args.on_bad, max_bad=args.max_bad, **more)


# ---------------------------------------------------------------------------------------------------------
# which source a name means


def is_builtin(source: str | Hub) -> bool:
    return source in BUILTIN


def content_of(source: str) -> str:
    """A source whose content has changed, in a message."""
    return source + (" (data_seed, this Python, or the code that writes it)" if is_builtin(source) else "")


def describe(source: str | Hub, cfg: Config) -> dict:
    """What the texts of a source depend on, for JSON: of local files their contents, of built-in texts the
    code and the word lists that make them. When it changes, old token shards are not used."""
    found = locate(source)
    if isinstance(found, Hub):
        return {**asdict(found), "columns": list(found.columns)}
    if is_builtin(source):  # partly the standard library of this Python
        return {"kinds": list(found), "seed": cfg.data_seed, "python": platform.python_version(),
                "made by": code_digest(*WRITERS)}
    root = Path(str(source))
    if root.is_dir() and Path(cfg.out_dir).resolve().is_relative_to(root.resolve()):
        raise UserError(f"out_dir={cfg.out_dir} is inside the source {source}, and would be read as texts: "
                        "choose another --out_dir")
    root = root if root.is_dir() else root.parent
    try:
        digests = file_digests(list(found), Path(cfg.out_dir) / "data" / "digests.json")
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error}") from None
    return {"files": [[path.relative_to(root).as_posix(), digests[path]] for path in found]}


def recipe_of(cfg: Config) -> dict[str, str]:
    """{source: digest of its describe()}. Tokenizers and checkpoints remember it."""
    described = {source: describe(source, cfg) for source in cfg.sources}
    owner: dict[str, str] = {}
    for source in described:
        for name, content in described[source].get("files", []):
            if owner.setdefault(content, source) != source:
                raise UserError(f"data names the same texts twice: {name} of {source} is also in "
                                f"{owner[content]}: delete one of the files, or leave out a source")
    return {source: digest_of(description) for source, description in described.items()}


def digest_of(value: object) -> str:
    """A short name for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def file_digests(files: list[Path], store: Path | None = None) -> dict[Path, str]:
    """{file: digest of its content}. Large files take minutes to read, so their digests are stored, and made
    again if size or times of a file have changed."""
    stored = disk.read_json(store) if store and store.exists() else {}
    found, size = {}, 0
    for path in files:
        stat = path.stat()
        state, known = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns], stored.get(str(path.resolve()))
        if not isinstance(known, list) or known[:3] != state:
            with open(path, "rb") as file:
                known = [*state, hashlib.file_digest(file, "blake2b").hexdigest()[:16]]
            stored[str(path.resolve())], size = known, size + stat.st_size
        found[path] = known[3]
    if store and size > STORED:
        disk.write_json(store, stored)
    return found


@lru_cache(None)
def code_digest(*patterns: str) -> str:
    """The digest of our own files with these names: code_digest("corpus/*.txt", "sft.py")."""
    root, digest = Path(__file__).parents[1], hashlib.blake2b(digest_size=6)
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def changed_code(made_by: object, patterns: tuple[str, ...], folder: Path | str) -> str:
    """A sentence if other versions of our files made what is in a folder, or ""."""
    if made_by == code_digest(*patterns):
        return ""
    return (f"{folder} was made by another version of {', '.join(patterns)}; it is used as it is: delete it "
            "to make it again")


def locate(source: str | Hub) -> Hub | tuple | list:
    """The kinds of a built-in source, the sorted files of a local one, or the Hub of one on the hub."""
    if isinstance(source, Hub):
        return source
    if source in BUILTIN or source in HUB:
        return BUILTIN.get(source) or HUB[source]
    path = Path(source)
    if os.path.exists(path):  # False also for impossible names
        files, _ = files_of(source)
        if not files:
            raise UserError(f"{source!r} has no file to read: they must end in {', '.join(READERS)}")
        return files
    name = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/([\w.-]+))?", source)
    if name and not reader_of(path):
        return Hub(name[1], name[2])
    if re.search(r"[/\\~*]|\.\w+$", source):  # meant as a path
        hint = {"~": ": only a shell knows what ~ is", "*": ": name the folder to read all of its files"}
        raise UserError(f"there is no file or folder {source!r}"
                        + next((hint[mark] for mark in hint if mark in source), ""))
    near = difflib.get_close_matches(source, [*BUILTIN, *HUB], n=1, cutoff=0)[0]
    raise UserError(f"there is no source {source!r}, and no file or folder of that name: did you mean "
                    f"{near!r}?")


def files_of(source: str | Hub) -> tuple[list[Path], list[Path]]:
    """(files that are read, files that are not) of a local source, sorted the same way on all systems.

    Names that begin with a dot, of files or folders, belong to the system or to tools and are passed over.
    """
    path = Path(source) if isinstance(source, str) and os.path.exists(source) else None
    if path is None or source in BUILTIN:
        return [], []
    found = [(file.relative_to(path), file) for file in path.rglob("*")] if path.is_dir() else [(path, path)]
    shown = sorted((name.as_posix(), file) for name, file in found if (file.is_file() or file.is_symlink())
                   and (file == path or not any(part.startswith(".") for part in name.parts)))
    is_read = {file: file.is_file() and reader_of(file) is not None for _, file in shown}
    return [file for file in is_read if is_read[file]], [file for file in is_read if not is_read[file]]


@lru_cache(None)
def has_few(source: str | Hub) -> bool:
    """Whether a local source has fewer than FEW records."""
    files = files_of(source)[0] if isinstance(source, str) and source not in HUB else []
    stream = chain.from_iterable(reader_of(path)(path) for path in files)
    return bool(files) and sum(1 for _ in islice(stream, FEW)) < FEW


def records(source: str | Hub, cfg: Config, read: int, as_text: bool,
            files: list[int]) -> Iterator[tuple[str, Callable]]:
    """This machine's part of the records of a source, without its first `read` ones; files: see Documents."""
    part, n_parts = map(int, cfg.part.split("/"))
    found = locate(source)
    first, step = part - 1 + read * n_parts, n_parts  # records are dealt like cards,
    if isinstance(found, Hub):
        stream = open_hub(found, as_text)
        if stream.num_shards >= n_parts:  # or files are, if there are enough
            stream, first, step = stream.shard(n_parts, part - 1), read, 1
        stream = hub_records(found, stream, first, step, as_text, files)
        return prefetch(stream) if found.software_heritage else stream
    if is_builtin(source):
        made = enumerate(chain.from_iterable(MAKERS[kind](cfg.data_seed) for kind in found), 1)
        stream = ((f"{source} document {number}", partial(identity, row)) for number, row in made)
    else:
        if len(found) >= n_parts:
            found, first, step = found[part - 1::n_parts], read, 1
        stream = chain.from_iterable(local_records(path, as_text) for path in found)
    return islice(stream, first, None, step)


def local_records(path: Path, as_text: bool) -> Iterator[tuple[str, Callable]]:
    read = reader_of(path)
    return read(path, ("text",)) if as_text and read is parquet_records else read(path)


def identity(row: object) -> object:
    return row


def split_of(item: str | list, val_fraction: float) -> str:
    """"val" for a fixed random share of all texts, "train" for the others.

    The bytes of a text decide, so a text is in the same split in every stage. For a list of messages (a chat
    or a prompt) its JSON decides.
    """
    data = (item if isinstance(item, str) else json.dumps(item)).encode(errors="replace")
    number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
    return "val" if number < val_fraction * 2**64 else "train"


def key_of(*parts: object) -> int:
    """One 64-bit key from numbers and names."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())

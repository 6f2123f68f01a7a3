"""
sources.py: all texts, wherever they come from, before they become tokens.

    builtin  builtin-world  builtin-code  builtin-docs     made on this machine: documents.py, chats.py
    texts/  a.txt  b.jsonl  c.jsonl.gz  d.parquet          local files: files.py
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
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path

from config import Config, UserError
from corpus.chats import SMALL_TALK, chats, transcripts
from corpus.documents import documents
from corpus.files import READERS, Bad, clean, reader_of, text_of
from corpus.hub import HUB, Hub, hub_records, open_hub, prefetch
from corpus.pairs import pairs

MAKERS: dict[str, Callable] = {
    "world": partial(documents, "world"), "transcripts": transcripts, "code": partial(documents, "code"),
    "docs": partial(documents, "docs"), "chats": chats, "lessons": partial(chats, without=SMALL_TALK),
    "pairs": pairs}
BUILTIN: dict[str, tuple] = {f"builtin-{kind}": (kind,) for kind in MAKERS}
BUILTIN["builtin"] = ("world", "transcripts", "code", "docs")  # all that is text


class Documents:
    """The texts of one source, or what item(row) makes of its rows.

    To resume after the last text, store `read` and `bad` and pass them to a new Documents.

    read     records of this machine's part so far, including those without a text
    bad      Counter of bad records by reason
    missing  blobs of python-edu that Software Heritage did not have
    """

    def __init__(self, source: str | Hub, cfg: Config, read: int = 0, bad: dict[str, int] | None = None,
                 item: Callable = text_of) -> None:
        self.source, self.cfg, self.item = source, cfg, item
        self.read, self.bad, self.missing = read, Counter(bad or {}), 0
        locate(source)  # a misspelled name is reported before any work

    def __iter__(self) -> Iterator:
        for place, make in self.readable(records(self.source, self.cfg, self.read, self.item)):
            self.read += 1
            try:
                text = make()
                if isinstance(text, str):
                    text = clean(text)
                    if not text.strip():
                        raise Bad("empty document")
            except Bad as bad:
                self.count_bad(place, *bad.args)
            except UnicodeDecodeError as error:
                self.count_bad(place, "invalid UTF-8", error)
            else:
                if text is None:
                    self.missing += 1
                else:
                    yield text
        self.check_bad("the end")

    def readable(self, stream: Iterator) -> Iterator:
        """The records of a stream. A file that cannot be read is the user's to fix."""
        while True:
            try:
                record = next(stream, None)
            except OSError as error:
                raise UserError(f"{self.source} cannot be read: {error}") from None
            if record is None:
                return
            yield record

    def count_bad(self, place: str, reason: str, detail: object = "") -> None:
        """Count a bad record, or stop at it if cfg.on_bad says so."""
        if self.cfg.on_bad == "stop":
            detail = f" ({' '.join(str(detail).split())[:200]})" if detail else ""
            raise UserError(f"{place}: {reason}{detail}; fix it, or skip such records with --on_bad=skip")
        self.bad[reason] += 1
        if self.read >= 1000:
            self.check_bad(place)

    def check_bad(self, place: str) -> None:
        """Stop if over one record in a hundred is bad: a few are normal, many mean a wrong file."""
        if self.bad.total() * 100 > self.read:
            reasons = ", ".join(f"{count:,} times {reason}" for reason, count in self.bad.most_common())
            raise UserError(f"{self.source}: {self.bad.total():,} of {self.read:,} records are bad up to "
                            f"{place}, more than 1% ({reasons}); --on_bad=stop names the first one")


# ---------------------------------------------------------------------------------------------------------
# which source a name means


def is_builtin(source: str | Hub) -> bool:
    return source in BUILTIN


def describe(source: str, cfg: Config) -> dict:
    """What the tokens of a source depend on, for JSON. When it changes, old token shards are not used."""
    found = locate(source)
    if isinstance(found, Hub):
        return {**asdict(found), "columns": list(found.columns)}
    if is_builtin(source):  # partly the standard library of this Python
        return {"kinds": list(found), "seed": cfg.data_seed, "python": platform.python_version()}
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    stats = [(path.relative_to(root).as_posix(), path.stat()) for path in found]
    return {"files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]}


def locate(source: str | Hub) -> Hub | tuple | list:
    """The kinds of a built-in source, the sorted files of a local one, or the Hub of one on the hub."""
    if isinstance(source, Hub):
        return source
    if source in BUILTIN or source in HUB:
        return BUILTIN.get(source) or HUB[source]
    path = Path(source)
    if path.exists():
        files = [file for file in path.rglob("*") if file.name[0] != "."] if path.is_dir() else [path]
        files = [file for file in files if reader_of(file) and file.is_file()]
        if not files:
            raise UserError(f"{source!r} has no file to read: they must end in {', '.join(READERS)}")
        return sorted(files, key=lambda file: file.relative_to(path).as_posix())  # the same on all systems
    name = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/([\w.-]+))?", source)
    if name and not reader_of(path):
        return Hub(name[1], name[2])
    near = difflib.get_close_matches(source, [*BUILTIN, *HUB], n=1, cutoff=0)[0]
    raise UserError(f"there is no source {source!r}, and no file or folder of that name: did you mean "
                    f"{near!r}?")


def records(source: str | Hub, cfg: Config, read: int, item: Callable) -> Iterator[tuple[str, Callable]]:
    """This machine's part of the records of a source, without its first `read` ones."""
    part, n_parts = map(int, cfg.part.split("/"))
    found = locate(source)
    first, step = part - 1 + read * n_parts, n_parts  # records are dealt like cards,
    if isinstance(found, Hub):
        stream = open_hub(found)
        if stream.num_shards >= n_parts:  # or files are, if there are enough
            stream, first, step = stream.shard(n_parts, part - 1), read, 1
        stream = hub_records(found, stream, first, step, item)
        return prefetch(stream) if found.software_heritage else stream
    if is_builtin(source):
        made = enumerate(chain.from_iterable(MAKERS[kind](cfg.data_seed) for kind in found), 1)
        stream = ((f"{source} document {number}", partial(item, row)) for number, row in made)
    else:
        if len(found) >= n_parts:
            found, first, step = found[part - 1::n_parts], read, 1
        stream = chain.from_iterable(reader_of(path)(path, item) for path in found)
    return islice(stream, first, None, step)


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

"""
sources.py: every text that goes in, wherever it comes from, before it is tokens.

    builtin  builtin-world  builtin-code  builtin-docs     made on this machine, see documents.py
    texts/  a.txt  b.jsonl  c.jsonl.gz  d.parquet          local: a .txt is one document, the others have a field "text"
    fineweb-edu-dedup ... (HUB below)                      SmolLM's corpora on the Hugging Face hub, streamed
    owner/name  owner/name/config                          any data set of the hub that has a column "text"

All become one stream of *records*. A record is (place, make): where it stands, for error messages, and a function
that returns its text or raises Bad. Nothing is parsed or fetched before make() is called, which makes three things easy:

    continue behind record 1,000       let 1,000 records pass and call nothing
    do the third of 64 parts           take every 64th record, or every 64th file where there are that many
    fetch slow texts (python-edu)      call make() in threads, some records ahead

    for text in Documents("texts/", cfg): ...                                                       next: curate.py
"""

import ast
import difflib
import gzip
import http.client
import json
import platform
import re
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from urllib import error as url_error
from urllib import parse, request

from config import UserError
from corpus.documents import KINDS, documents

# `datasets` and `pyarrow` are imported where they are used: they take 2 seconds, and many runs need neither.

LIMIT = 16 * 2**20  # bytes of a line or a .txt file: what is longer is more often a broken file than a document
BUILTIN = {"builtin": KINDS, **{f"builtin-{kind}": (kind,) for kind in KINDS}}
WAY_ON = "run python data.py <the config> again with a network (it goes on where it stopped), or use --data=builtin"


@dataclass(frozen=True)
class Hub:
    """Where a data set lies on the hub (or a folder laid out like one), and which columns make a text."""

    path: str
    config: str | None = None
    columns: tuple = ("text",)  # joined by a line break
    split: str = "train"
    data_dir: str | None = None
    data_files: str | None = None
    revision: str | None = None
    printed_bytes: bool = False  # values look like "b'Solve 2*x = 4.\\n'"
    software_heritage: str | None = None  # the column holds ids; their texts lie below this address


# deepmind/math_dataset is a Python script, and `datasets` runs none since version 4. The hub keeps such data sets as
# Parquet, too, in a branch of its own: <module>/train/0000.parquet. The script had stored the printed form of bytes.
HUB = {
    "fineweb-edu-dedup": Hub("HuggingFaceTB/smollm-corpus", "fineweb-edu-dedup"),
    "cosmopedia-v2": Hub("HuggingFaceTB/smollm-corpus", "cosmopedia-v2"),
    "python-edu": Hub("HuggingFaceTB/smollm-corpus", "python-edu", columns=("blob_id",),
                      software_heritage="https://softwareheritage.s3.amazonaws.com/content/"),
    "open-web-math": Hub("open-web-math/open-web-math"),
    "stackoverflow": Hub("bigcode/stackoverflow-clean", columns=("content",)),  # inferred: SmolLM names no path
    "starcoderdata-python": Hub("bigcode/starcoderdata", columns=("content",), data_dir="python"),
    "deepmind_mathematics": Hub("deepmind/math_dataset", columns=("question", "answer"), printed_bytes=True,
                                data_files="*/*train/*.parquet", revision="refs/convert/parquet"),
}


class Bad(Exception):
    """A record without a usable text: Bad(reason, detail). Reasons are counted, details are for the reader."""


class Documents:
    """The texts of one source. Store `read` and `bad`, and pass them back to continue behind the last text.

    read     records of this machine's part so far, also those without a text
    bad      Counter of bad records by reason
    missing  blobs of python-edu that Software Heritage did not have
    """

    def __init__(self, source, cfg, read=0, bad=None):
        self.source, self.cfg, self.read, self.bad, self.missing = source, cfg, read, Counter(bad or {}), 0
        locate(source)  # a misspelt name is said before any work

    def __iter__(self):
        for place, make in records(self.source, self.cfg, self.read):
            self.read += 1
            try:
                text = make()
                if text is not None and not text.strip():
                    raise Bad("empty document")
            except Bad as bad:
                self.note(place, *bad.args)
            except UnicodeDecodeError as error:
                self.note(place, "invalid UTF-8", error)
            else:
                if text is not None:
                    yield text
                self.missing += text is None
        self.check("the end")

    def note(self, place, reason, detail=""):
        """A bad record ends the reading, or is counted."""
        if self.cfg.on_bad == "stop":
            detail = f" ({' '.join(str(detail).split())[:200]})" if detail else ""
            raise UserError(f"{place}: {reason}{detail}; mend it, or leave such records out with --on_bad=skip")
        self.bad[reason] += 1
        if self.read >= 1000:
            self.check(place)

    def check(self, place):
        """A few broken records are life; more than one in a hundred is a wrong file, and reading stops."""
        if self.bad.total() * 100 > self.read:
            reasons = ", ".join(f"{count:,} times {reason}" for reason, count in self.bad.most_common())
            raise UserError(f"{self.source}: {self.bad.total():,} of {self.read:,} records are bad up to {place}, more "
                            f"than 1% ({reasons}); mend the source: --on_bad=stop names the first bad record")


# --- which source a name means -----------------------------------------------------------------------------------


def is_builtin(source):
    return source in BUILTIN


def describe(source, cfg):
    """What the tokens of a source depend on, for JSON. When it changes, old token shards are not used."""
    found = locate(source)
    if isinstance(found, Hub):
        return {**asdict(found), "columns": list(found.columns)}
    if is_builtin(source):  # partly the standard library of this Python
        return {"kinds": list(found), "seed": cfg.data_seed, "python": platform.python_version()}
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    stats = [(path.relative_to(root).as_posix(), path.stat()) for path in found]
    return {"files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]}


def locate(source):
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
            raise UserError(f"{source!r} holds nothing to read: files must end in {', '.join(READERS)}")
        return sorted(files, key=lambda file: file.relative_to(path).as_posix())  # one order on every system
    name = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/([\w.-]+))?", source)
    if name and not reader_of(path):
        return Hub(name[1], name[2])
    near = difflib.get_close_matches(source, [*BUILTIN, *HUB], n=1, cutoff=0)[0]
    raise UserError(f"there is no source {source!r}, nor a file or folder of that name: did you mean {near!r}?")


def records(source, cfg, read):
    """This machine's part of the records of a source, from behind its first `read` ones."""
    part, n_parts = map(int, cfg.shard.split("/"))
    found = locate(source)
    first, step = part - 1 + read * n_parts, n_parts  # records are dealt out like cards,
    if isinstance(found, Hub):
        stream = open_hub(found)
        if stream.num_shards >= n_parts:  # or whole files are, where there are enough
            stream, first, step = stream.shard(n_parts, part - 1), read, 1
        stream = hub_records(found, stream, first, step)
        return look_ahead(stream) if found.software_heritage else stream
    if is_builtin(source):
        texts = enumerate(chain.from_iterable(documents(kind, cfg.data_seed) for kind in found), 1)
        stream = ((f"{source} document {number}", partial(str, text)) for number, text in texts)
    else:
        if len(found) >= n_parts:
            found, first, step = found[part - 1::n_parts], read, 1
        stream = chain.from_iterable(reader_of(path)(path) for path in found)
    return islice(stream, first, None, step)


# --- local files ---------------------------------------------------------------------------------------------------


def text_of(row, columns=("text",)):
    """The text of a row: {"question": "1 + 1", "answer": "2"} -> "1 + 1\\n2"."""
    for column in columns:
        if column not in row:
            raise Bad(f"no field {column!r}", f"there are {list(row)}")
        if not isinstance(row[column], str):
            raise Bad(f"field {column!r} is not text", type(row[column]).__name__)
    return "\n".join(row[column] for column in columns)


def fail(*reason):
    raise Bad(*reason)


def txt_text(path):
    if path.stat().st_size > LIMIT:
        raise Bad(f"longer than {LIMIT >> 20} MB", "a .txt is one document: split it")
    return path.read_bytes().decode("utf-8-sig")  # -sig: without the invisible mark of some editors


def txt_records(path):
    yield str(path), partial(txt_text, path)


def json_text(line):
    text = line.decode("utf-8-sig")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Bad("malformed JSON", error) from None
    return text_of(row) if isinstance(row, dict) else fail("not a JSON object", type(row).__name__)


def jsonl_records(path):
    """A line is a record, unless it is blank. Of a gzip that was cut off, the lines before the cut are used."""
    number = 0
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            while line := file.readline(LIMIT + 1):
                number += 1
                make = partial(json_text, line)
                if len(line) > LIMIT:
                    make = partial(fail, f"longer than {LIMIT >> 20} MB")
                    while line and not line.endswith(b"\n"):  # let its rest pass, keeping nothing
                        line = file.readline(2**16)
                if make.func is fail or not line.isspace():
                    yield f"{path} line {number}", make
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield f"{path} line {number + 1}", partial(fail, "truncated or corrupt gzip", error)


def parquet_records(path):
    """A row is a record. What can be decoded before a corrupt place is used; the rest is one bad record."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                yield f"{path} record 1", partial(fail, "no field 'text'", f"there are {file.schema_arrow.names}")
                return
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for value in batch["text"]:
                    number += 1
                    yield f"{path} record {number}", lambda value=value: text_of({"text": value.as_py()})
    except (pyarrow.ArrowException, OSError) as error:
        yield f"{path} record {number + 1}", partial(fail, "truncated or corrupt parquet", error)


READERS = {".txt": txt_records, ".jsonl": jsonl_records, ".jsonl.gz": jsonl_records, ".parquet": parquet_records}


def reader_of(path):
    return next((read for ending, read in READERS.items() if path.name.lower().endswith(ending)), None)


# --- the hub, and Software Heritage --------------------------------------------------------------------------------


def ask_hub(path):
    """What the hub knows about a data set, or the reason why not, within 10 seconds. `datasets` would try for longer."""
    from huggingface_hub import HfApi

    answer = [TimeoutError("no answer within 10 seconds")]

    def ask():
        try:
            answer[0] = HfApi().dataset_info(path, timeout=5)
        except Exception as error:
            answer[0] = error

    thread = threading.Thread(target=ask, daemon=True)  # waiting for a silent name server knows no time limit
    thread.start()
    thread.join(10)
    return answer[0]


def open_hub(hub):
    """The `datasets` stream of the columns that make the text."""
    from datasets import load_dataset
    from huggingface_hub.errors import RepositoryNotFoundError

    known = None if Path(hub.path).is_dir() else ask_hub(hub.path)
    if isinstance(known, RepositoryNotFoundError):
        raise UserError(f"neither this machine nor the hub has {hub.path!r}, or it is private: then try hf auth login")
    if isinstance(known, Exception):
        raise UserError(f"the hub cannot be reached for {hub.path!r} ({known}): {WAY_ON}")
    try:
        stream = load_dataset(hub.path, hub.config, data_dir=hub.data_dir, data_files=hub.data_files, split=hub.split,
                              revision=hub.revision, streaming=True)
    except Exception as error:
        if getattr(known, "gated", False):
            raise UserError(f"{hub.path!r} is open to registered readers: accept its terms on "
                            f"https://huggingface.co/datasets/{hub.path}, then run hf auth login") from None
        raise UserError(f"{hub.path!r} cannot be opened: {' '.join(str(error).split())[:300]}") from None
    if stream.column_names is None:  # known only row by row
        return stream
    if set(hub.columns) - set(stream.column_names):
        raise UserError(f"{hub.path!r} has no column {hub.columns}, only {stream.column_names}")
    return stream.select_columns(list(hub.columns))


def hub_records(hub, stream, first, step):
    make = partial(blob_text, hub) if hub.software_heritage else partial(hub_text, hub)
    try:
        for number, row in enumerate(stream.skip(first), first):
            if (number - first) % step == 0:
                yield f"{hub.path} record {number + 1}", partial(make, row)
    except Exception as error:
        raise UserError(f"reading {hub.path!r} broke off ({' '.join(str(error).split())[:200]}): {WAY_ON}") from None


def hub_text(hub, row):
    if hub.printed_bytes:
        row = {name: ast.literal_eval(value).decode().strip() for name, value in row.items()}
    return text_of(row, hub.columns)


def blob_text(hub, row):
    url = hub.software_heritage + parse.quote(text_of(row, hub.columns))
    return fetch(url)


def fetch(url, tries=7, pause=0.5):
    """The text of one blob, None if there is none. Waits 0.5 s, 1 s, 2 s ... when the server is not well."""
    for attempt in range(tries):
        try:
            with request.urlopen(url, timeout=20) as response:
                data = response.read()
            break
        except url_error.HTTPError as error:
            if error.code in (403, 404):  # the bucket answers 403, too, for what it does not have
                return None
            reason = error
        except (OSError, http.client.HTTPException) as error:
            reason = error
        if attempt == tries - 1:
            raise UserError(f"{url} does not answer ({reason}): {WAY_ON}")
        time.sleep(pause * 2**attempt)
    try:
        return gzip.decompress(data).decode("utf-8", errors="ignore")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Bad("truncated or corrupt gzip", error) from None


def look_ahead(stream, threads=32, ahead=128):
    """The same records in the same order, their make() already running in threads; at most `ahead` texts wait."""
    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for place, make in stream:
            waiting.append((place, pool.submit(make).result))
            if len(waiting) == ahead:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

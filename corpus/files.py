"""
files.py: records in local files. A record is (place, make): make() returns its text, or raises Bad.

    .txt                         a file is one document
    .jsonl  .jsonl.gz  .parquet  a line or row is one record; item(row) turns it into a text or a chat

Files are read one record at a time, so they may be larger than the memory.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

LIMIT = 16 * 2**20  # bytes of a line or a .txt file; anything longer is likely a broken file


class Bad(Exception):
    """A record without a usable text: Bad(reason, detail). Reasons are counted, details are printed."""


def clean(text: str) -> str:
    """Text that UTF-8 can encode: a lone half of a surrogate pair becomes U+FFFD, as decoders make it."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_of(row: dict | str, columns: tuple[str, ...] = ("text",)) -> str:
    """The text of a row: {"question": "1 + 1", "answer": "2"} -> "1 + 1\\n2". A text stays as it is."""
    if isinstance(row, str):
        return row
    for column in columns:
        if column not in row:
            raise Bad(f"no field {column!r}", f"the fields are {list(row)}")
        if not isinstance(row[column], str):
            raise Bad(f"field {column!r} is not text", type(row[column]).__name__)
    return "\n".join(row[column] for column in columns)


def fail(*reason: object) -> NoReturn:
    raise Bad(*reason)


def txt_text(path: Path) -> str:
    if path.stat().st_size > LIMIT:
        raise Bad(f"longer than {LIMIT >> 20} MB", "a .txt file is one document: split it")
    return path.read_bytes().decode("utf-8-sig")  # -sig: without the byte-order mark of some editors


def txt_records(path: Path, item: Callable = text_of) -> Iterator[tuple[str, Callable]]:
    yield str(path), lambda: item({"text": txt_text(path)})


def json_item(line: bytes, item: Callable) -> object:
    text = line.decode("utf-8-sig")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Bad("malformed JSON", error) from None
    return item(row) if isinstance(row, dict) else fail("not a JSON object", type(row).__name__)


def jsonl_records(path: Path, item: Callable = text_of) -> Iterator[tuple[str, Callable]]:
    """Each line that is not blank is a record. A gzip file that was cut off is used up to the cut."""
    number = 0
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            while line := file.readline(LIMIT + 1):
                number += 1
                if len(line) > LIMIT:
                    while line and not line.endswith(b"\n"):  # skip the rest of the line
                        line = file.readline(2**16)
                    yield f"{path} line {number}", partial(fail, f"longer than {LIMIT >> 20} MB")
                elif not line.isspace():
                    yield f"{path} line {number}", partial(json_item, line, item)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield f"{path} line {number + 1}", partial(fail, "truncated or corrupt gzip", error)


def parquet_records(path: Path, item: Callable = text_of) -> Iterator[tuple[str, Callable]]:
    """Each row is a record. A corrupt file is used up to the corrupt place; the rest is one bad record."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if item is text_of and "text" not in names:
                yield f"{path} record 1", partial(fail, "no field 'text'", f"the fields are {names}")
                return
            for batch in file.iter_batches(batch_size=256, columns=["text"] if item is text_of else None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} record {number}", partial(item, row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield f"{path} record {number + 1}", partial(fail, "truncated or corrupt parquet", error)


READERS = {".txt": txt_records, ".jsonl": jsonl_records, ".jsonl.gz": jsonl_records,
           ".parquet": parquet_records}


def reader_of(path: Path) -> Callable | None:
    """The function that yields the records of a file, chosen by its name. None: no such file is read."""
    return next((read for ending, read in READERS.items() if path.name.lower().endswith(ending)), None)

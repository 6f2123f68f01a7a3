"""
files.py: records in local files. A record is (place, make): make() returns its text or raises Bad.

    .txt                        the whole file is one document
    .jsonl  .jsonl.gz  .parquet  a line or row is one; item(row) makes of it what is wanted, a text or a chat

Nothing is read into memory whole but one record at a time.                              next: sources.py
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

LIMIT = 16 * 2**20  # bytes of a line or a .txt file: what is longer is rather a broken file than a document


class Bad(Exception):
    """A record without a usable text: Bad(reason, detail). Reasons are counted, details are told."""


def clean(text: str) -> str:
    """Text that UTF-8 can encode: a lone half of a surrogate pair becomes U+FFFD, as decoders make it."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_of(row: dict | str, columns: tuple[str, ...] = ("text",)) -> str:
    """The text of a row: {"question": "1 + 1", "answer": "2"} -> "1 + 1\\n2". A text is its own."""
    if isinstance(row, str):
        return row
    for column in columns:
        if column not in row:
            raise Bad(f"no field {column!r}", f"there are {list(row)}")
        if not isinstance(row[column], str):
            raise Bad(f"field {column!r} is not text", type(row[column]).__name__)
    return "\n".join(row[column] for column in columns)


def fail(*reason: object) -> NoReturn:
    raise Bad(*reason)


def txt_text(path: Path) -> str:
    if path.stat().st_size > LIMIT:
        raise Bad(f"longer than {LIMIT >> 20} MB", "a .txt is one document: split it")
    return path.read_bytes().decode("utf-8-sig")  # -sig: without the invisible mark of some editors


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
    """A line is a record, unless it is blank. Of a gzip that was cut off, what comes before is used."""
    number = 0
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            while line := file.readline(LIMIT + 1):
                number += 1
                make: partial = partial(json_item, line, item)
                if len(line) > LIMIT:
                    make = partial(fail, f"longer than {LIMIT >> 20} MB")
                    while line and not line.endswith(b"\n"):  # let its rest pass, keeping nothing
                        line = file.readline(2**16)
                if make.func is fail or not line.isspace():
                    yield f"{path} line {number}", make
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield f"{path} line {number + 1}", partial(fail, "truncated or corrupt gzip", error)


def parquet_records(path: Path, item: Callable = text_of) -> Iterator[tuple[str, Callable]]:
    """A row is a record. What can be decoded before a corrupt place is used; the rest is one bad record."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if item is text_of and "text" not in names:
                yield f"{path} record 1", partial(fail, "no field 'text'", f"there are {names}")
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
    return next((read for ending, read in READERS.items() if path.name.lower().endswith(ending)), None)

"""
files.py: records in local files. A record is (place, make): make() returns a row, or raises Bad.

    .txt                                a file is one document; lines of only <|endoftext|> separate several
    .jsonl  .jsonl.gz  .json  .parquet  a line, array item or row is one row: {"text": ...}, or a chat

Whatever the file, clean() then makes the same text of it. A text must not depend on the editor that saved it:
a byte-order mark or the line ends of Windows would be tokens that the model never saw.

Files are read one record at a time, except .json, so they may be larger than the memory.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

LIMIT = 16 * 2**20  # characters of a line, and of a document in a .txt file; more is likely a broken file
END = "<|endoftext|>"
LINE_ENDS = re.compile("\r\n|[\r\x85\u2028\u2029]")


class Bad(Exception):
    """A record without a usable text: Bad(reason, detail). Reasons are counted, details are printed."""


class LeftOut(Exception):
    """A good record that is not used, and why: LeftOut(reason). It is counted, and stops nothing."""


def clean(value: Any) -> Any:
    """A text as all our code expects it: "\\n" ends lines, no byte-order mark, encodable as UTF-8.

    "a\\r\\nb" -> "a\\nb". Half of a surrogate pair becomes U+FFFD, as decoders make it. In a row, all
    texts are cleaned. All that is from outside comes through here: files, the hub, prompts, questions.
    """
    if isinstance(value, str):
        if any(end in value for end in "\r\x85\u2028\u2029\ufeff"):  # most texts have none
            value = LINE_ENDS.sub("\n", value.removeprefix("\ufeff"))
            value = value.replace("\n\ufeff", "\n")  # of a file that was appended to another
        return encodable(value)
    if isinstance(value, dict):
        return {clean(key): clean(part) for key, part in value.items()}
    return [clean(part) for part in value] if isinstance(value, list | tuple) else value


def has_nul(value: Any) -> bool:
    """Whether a text, or a text of a row, has a NUL character: binary files and UTF-16 have many."""
    if isinstance(value, dict | list):
        return any(map(has_nul, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and "\0" in value


def encodable(text: str) -> str:
    """The text with U+FFFD for each lone half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_of(row: object, columns: tuple[str, ...] = ("text",)) -> str:
    """The text of a row: {"question": "1 + 1", "answer": "2"} -> "1 + 1\\n2". A text stays as it is."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise Bad("not a JSON object", f"{str(row)[:80]} is a {type(row).__name__}")
    for column in columns:
        if column not in row:
            raise Bad(f"no field {column!r}", f"the fields are {list(row)}")
        if not isinstance(row[column], str):
            said = json.dumps(row[column], ensure_ascii=False, default=str)[:80]
            raise Bad(f"field {column!r} is not text", f"{column} is {said}")
    return "\n".join(row[column] for column in columns)


# ---------------------------------------------------------------------------------------------------------
# the formats


def fail(*reason: object) -> NoReturn:
    raise Bad(*reason)


def open_text(path: Path) -> IO[str]:
    """Open a text file for reading its lines.

    Bytes that are not UTF-8 become lone surrogates, which decoded() then reports for their record alone.
    """
    opener: Callable = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        encoding = encoding_of(file.read(2))
    return opener(path, "rt", encoding=encoding, errors="surrogateescape" if "8" in encoding else "strict")


def encoding_of(data: bytes) -> str:
    """UTF-8 or, if its first bytes say so, UTF-16, which some editors on Windows write."""
    return "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def decoded(text: str) -> str:
    """The text itself, or Bad if open_text met bytes that are not UTF-8 in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        raise Bad("invalid UTF-8", f"the byte 0x{byte:02x} at character {error.start}") from None
    return text


def documents_in(file: IO[str]) -> Iterator[str | None]:
    """The texts between the lines of only <|endoftext|>; None for one that is longer than LIMIT."""
    lines: list[str] = []
    size, separated = 0, False

    def text() -> str | None:
        whole = "".join(lines)
        return None if size > LIMIT else whole.strip("\n") if separated else whole

    while line := file.readline(LIMIT + 1):
        if line.strip("\ufeff \t\r\n") == END:
            separated = True
            yield text()
            lines, size = [], 0
        else:
            size += len(line)
            if size <= LIMIT:
                lines.append(line)
    yield text()


def txt_records(path: Path) -> Iterator[tuple[str, Callable]]:
    """A file is one document, or several with lines of only <|endoftext|> between them, as TinyStories has.

    Where there is nothing between two such lines, there is no document. A file without any is reported.
    """
    number = 0
    with open_text(path) as file:
        for text in documents_in(file):
            if text is None or text.strip():
                number += 1
                make = partial(decoded, text) if text else partial(
                    fail, f"longer than {LIMIT >> 20} MB", f"put lines of only {END} between its documents")
                yield f"{path} document {number}" if number > 1 else str(path), make
    if not number:
        yield str(path), str


def unique(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON as a dict. Of a key that occurs twice a dict would keep the last value alone."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key in row if sum(key == other for other, _ in pairs) > 1)
        raise Bad("a key occurs twice", twice)
    return row


def parsed(text: str) -> object:
    try:
        row = json.loads(decoded(text).removeprefix("\ufeff"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Bad("malformed JSON", error) from None
    return checked(row)


def jsonl_records(path: Path) -> Iterator[tuple[str, Callable]]:
    """Each line that is not blank is a record. A gzip file that was cut off is used up to the cut."""
    number = 0
    try:
        with open_text(path) as file:
            while line := file.readline(LIMIT + 1):
                number += 1
                if len(line) > LIMIT:
                    while line and not line.endswith("\n"):  # skip the rest of the line
                        line = file.readline(2**16)
                    yield f"{path} line {number}", partial(fail, f"longer than {LIMIT >> 20} MB")
                elif not line.isspace():
                    yield f"{path} line {number}", partial(parsed, line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield f"{path} line {number + 1}", partial(fail, f"truncated or corrupt gzip: {path.name}", error)


def json_records(path: Path) -> Iterator[tuple[str, Callable]]:
    """Each item of an array is a record. A single object is one record; without an array around them, lines
    are records: many .json files hold JSON lines."""
    with open_text(path) as file:
        text = file.read()
    try:
        value = json.loads(decoded(text), object_pairs_hook=unique)
    except Bad as bad:
        yield str(path), partial(fail, *bad.args)
        return
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] == "{" and "\n" in text.strip():
            yield from jsonl_records(path)
        else:
            yield str(path), partial(fail, f"malformed JSON: {path.name}", error)
        return
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield f"{path} record {number}", partial(checked, row)


def checked(row: object) -> object:
    return row if isinstance(row, dict | list) else fail("not a JSON object", type(row).__name__)


def parquet_records(path: Path, columns: tuple[str, ...] = ()) -> Iterator[tuple[str, Callable]]:
    """Each row is a record. With columns, the others are not read from the disk, and their values are None.

    A corrupt file is used up to the corrupt place; the rest is one bad record.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name in columns or not columns]
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} record {number}", partial(dict, {**dict.fromkeys(names), **row})
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = f"truncated or corrupt parquet: {path.name}"
        yield f"{path} record {number + 1}", partial(fail, reason, error)


READERS: dict[str, Callable] = {".txt": txt_records, ".jsonl": jsonl_records, ".jsonl.gz": jsonl_records,
                                ".json": json_records, ".parquet": parquet_records}


def reader_of(path: Path) -> Callable | None:
    """The function that yields the records of a file, chosen by its name. None: no such file is read."""
    return next((read for ending, read in READERS.items() if path.name.lower().endswith(ending)), None)

"""
hub.py: records of data sets on the Hugging Face hub, streamed, and of Software Heritage.

python-edu contains only the ids of files. Their texts come from Software Heritage's public bucket, which many
threads ask at the same time, since each answer takes a while.
"""

import ast
import gzip
import http.client
import threading
import time
import typing
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib import error as url_error
from urllib import parse, request

from config import UserError
from corpus.files import Bad, LeftOut, text_of

if typing.TYPE_CHECKING:
    from datasets import IterableDataset

# `datasets` is imported where it is used: importing it takes 2 seconds, and many runs do not need it.

WAY_OUT = ("run python data.py <the config> again when there is a network (it resumes where it stopped), "
           "or use --data=builtin")
THREADS, PREFETCH = 32, 128  # where texts are fetched one by one: requests at a time, and texts that may wait
TRIES, PAUSE = 7, 0.5  # for each of them, and seconds before the second try; the pause doubles each time


@dataclass(frozen=True)
class Hub:
    """Where a data set is on the hub (or a folder with the same layout), and which columns make a text."""

    path: str
    config: str | None = None
    columns: tuple = ("text",)  # joined by a line break
    split: str = "train"
    data_dir: str | None = None
    data_files: str | None = None
    revision: str | None = None
    printed_bytes: bool = False  # values look like "b'Solve 2*x = 4.\\n'"
    software_heritage: str | None = None  # the column contains ids, and their texts are at this address

    def __str__(self) -> str:
        return f"{self.path}/{self.config}" if self.config else self.path


# deepmind/math_dataset is a Python script, and `datasets` has not run scripts since version 4. The hub also
# keeps such data sets as Parquet, in a separate branch. The script stored the printed form of bytes.
HUB = {
    "fineweb-edu-dedup": Hub("HuggingFaceTB/smollm-corpus", "fineweb-edu-dedup"),
    "cosmopedia-v2": Hub("HuggingFaceTB/smollm-corpus", "cosmopedia-v2"),
    "python-edu": Hub("HuggingFaceTB/smollm-corpus", "python-edu", columns=("blob_id",),
                      software_heritage="https://softwareheritage.s3.amazonaws.com/content/"),
    "open-web-math": Hub("open-web-math/open-web-math"),
    "tinystories": Hub("roneneldan/TinyStories"),
    "stackoverflow": Hub("bigcode/stackoverflow-clean", columns=("content",)),  # inferred
    "starcoderdata-python": Hub("bigcode/starcoderdata", columns=("content",), data_dir="python"),
    "webinstruct": Hub("TIGER-Lab/WebInstructSub", columns=("question", "answer", "source")),
    "self-oss-instruct": Hub("bigcode/self-oss-instruct-sc2-exec-filter-50k",
                             columns=("instruction", "response")),
    "self-oss-instruct-h4": Hub("HuggingFaceTB/self-oss-instruct-sc2-H4", columns=("messages",),
                                split="train_sft"),
    "magpie-pro": Hub("HuggingFaceTB/Magpie-Pro-300K-Filtered-H4", columns=("messages",), split="train_sft"),
    "openhermes": Hub("HuggingFaceTB/OpenHermes-2.5-H4", columns=("messages",), split="train_sft"),
    "everyday-conversations": Hub("HuggingFaceTB/everyday-conversations-llama3.1-2k", columns=("messages",),
                                  split="train_sft"),
    "instruct-data-basics": Hub("HuggingFaceTB/instruct-data-basics-smollm-H4", split="train_sft",
                                columns=("instruction", "response")),
    "smol-smoltalk": Hub("HuggingFaceTB/smol-smoltalk", columns=("messages",)),
    "helpsteer": Hub("nvidia/HelpSteer", columns=("prompt", "response", "helpfulness", "correctness")),
    "dpo-mix-7k": Hub("argilla/dpo-mix-7k", columns=("chosen", "rejected")),
    "ultrafeedback-binarized": Hub("HuggingFaceH4/ultrafeedback_binarized", columns=("chosen", "rejected"),
                                   split="train_prefs"),
    "deepmind_mathematics": Hub("deepmind/math_dataset", columns=("question", "answer"), printed_bytes=True,
                                data_files="*/*train/*.parquet", revision="refs/convert/parquet"),
}


def ask_hub(path: str) -> object:
    """What the hub says about a data set, or the error, within 10 seconds. `datasets` would wait longer."""
    from huggingface_hub import HfApi

    answer = [TimeoutError("no answer within 10 seconds")]

    def ask():
        try:
            answer[0] = HfApi().dataset_info(path, timeout=5)
        except Exception as error:
            answer[0] = error

    thread = threading.Thread(target=ask, daemon=True)  # no time limit reaches a silent name server
    thread.start()
    thread.join(10)
    return answer[0]


def open_hub(hub: Hub, as_text: bool) -> "IterableDataset":
    """A `datasets` stream of the columns that make the text; for chats, all columns of a set that HUB does
    not list."""
    from datasets import load_dataset
    from huggingface_hub.errors import RepositoryNotFoundError

    known = None if Path(hub.path).is_dir() else ask_hub(hub.path)
    if isinstance(known, RepositoryNotFoundError):
        raise UserError(f"neither this machine nor the hub has {hub.path!r}; if it is private, run "
                        "hf auth login first")
    if isinstance(known, Exception):
        raise UserError(f"{hub.path!r} is not here, and the hub cannot be reached ({known}): {WAY_OUT}")
    try:
        stream = load_dataset(hub.path, hub.config, data_dir=hub.data_dir, data_files=hub.data_files,
                              split=hub.split, revision=hub.revision, streaming=True)
    except Exception as error:
        if getattr(known, "gated", False):
            raise UserError(f"{hub.path!r} is open to registered readers: accept its terms on "
                            f"https://huggingface.co/datasets/{hub.path}, then run hf auth login") from None
        raise UserError(f"{hub.path!r} cannot be opened: {' '.join(str(error).split())[:300]}") from None
    any_columns = not as_text and hub.columns == ("text",)  # their schema is read from the rows
    if stream.column_names is None or any_columns:  # None: not known before the first row
        return stream
    if set(hub.columns) - set(stream.column_names):
        raise UserError(f"{hub.path!r} has no column {hub.columns}, only {stream.column_names}")
    return stream.select_columns(list(hub.columns))


def hub_records(hub: Hub, stream: "IterableDataset", first: int, step: int, as_text: bool,
                files: list[int]) -> Iterator[tuple[str, Callable]]:
    """Every `step`-th record of a stream, beginning with number `first`: rows, or the texts of rows.

    `files` gets the number of the first record of each file that is begun. With those of an earlier run, the
    stream begins in the file in which that run stopped, and fetches none before it.
    """
    make: Callable = blob_text if hub.software_heritage else hub_text
    start = max(0, bisect_right(files, first) - 1)
    number, known = files[start] if files else 0, bool(files)
    try:
        for n in range(start, stream.num_shards):
            files[n:] = [number]
            rows = stream.shard(stream.num_shards, n)
            if n == start and known:  # to the record after the last one that was read
                unread = max(number, first - step + 1)
                rows, number = rows.skip(unread - number), unread
            for row in rows:
                if number >= first and (number - first) % step == 0:
                    place = f"{hub.path} record {number + 1}"
                    yield place, partial(make if as_text else hub_row, hub, row)
                number += 1
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"reading {hub.path!r} stopped ({reason}): {WAY_OUT}") from None


def hub_row(hub: Hub, row: dict) -> dict:
    if hub.printed_bytes:
        return {name: ast.literal_eval(value).decode().strip() for name, value in row.items()}
    return row


def hub_text(hub: Hub, row: dict) -> str:
    return text_of(hub_row(hub, row), hub.columns)


def blob_text(hub: Hub, row: dict) -> str:
    text = fetch(hub.software_heritage + parse.quote(text_of(row, hub.columns)))
    if text is None:
        raise LeftOut("not at Software Heritage")
    return text


def fetch(url: str) -> str | None:
    """The text of one blob, or None if there is none. Tries again when the network or the server fails."""
    for attempt in range(TRIES):
        try:
            with request.urlopen(url, timeout=20) as response:
                data = response.read()
            break
        except url_error.HTTPError as error:
            if error.code in (403, 404):  # the bucket answers 403 as well for what it does not have
                return None
            reason: Exception = error
        except (OSError, http.client.HTTPException) as error:
            reason = error
        if attempt == TRIES - 1:
            raise UserError(f"{url} does not answer ({reason}): {WAY_OUT}")
        time.sleep(PAUSE * 2**attempt)
    try:
        return gzip.decompress(data).decode("utf-8", errors="ignore")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Bad("truncated or corrupt gzip", error) from None


def prefetch(stream: Iterable[tuple[str, Callable]]) -> Iterator[tuple[str, Callable]]:
    """The same records in the same order, with make() already running in threads for the next PREFETCH."""
    pool = ThreadPoolExecutor(THREADS)
    waiting: deque[tuple[str, Callable]] = deque()
    try:
        for place, make in stream:
            waiting.append((place, pool.submit(make).result))
            if len(waiting) == PREFETCH:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

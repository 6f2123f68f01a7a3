"""plumbing/forecast.py: how much will data.py read and write, and how long will that take?

    fineweb-edu-dedup: 1,927,811,072 tokens, about 8.5 GB of text to read, 3.9 GB to write, 1.7 hours
    cosmopedia-v2: ...
    together about 12.1 GB of text to read, 5.5 GB to write, 2.4 hours; 812.0 GB are free

It is guessed from the first megabytes of each source. Built-in sources take seconds and are not mentioned.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from config import Config, UserError
from corpus.sources import Documents, is_builtin
from plumbing.shards import is_ready, part_of, read_manifest, shard_folder, tokens_in
from tokenizer import Tokenizer

READ, ENCODE, SECONDS = 2**25, 2**21, 10  # bytes of a source that are read and encoded, and for how long


def forecast(cfg: Config, tok: Tokenizer) -> Iterator[str]:
    """What is left to do for a config, as lines; none if nothing is."""
    total = [0.0, 0.0, 0.0]  # bytes to read, bytes to write, seconds
    for source in (source for source in cfg.sources if not is_builtin(source)):
        path = shard_folder(source, cfg, tok) / f"manifest_{cfg.part.replace('/', 'of')}.json"
        manifest = read_manifest(path) if path.exists() else {"stops": [], "shards": []}
        budget = part_of(source, cfg)
        if is_ready(manifest, budget):
            continue
        bytes_per_token, tokens_per_second = speed(source, cfg, tok)
        if not tokens_per_second:
            continue  # data.py will say that there is no text
        if not budget:
            yield f"{source}: all of its texts, about {tokens_per_second:,.0f} tokens per second"
            continue
        tokens = max(0, budget - tokens_in(manifest))
        ids = tokens / (1 - cfg.val_fraction)  # with those that are held out
        costs = ids * bytes_per_token, 2 * ids, ids / tokens_per_second
        total = [sum(pair) for pair in zip(total, costs)]
        yield f"{source}: {tokens:,} tokens, about {said(*costs)}"
    if any(total):
        places = (Path(cfg.out_dir) / "data" / "any").absolute().parents
        folder = next(path for path in places if path.exists())
        free = shutil.disk_usage(folder).free
        yield f"together about {said(*total)}; {size(free)} are free"


def said(to_read: float, to_write: float, seconds: float) -> str:
    time_left = (f"{seconds / 3600:,.1f} hours" if seconds > 5400 else
                 f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} s")
    return f"{size(to_read)} of text to read, {size(to_write)} to write, {time_left}"


def size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes > 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def speed(source: str, cfg: Config, tok: Tokenizer) -> tuple[float, float]:
    """(bytes per token, tokens per second) of the first texts of a source. A thread reads while the library
    encodes, so the slower of the two decides."""
    texts, size, began = [], 0, time.perf_counter()
    with suppress(UserError):  # a run that gets as far as a fault here will meet it, and report it
        for text in Documents(source, replace(cfg, on_bad="skip")):
            if size < ENCODE:
                texts.append(text)
            size += len(text.encode())
            if size >= READ or time.perf_counter() - began > SECONDS:
                break
    reading, began = time.perf_counter() - began, time.perf_counter()
    n_ids = sum(len(encoding.ids) + 1 for encoding in
                tok.rust.encode_batch_fast(texts, add_special_tokens=False))
    encoding = time.perf_counter() - began
    if not n_ids:
        return 0.0, 0.0
    encoded = sum(len(text.encode()) for text in texts)
    return encoded / n_ids, n_ids / max(encoding, reading * encoded / size)

"""
data.py: from text to batches.

All documents of a source are written one after another as ids, each closed by <|endoftext|>:

    The  cat  sat  END  Once  upon  a  time  ...      a shard: a flat file of 16-bit numbers, and its manifest

A row is a window of T + 1 neighbours; the next one begins T ids later. The first T ids are the input, the
last T the targets: the right answer at position t is simply the id at t + 1. Rows may begin in one story and
end in the next.

Which rows make up batch i is arithmetic (mixture.py) and not state. A run that was interrupted therefore goes
on with just the next row, and on more devices it sees the same rows in the same order.

    python data.py config/demo.py            writes out/demo/data/...                           next: model.py
"""

import hashlib
import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import bpe
from plumbing import checkpoint
import config
import tokenizer
from config import Config, UserError
from corpus.sources import is_builtin, split_of
from curate.steps import Curated, check, described, steps_of
from mixture import Order, drawn

SHARD_TOKENS = 2**26  # a shard is closed after so many: 128 MiB
BATCH_CHARACTERS = 2_000_000  # text that is tokenised at a time
SHARD = {"file": str, "tokens": int, "documents": int, "bytes": int}
MANIFEST = {"tokenizer": str, "complete": bool, "shards": [{"train": SHARD, "val": SHARD}]}

# ---------------------------------------------------------------------------------------------------------
# documents -> shards


def shard_folder(source: str, cfg: Config, tok: tokenizer.Tokenizer) -> Path:
    """Where the tokens of a source stand: under a name made of all they depend on; nothing stale is read."""
    recipe = json.dumps([described(source, cfg), tok.digest(), cfg.val_fraction], sort_keys=True)
    name = re.sub(r"[^\w.-]+", "_", source)[-60:]
    return Path(cfg.out_dir) / "data" / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}"


def ahead(items: Iterable) -> Iterator:
    """The items of an iterator, while a thread already makes the next one."""
    items = iter(items)
    item = next(items, None)  # not in the thread: Ctrl-C would wait for it, hours where dedup reads all first
    with ThreadPoolExecutor(1) as thread:
        while item is not None:
            coming = thread.submit(next, items, None)
            yield item
            item = coming.result()


def text_batches(documents: Curated) -> Iterator[tuple[list[str], dict]]:
    """Lists of texts of about BATCH_CHARACTERS, each with the state of the reading behind it."""
    texts, size = [], 0
    for text in documents:
        texts.append(bpe.clean(text))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield texts, documents.state()
            texts, size = [], 0
    yield texts, documents.state()


def encoded_batches(documents: Curated, tok: tokenizer.Tokenizer, val_fraction: float) -> Iterator[tuple]:
    """Lists of (bytes, ids, split) with the state of the reading; the library uses all cores."""
    for texts, state in ahead(text_batches(documents)):
        encodings = tok.rust.encode_batch_fast(texts, add_special_tokens=False)
        raw = [text.encode() for text in texts]
        yield [(len(data), encoding.ids, split_of(text, val_fraction))
               for text, data, encoding in zip(texts, raw, encodings, strict=True)], state


def write_shard(batches: Iterator, folder: Path, name: str, eos_id: int,
                bar: tqdm) -> tuple[dict, dict | None]:
    """Write a train_ and a val_ file from the next batches; returns their description and the state of the
    reading, or None as state when the batches have come to their end."""
    shard: dict[str, dict] = {split: {"file": f"{split}_{name}.bin", "tokens": 0, "documents": 0, "bytes": 0}
                              for split in ("train", "val")}
    temporary = {split: folder / f"{shard[split]['file']}.tmp" for split in shard}
    state = None
    with open(temporary["train"], "wb") as train, open(temporary["val"], "wb") as val:
        for documents, reading in batches:
            for data, ids, split in documents:
                (train if split == "train" else val).write(np.array([*ids, eos_id], np.uint16).tobytes())
                counts = shard[split]
                counts["tokens"] += len(ids) + 1
                counts["documents"] += 1
                counts["bytes"] += data
                bar.update(data)
            if shard["train"]["tokens"] >= SHARD_TOKENS:
                state = reading
                break
    for split in shard:
        checkpoint.put(temporary[split], folder / shard[split]["file"])
    return shard, state


def write_shards(source: str, cfg: Config, tok: tokenizer.Tokenizer) -> None:
    """Tokenise a source into its folder, unless that is done; goes on behind the last whole shard."""
    folder, part = shard_folder(source, cfg, tok), cfg.shard.replace("/", "of")
    path = folder / f"manifest_{part}.json"
    manifest = {"source": source, **described(source, cfg), "tokenizer": tok.digest(), "dtype": "uint16",
                "vocab_size": tok.vocab_size, "complete": False, "shards": []}
    with checkpoint.lock(folder / f"lock_{part}"):
        if path.exists():
            manifest = checkpoint.read_json(path, MANIFEST)
        if manifest["complete"]:
            return
        documents = Curated(source, cfg, steps_of(source, cfg), manifest)
        batches = ahead(encoded_batches(documents, tok, cfg.val_fraction))
        with tqdm(unit="B", unit_scale=True, desc=source, disable=None) as bar:
            while not manifest["complete"]:
                name = f"{part}_{len(manifest['shards']):05}"
                shard, state = write_shard(batches, folder, name, tok.eos_id, bar)
                manifest["complete"] = state is None
                manifest["shards"].append(shard)
                manifest.update(state or documents.state())
                checkpoint.write_json(path, manifest)


# ---------------------------------------------------------------------------------------------------------
# shards -> rows


def read_manifests(folder: Path | str, tok: tokenizer.Tokenizer) -> list[dict]:
    """The manifests of all parts of a source; UserError if one is missing, unfinished or not for tok."""
    parts = {path.stem.partition("_")[2]: checkpoint.read_json(path, MANIFEST)
             for path in sorted(Path(folder).glob("manifest_*.json")) if re.search(r"_\d+of\d+$", path.stem)}
    numbers = [tuple(map(int, part.split("of"))) for part in parts]
    if not parts or len({n for _, n in numbers}) != 1 or len(numbers) != numbers[0][1]:
        raise UserError(f"the tokens in {folder} are not whole: there are the parts "
                        f"{', '.join(parts) or 'none'}")
    for part, manifest in parts.items():
        if not manifest["complete"]:
            raise UserError(f"the tokens in {folder} are still being made: part {part} is not complete")
        if manifest["tokenizer"] != tok.digest():
            raise UserError(f"the tokens in {folder} were made with another tokenizer: "
                            f"{manifest['tokenizer']}, not {tok.digest()}")
    return list(parts.values())


class Rows:
    """The rows of one split of one source: rows[i] is an array of T + 1 ids. Nothing is held in memory."""

    def __init__(self, folder: Path | str, split: str, T: int, tok: tokenizer.Tokenizer) -> None:
        self.T, self.files, self.tokens, self.bytes, self.documents = T, [], 0, 0, 0
        for manifest in read_manifests(folder, tok):
            for shard in manifest["shards"]:
                path, tokens = Path(folder) / Path(shard[split]["file"]).name, shard[split]["tokens"]
                size = path.stat().st_size if os.path.exists(path) else 0  # also where the name cannot be
                if size != 2 * tokens:
                    raise UserError(f"{path} is damaged: it has {size:,} bytes, and its manifest says "
                                    f"{2 * tokens:,}; delete its folder and run data.py again")
                self.files.append(path)
                self.tokens += tokens
                self.bytes += shard[split]["bytes"]
                self.documents += shard[split]["documents"]
        sizes = [path.stat().st_size // 2 for path in self.files]
        self.ends = list(accumulate(max(0, (size - 1) // T) for size in sizes))  # rows up to each shard's end

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> np.ndarray:
        assert 0 <= i < len(self), f"there are {len(self)} rows, and no row {i}"
        shard = bisect_right(self.ends, i)
        first = i - (self.ends[shard - 1] if shard else 0)
        return np.fromfile(self.files[shard], dtype=np.uint16, count=self.T + 1, offset=2 * self.T * first)


class Batches:
    """get_batch(split, i): micro-batch i of this device as (ids, targets, doc), each (B, T) int64.

    Micro-batch i of all devices together is draws i B world ... (i + 1) B world - 1 of the run, and this
    device takes B neighbours of them. Every source goes through all of its rows, in an order of its own for
    each epoch, before one comes again. Validation always draws from the first mixture.
    """

    def __init__(self, cfg: Config, tok: tokenizer.Tokenizer, rank: int = 0, world: int = 1) -> None:
        self.cfg, self.rank, self.world, self.eos_id, self.V = cfg, rank, world, tok.eos_id, tok.vocab_size
        self.order = Order(cfg.mixtures, cfg.batch, cfg.data_seed)
        self.rows = {(split, source): Rows(shard_folder(source, cfg, tok), split, cfg.seq_len, tok)
                     for source in cfg.sources for split in ("train", "val")}
        self.can_validate = all(len(self.rows["val", source]) for source in cfg.mixtures[0][1])
        if not self.can_validate and rank == 0:
            print("there is no validation: a source has less than one row for it (see --val_fraction)")
        for source in cfg.sources:
            if not len(self.rows["train", source]):
                tokens = self.rows["train", source].tokens
                raise UserError(f"{source} has only {tokens:,} tokens to train on, less than one row of "
                                f"seq_len={cfg.seq_len}: add text or lower --seq_len")

    def where(self, split: str, d: int) -> tuple[str, int]:
        """(source, row) of draw d of the run: step s, from 0, is draws s * batch to (s + 1) * batch - 1."""
        source, k = self.order(d)
        return source, drawn(k, len(self.rows[split, source]), self.cfg.data_seed, split, source)

    def __call__(self, split: str, i: int) -> tuple[torch.Tensor, ...] | None:
        if split == "val" and not self.can_validate:
            return None
        B = self.cfg.micro_batch
        first = (i * self.world + self.rank) * B
        places = [self.where(split, d) for d in range(first, first + B)]
        raw = np.stack([self.rows[split, source][row] for source, row in places])    # (B, T + 1)
        if raw.max() >= self.V:
            raise UserError(f"the tokens are damaged: id {raw.max()} in one of the rows {places}, and there "
                            f"are {self.V:,} ids; delete {self.cfg.out_dir}/data and run data.py again")
        rows = torch.from_numpy(raw.astype(np.int64))
        ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()           # (B, T) each
        ends = (ids == self.eos_id).long()
        return ids, targets, ends.cumsum(1) - ends

    def bytes_per_token(self) -> float:
        """Of the validation text; 0 if there is none. It turns a loss per token into bits per byte."""
        return sum(weight * self.rows["val", source].bytes / self.rows["val", source].tokens
                   for source, weight in self.cfg.mixtures[0][1].items()) if self.can_validate else 0.0

    def steps(self) -> int:
        """How many steps cfg.epochs passes over all rows take."""
        rows = sum(len(self.rows["train", source]) for source in self.cfg.sources)
        return max(1, math.ceil(self.cfg.epochs * rows / self.cfg.batch))


# ---------------------------------------------------------------------------------------------------------
# the data of a run


def is_prepared(source: str, cfg: Config, tok: tokenizer.Tokenizer) -> bool:
    folder = shard_folder(source, cfg, tok)
    try:
        return bool(read_manifests(folder, tok))
    except UserError:
        return False


def ready_tokenizer(cfg: Config, argv: list[str]) -> tokenizer.Tokenizer:
    """The tokenizer of a run whose tokens are ready. What is built-in is prepared now; for anything else this
    raises UserError with the command that prepares it, since that may take a day and a network."""
    if cfg.fractions:
        raise UserError("this config is for sft.py or dpo.py: its `data` are fractions of chats or pairs")
    check(cfg.filters, cfg.classifier)
    whole = replace(cfg, shard="1/1")
    ways = (f"prepare them with python data.py {' '.join(argv)}, or train on the built-in corpus with "
            "--data=builtin")
    foreign = [source for source in cfg.sources if not is_builtin(source)]
    if foreign and not tokenizer.is_ready(cfg):
        raise UserError(f"there are no tokens and no tokenizer for {', '.join(foreign)} yet: {ways}")
    tok = tokenizer.of_run(cfg)
    for source in cfg.sources:
        if not is_prepared(source, whole, tok):
            if source in foreign:
                raise UserError(f"the tokens of {source} are not there: {ways}")
            print(f"preparing the tokens of {source}", flush=True)
            write_shards(source, whole, tok)
    return tok


def main(argv: list[str]) -> None:
    cfg = config.load(argv)
    check(cfg.filters, cfg.classifier)
    tok = tokenizer.of_run(cfg)
    for source in cfg.sources:
        write_shards(source, cfg, tok)
        folder, part = shard_folder(source, cfg, tok), cfg.shard.replace("/", "of")
        manifest = checkpoint.read_json(folder / f"manifest_{part}.json")
        print(f"{folder}")
        for split in ("train", "val"):
            total = {key: sum(shard[split][key] for shard in manifest["shards"])
                     for key in ("documents", "tokens", "bytes")}
            print(f"  {split:5}  {total['documents']:>12,} documents  {total['tokens']:>15,} tokens  "
                  f"{total['bytes'] / max(1, total['tokens']):.2f} bytes a token")
        for reason, count in manifest["bad"].items():
            print(f"  left out {count:,} records: {reason}")
        for step, reasons in manifest.get("dropped", {}).items():
            for reason, count in reasons.items():
                print(f"  left out {count:,} documents: {step}, {reason}")
        if manifest["missing"]:
            print(f"  {manifest['missing']:,} blobs were not at Software Heritage")


if __name__ == "__main__":
    config.command(main)

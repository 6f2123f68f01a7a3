"""
data.py: from text to batches.

All documents of a source are written one after another as ids, each closed by <|endoftext|>:

    The  cat  sat  END  Once  upon  a  time  ...      a shard: a flat file of 16-bit ids, and its manifest

A row is T + 1 consecutive ids (T = seq_len); the next row begins T ids later. Its first T ids are the input,
its last T the targets: the right answer at position t is simply the id at t + 1.

    ids       The   cat   sat   END   Once
    targets   cat   sat   END   Once  upon

Rows may begin in one story and end in the next. Which stories share a row never changes; rows are what is
shuffled.

Which rows make up batch i is arithmetic, not state. So an interrupted run resumes with exactly the next row,
more devices see the same rows in the same order, and "which rows did step 1,000 see?" can be answered years
later.

    python data.py config/demo.py            writes out/demo/data/...                        next: model.py
"""

import math
import os
import runpy
from bisect import bisect_right
from collections import Counter
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import numpy as np
import torch

import config
from config import Config, UserError
from corpus.sources import key_of, recipe_of
from plumbing.processes import command
from plumbing.shards import (
    budget_of,
    part_of,
    read_manifests,
    shard_folder,
    shards_of,
    summary,
    write_shards,
)
from tokenizer import Tokenizer, load_or_train

# B rows, T positions

# ---------------------------------------------------------------------------------------------------------
# which row comes next: a run takes draws 0, 1, 2, ..., each of which is a row of some source. At a first
# reading you may take it for granted that permute shuffles and Order mixes, and go on at "shards -> rows ->
# batches".


def scramble(x: int) -> int:
    """A 64-bit integer in which every bit depends on all bits of x (the finalizer of SplitMix64)."""
    x &= 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
    return x ^ (x >> 31)


def permute(i: int, n: int, key: int) -> int:
    """Where the permutation of 0 .. n-1 that belongs to `key` sends i, without an array of n integers.

    A Feistel network: cut the bits of i into halves, and in turn change one half by a scrambled copy of the
    other. Each round can be undone, so no two i collide; after six of them, neighbors are far apart. A result
    of n or more is sent through again until one is below n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)  # half of the bits, rounded up
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(6):
            round_key = key + turn * 0x9E3779B97F4A7C15
            left, right = right, left ^ (scramble(round_key ^ (right << 8)) & mask)
        i = left << half | right
        if i < n:
            return i


def draw_row(k: int, ends: list[int], *key: object) -> int:
    """The row of a source's k-th draw from its n rows: every epoch of n draws has an order of its own.

    ends is [n], or [100, 250] for a source that had 100 rows and got 150 more: the first draws of an epoch
    remain what they were before, and the new rows come after them.
    """
    epoch, place = divmod(k, ends[-1])
    group = bisect_right(ends, place)
    first = ends[group - 1] if group else 0
    return first + permute(place - first, ends[group] - first, key_of(*key, epoch) + group)


class Order:
    """order(d) -> (source, k): draw d of a run comes from this source, and is the source's k-th draw.

    Every block of 1,000 draws contains each source exactly by its weight, in a shuffled order: 420 draws for
    a weight of 0.42. So weights are multiples of 1/1000, and a single batch is only roughly mixed. A mixture
    that begins at a later step begins with a new block.
    """

    def __init__(self, mixtures: list[tuple[int, dict[str, float]]], batch: int, seed: int) -> None:
        self.seed = seed
        self.starts: list[int] = []
        self.mixtures: list[dict[str, int]] = []
        self.before: list[Counter[str]] = []
        before = Counter[str]()
        for step, weights in mixtures:
            if self.mixtures:
                before = before + self.counts(len(self.mixtures) - 1, step * batch - self.starts[-1])
            self.starts.append(step * batch)
            self.mixtures.append({source: round(1000 * weight) for source, weight in weights.items()})
            self.before.append(before)

    def counts(self, phase: int, draws: int) -> Counter[str]:
        """How many of the first `draws` of a mixture come from each source."""
        blocks, rest = divmod(draws, 1000)
        full = Counter({source: blocks * slots for source, slots in self.mixtures[phase].items()})
        return full + Counter(source for source, _ in block(self, phase, blocks)[:rest])

    def __call__(self, d: int) -> tuple[str, int]:
        phase = bisect_right(self.starts, d) - 1
        number, place = divmod(d - self.starts[phase], 1000)
        source, earlier = block(self, phase, number)[place]
        return source, self.before[phase][source] + number * self.mixtures[phase][source] + earlier


@lru_cache(8)
def block(order: Order, phase: int, number: int) -> list[tuple[str, int]]:
    """[(source, its earlier draws in this block)] for the 1,000 draws of a block."""
    slots = [source for source, n in order.mixtures[phase].items() for _ in range(n)]
    key, seen, entries = key_of(order.seed, "block", phase, number), Counter[str](), []
    for place in range(1000):
        source = slots[permute(place, 1000, key)]
        entries.append((source, seen[source]))
        seen[source] += 1
    return entries


def batch_rows(cfg: Config, split: str, i: int, rank: int, world: int, n: int) -> list[int]:
    """Which of n rows of a single source (chats, pairs) this device's micro-batch i has.

    In validation no row counts twice. What is left at the end is shared out evenly; [] means that nothing is.
    """
    draws = train_draws(cfg, i, rank, world)
    if split == "val":
        first, size = i * world * cfg.micro_batch, world * cfg.micro_batch
        left = range(first, min(first + size, n))
        draws = left[rank::world] if len(left) >= world else range(0)
    return [draw_row(d, [n], cfg.data_seed, split) for d in draws]


def n_steps(cfg: Config, n_rows: int) -> int:
    """How many steps cfg.epochs passes over n_rows take, rounded up."""
    return max(1, math.ceil(cfg.epochs * n_rows / cfg.batch))


# ---------------------------------------------------------------------------------------------------------
# shards -> rows -> batches


def train_draws(cfg: Config, i: int, rank: int, world: int) -> range:
    """The draws of micro-batch i (a part of a batch) of process `rank` of `world` (one per device; a single
    one is rank 0 of 1). All together make i * B * world ... (i + 1) * B * world - 1: the same draws in the
    same steps on any number of devices."""
    first = (i * world + rank) * cfg.micro_batch
    return range(first, first + cfg.micro_batch)


class Rows:
    """The rows of one split of one source: rows[i] is an array of T + 1 ids, read from the disk when asked
    for.

    The ids after the last complete row of a shard are not used.
    """

    def __init__(self, folder: Path | str, split: str, T: int, tok: Tokenizer, budget: int = 0) -> None:
        self.T, self.files, self.tokens, self.bytes, self.documents = T, [], 0, 0, 0
        n_files = []  # up to the end of each group
        for group in shards_of(read_manifests(folder, tok, budget), budget):
            for shard in group:
                path, tokens = Path(folder) / Path(shard[split]["file"]).name, shard[split]["tokens"]
                size = path.stat().st_size if os.path.exists(path) else 0  # False also for impossible names
                if size != 2 * tokens:
                    raise UserError(f"{path} is damaged: it has {size:,} bytes, and its manifest says "
                                    f"{2 * tokens:,}; delete its folder and run data.py again")
                self.files.append(path)
                self.tokens += tokens
                self.bytes += shard[split]["bytes"]
                self.documents += shard[split]["documents"]
            n_files.append(len(self.files))
        rows = [max(0, (path.stat().st_size // 2 - 1) // T) for path in self.files]
        self.ends = list(accumulate(rows))  # how many rows there are up to the end of each shard
        self.groups = [self.ends[n - 1] for n in n_files if n]  # and of each group of shards: see draw_row

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> np.ndarray:
        assert 0 <= i < len(self), f"there are {len(self)} rows, and no row {i}"
        shard = bisect_right(self.ends, i)
        first = i - (self.ends[shard - 1] if shard else 0)
        return np.fromfile(self.files[shard], dtype=np.uint16, count=self.T + 1, offset=2 * self.T * first)


def inputs_and_targets(rows: torch.Tensor, eos_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows (B, T + 1) -> (ids, targets, doc), (B, T) each. With 0 for END:

        [[5, 6, 0, 7, 8]]  ->  ids [[5, 6, 0, 7]], targets [[6, 0, 7, 8]], doc [[0, 0, 0, 1]]

    doc counts the documents that have ended before a position: END still belongs to the one that it closes.
    """
    ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    ends = (ids == eos_id).long()
    return ids, targets, ends.cumsum(1) - ends


def rescaled(weights: dict[str, float]) -> dict[str, float]:
    """Thousandths that add up to 1: {"a": 0.2, "b": 0.1} -> {"a": 0.667, "b": 0.333}."""
    ends = [round(1000 * end / sum(weights.values())) for end in accumulate(weights.values())]
    return {source: (end - start) / 1000 for source, start, end in zip(weights, [0, *ends], ends)}


class Batches:
    """get_batch(split, i): micro-batch i of this device as (ids, targets, doc), each (B, T) int64.

    A source goes through all of its rows before one of them repeats, in a new order for each of these epochs.
    A small source with a large weight may repeat while others are still in their first epoch. Validation
    draws from the first mixture, or its loss would jump when the mixture changes; and from those of its
    sources that have a row of held-out text.
    """

    def __init__(self, cfg: Config, tok: Tokenizer, rank: int = 0, world: int = 1) -> None:
        self.cfg, self.rank, self.world, self.eos_id, self.V = cfg, rank, world, tok.eos_id, tok.vocab_size
        self.rows = {(split, source): Rows(shard_folder(source, cfg, tok), split, cfg.seq_len, tok,
                                           budget_of(source, cfg))
                     for source in cfg.sources for split in ("train", "val")}
        weights = cfg.mixtures[0][1]
        empty = [source for source in weights if not len(self.rows["val", source])]
        self.val_weights = rescaled({source: weights[source] for source in weights if source not in empty})
        if empty and rank == 0:
            said = "validation is only of other sources" if self.val_weights else "there is no validation"
            print(f"{said}: too little held-out text (less than one row) of {', '.join(empty)}; raise "
                  f"--val_fraction={cfg.val_fraction}")
        self.order = {"train": Order(cfg.mixtures, cfg.batch, cfg.data_seed),
                      "val": Order([(0, self.val_weights)], cfg.batch, cfg.data_seed)}
        for source in cfg.sources:
            if not len(self.rows["train", source]):
                tokens = self.rows["train", source].tokens
                more = "raise --data_tokens, " if cfg.data_tokens else ""
                raise UserError(f"{source} has only {tokens:,} tokens to train on, less than one row of "
                                f"seq_len={cfg.seq_len}: {more}add text or lower --seq_len")

    def where(self, split: str, d: int) -> tuple[str, int]:
        """(source, row) of draw d of the run. Step s, from 0, is draws s * batch ... (s + 1) * batch - 1."""
        source, k = self.order[split](d)
        return source, draw_row(k, self.rows[split, source].groups, self.cfg.data_seed, split, source)

    def places(self, split: str, i: int) -> list[tuple[str, int]]:
        """(source, row) of each row of this device's micro-batch i."""
        return [self.where(split, d) for d in train_draws(self.cfg, i, self.rank, self.world)]

    def __call__(self, split: str, i: int) -> tuple[torch.Tensor, ...] | None:
        if split == "val" and not self.val_weights:
            return None
        places = self.places(split, i)
        raw = np.stack([self.rows[split, source][row] for source, row in places])    # (B, T + 1)
        if raw.max() >= self.V:
            raise UserError(f"the tokens are damaged: id {raw.max()} in one of the rows {places}, and there "
                            f"are {self.V:,} ids; delete {self.cfg.out_dir}/data and run data.py again")
        return inputs_and_targets(torch.from_numpy(raw.astype(np.int64)), self.eos_id)

    def bytes_per_token(self) -> float:
        """Of the validation text; 0 if there is none. It turns a loss per token into bits per byte."""
        return sum(weight * self.rows["val", source].bytes / self.rows["val", source].tokens
                   for source, weight in self.val_weights.items())

    def n_rows(self) -> int:
        """Rows to train on, of all sources."""
        return sum(len(self.rows["train", source]) for source in self.cfg.sources)


def main(argv: list[str]) -> None:
    cfg = config.load(argv)
    if cfg.fractions:  # chats: packing them is the lesson of sft.py, which builds on this file
        return runpy.run_path(str(Path(__file__).with_name("sft.py")))["prepare"](cfg)
    recipe_of(cfg)  # a source that cannot be used is reported before any work
    from plumbing.forecast import forecast  # here, since only this command needs it
    tok = load_or_train(cfg)
    for line in forecast(cfg, tok):
        print(line, flush=True)
    for source in cfg.sources:
        manifest = write_shards(source, cfg, tok)
        print(shard_folder(source, cfg, tok))
        for split in ("train", "val"):
            total = {key: sum(shard[split][key] for shard in manifest["shards"])
                     for key in ("documents", "tokens", "bytes")}
            print(f"  {split:5}  {total['documents']:>12,} documents  {total['tokens']:>15,} tokens  "
                  f"{total['bytes'] / max(1, total['tokens']):.2f} bytes per token")
        print(summary(manifest, part_of(source, cfg)))
        if cfg.part == "1/1" and not any(shard[split]["documents"] for shard in manifest["shards"]
                                         for split in ("train", "val")):
            raise UserError(f"there is no text in {source}")


if __name__ == "__main__":
    command(main)

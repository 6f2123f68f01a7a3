"""
packing.py: chats of all lengths into rows of one length.

Padding every chat to the longest would waste most of the work. So rows are filled like boxes, the largest
chats first, each into the first row that still has room (first-fit decreasing, Johnson 1973):

    row 0   | a long chat about animals          | hello        | 1+1=   |
    row 1   | a story                        | a function            | ..|    .. padding, a few positions

Chats in a row do not see each other (`doc`). What is learnt are the answers only: everywhere else the target
is IGNORE.                                                                                   next: sft.py
"""

import hashlib
import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing import checkpoint
from config import Config, UserError
from corpus.conversations import conversations
from corpus.sources import describe
from data import split_of
from mixture import drawn
from model import IGNORE
from tokenizer import Tokenizer

GROUP = 20_000  # chats that are packed together: so much is held in memory


def encoded(item: list[dict[str, str]] | str, tok: Tokenizer, T: int,
            train_on_prompts: bool = False) -> list[tuple[list[int], list[int]]]:
    """A chat or a text as [(ids, targets)], n <= T numbers each; [] if not even one answer fits into T.

    A chat that is too long ends with the last answer that fits; a text is cut into pieces. Positions behind
    the last target are dropped: nothing is learnt there.
    """
    if isinstance(item, str):
        ids = [*tok.encode(item), tok.eos_id]
        inputs, targets = ids[:-1], ids[1:]
        return [(inputs[i:i + T], targets[i:i + T]) for i in range(0, len(inputs), T)]
    n = len(item)
    while n:
        ids, mask = tok.chat(item[:n])
        mask = [True] * len(ids) if train_on_prompts else mask
        end = max((i for i, learnt in enumerate(mask) if learnt), default=0)  # the last target
        if item[n - 1]["role"] == "assistant" and end <= T:
            return [(ids[:end], [i if learnt else IGNORE for i, learnt in zip(ids[1:], mask[1:end + 1])])]
        n -= 1
    return []


def first_fit_decreasing(sizes: list[int], T: int) -> list[list[int]]:
    """Which go into one row: ([200, 100, 60, 50], T=256) -> [[0, 3], [1, 2]]."""
    rows: list[list[int]] = []
    room = np.full(len(sizes), T)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = int(np.argmax(room[:len(rows) + 1] >= sizes[i]))  # the first with room; the last one is new
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        room[row] -= sizes[i]
    return rows


def filled(chats: list[tuple[list[int], list[int]]], T: int) -> np.ndarray:
    """[(ids, targets), ...] -> arrays ids, targets, doc (N, T)."""
    rows = first_fit_decreasing([len(ids) for ids, _ in chats], T)
    arrays = np.zeros((3, len(rows), T), dtype=np.int32)
    arrays[1] = IGNORE
    for r, row in enumerate(rows):
        start = 0
        for number, i in enumerate(row):
            ids, targets = chats[i]
            arrays[:, r, start:start + len(ids)] = ids, targets, [number] * len(ids)
            start += len(ids)
        arrays[2, r, start:] = len(row)  # padding is a document of its own
    return arrays


def pack(cfg: Config, tok: Tokenizer) -> Path:
    """Write the rows of all chats of a config, unless they are there; returns their folder."""
    T, sources = cfg.seq_len, [[describe(source, cfg), fraction] for source, fraction in cfg.data]
    recipe = json.dumps([sources, tok.digest(), cfg.data_seed, cfg.val_fraction, T, cfg.train_on_prompts,
                         tok.template])
    folder = Path(cfg.out_dir) / "data" / f"chats-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}"
    if folder.exists():
        return folder
    counts = Counter({"train rows": 0, "val rows": 0})
    chats = tqdm(conversations(cfg), "packing chats", unit=" chats", disable=None)
    with checkpoint.whole_folder(folder) as new:
        while group := list(islice(chats, GROUP)):
            parts: dict[str, list] = {"train": [], "val": []}
            for item in group:
                made = encoded(item, tok, T, cfg.train_on_prompts)
                counts["too long"] += not made
                parts[split_of(item, cfg.val_fraction)] += made
            for split, some in parts.items():
                arrays = filled(some, T)
                counts[f"{split} chats"] += len(some)
                counts[f"{split} rows"] += arrays.shape[1]
                counts[f"{split} positions"] += sum(len(ids) for ids, _ in some)
                for name, array in zip(("ids", "targets", "doc"), arrays):
                    with open(new / f"{split}_{name}.bin", "ab") as file:
                        file.write(array.tobytes())
        checkpoint.write_json(new / "counts.json", counts)
    return folder


class ChatBatches:
    """get_batch(split, i): micro-batch i of this device as (ids, targets, doc), (B, T) each."""

    def __init__(self, folder: Path, cfg: Config, rank: int = 0, world: int = 1) -> None:
        self.cfg, self.rank, self.world = cfg, rank, world
        self.counts = checkpoint.read_json(folder / "counts.json", {"train rows": int, "val rows": int})
        self.rows = {}
        for split in ("train", "val"):
            shape = (self.counts[f"{split} rows"], cfg.seq_len)
            files = [folder / f"{split}_{name}.bin" for name in ("ids", "targets", "doc") if shape[0]]
            for file in files:
                if not file.exists() or file.stat().st_size != 4 * shape[0] * shape[1]:
                    raise UserError(f"{file} is damaged: delete {folder}, and it is made again")
            self.rows[split] = [np.memmap(file, np.int32, "r", shape=shape) for file in files]
        if not self.rows["train"]:
            raise UserError(f"there is no chat to train on in {', '.join(cfg.sources)}")

    def __call__(self, split: str, i: int) -> tuple[torch.Tensor, ...] | None:
        if not self.rows[split]:
            return None
        n, B = len(self.rows[split][0]), self.cfg.micro_batch
        first = (i * self.world + self.rank) * B
        rows = [drawn(d, n, self.cfg.data_seed, split) for d in range(first, first + B)]
        return tuple(torch.from_numpy(array[rows].astype(np.int64)) for array in self.rows[split])

    def steps(self) -> int:
        """How many steps cfg.epochs passes over all rows take."""
        return max(1, math.ceil(self.cfg.epochs * len(self.rows["train"][0]) / self.cfg.batch))

    def summary(self) -> str:
        c = self.counts
        share = c["train positions"] / (c["train rows"] * self.cfg.seq_len)
        dropped = f", {c['too long']:,} too long" if c.get("too long") else ""
        return f"{c['train chats']:,} chats in {c['train rows']:,} rows, {share:.1%} full{dropped}"

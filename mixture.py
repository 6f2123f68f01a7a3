"""
mixture.py: which row comes next, as pure arithmetic.

A run draws rows one after another: draw 0, 1, 2, ... For each draw two questions have an answer that needs no
list and no memory of earlier draws:

    Order(d)              draw d comes from source s, and it is that source's k-th draw
    drawn(k, n, *key)     the k-th draw from n rows is row ..., and in n draws each row comes once

So a run of 300 million rows needs no array of them, a run that was interrupted goes on with just the next
row, and "which rows did step 1,000 see?" can be answered years later.                       next: data.py
"""

import hashlib
from bisect import bisect_right
from collections import Counter
from functools import lru_cache


def mixed(x: int) -> int:
    """A 64-bit number scrambled so that each bit depends on all (the finaliser of SplitMix64)."""
    x &= 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return x ^ x >> 31


def key_of(*parts: object) -> int:
    """One 64-bit key from numbers and names."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def shuffled(i: int, n: int, key: int) -> int:
    """Where a key's permutation of 0 .. n-1 sends i, without an array of n numbers.

    A Feistel network: cut the bits of i into halves, and in turn change one half by a scrambled copy of the
    other. Each round can be undone, so no two i collide. Results beyond n are sent through again until one is
    below n, which keeps it a permutation of the n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = i >> half, i & (1 << half) - 1
        for turn in range(6):
            left, right = right, left ^ mixed(key + turn * 0x9E3779B97F4A7C15 ^ right << 8) & (1 << half) - 1
        i = left << half | right
        if i < n:
            return i


def drawn(k: int, n: int, *key: object) -> int:
    """The row of the k-th draw from n rows: every epoch of n draws has an order of its own."""
    epoch, place = divmod(k, n)
    return shuffled(place, n, key_of(*key, epoch))


class Order:
    """Which source draw d of a run comes from, and how many draws that source had before.

    Every block of 1,000 draws holds each source exactly 1,000 x its weight times, in a shuffled order. A
    mixture that begins at a later step begins with a new block.
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
        """Counter of how many of the first `draws` of a mixture each source has."""
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
    key, seen, drawn = key_of(order.seed, "block", phase, number), Counter[str](), []
    for place in range(1000):
        source = slots[shuffled(place, 1000, key)]
        drawn.append((source, seen[source]))
        seen[source] += 1
    return drawn

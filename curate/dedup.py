"""
dedup.py: which documents are nearly the same?

Two documents are alike as far as they share runs of five words: s = shared runs / all runs of both (Jaccard).
Comparing all pairs is hopeless for a million documents. MinHash (Broder 1997) compares none. Hash every run,
and keep the smallest hash: two documents have the same smallest one with probability s exactly. With 112 hash
functions, in 14 *buckets* of 8, call two documents alike if in some bucket all 8 agree:

    P(found | s) = 1 - (1 - s^8)^14            s = 0.6: 21%      0.75: 77%      0.9: 99.96%

So only documents that fall into the same bucket are ever looked at, and finding those is sorting. Documents
that are alike form clusters (a ~ b and b ~ c puts a, b and c into one), and the first of each cluster stays.

A document leaves 14 x 16 bytes in files on disk. Only one bucket is read at a time, 16 bytes a document, and
8 bytes a document hold the clusters: 24 GB for a billion.                             next: decontaminate.py
"""

import hashlib
import re
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np

RUN, BUCKETS, HASHES = 5, 14, 8  # words in a run; buckets; hashes in each: FineWeb's parameters
PRIME = np.uint64(2**61 - 1)
CHUNK = 1000  # documents whose hashes are written together
NUMBER = re.compile(r"\d+(?:[.,،٫]\d+)?")

# n documents, S different runs of words in one


def without_accents(text: str) -> str:
    """"déjà vu" -> "deja vu": letters are taken apart, and their marks left out."""
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


def normalised(text: str) -> str:
    """What does not matter goes: "In 1,969 they LANDED!" -> "in 0 they landed"."""
    text = NUMBER.sub("0", text.lower())
    text = "".join(" " if unicodedata.category(c)[0] in "PSC" else c for c in text)
    return " ".join(without_accents(text).split())


def runs_of(text: str) -> np.ndarray:
    """The hashes of the different runs of five words, (S,) uint64; a shorter text is one run."""
    words = normalised(text).split()
    runs = {" ".join(words[i:i + RUN]) for i in range(max(1, len(words) - RUN + 1))}
    hashed = b"".join(hashlib.sha1(run.encode()).digest()[:8] for run in runs)
    return np.frombuffer(hashed, dtype="<u8").astype(np.uint64)


def functions() -> tuple[np.ndarray, np.ndarray]:
    """The 112 hash functions (a x + b) mod p, as two arrays (112,)."""
    random = np.random.RandomState(1)
    a = random.randint(1, PRIME, dtype=np.uint64, size=BUCKETS * HASHES)
    return a, random.randint(0, PRIME, dtype=np.uint64, size=BUCKETS * HASHES)


def signature(runs: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest value of each hash function over the runs: (S,) -> (BUCKETS, HASHES)."""
    values = (runs[:, None] * a + b) % PRIME  # (S, 112); the product wraps at 2^64, which hashes as well
    return values.min(axis=0).reshape(BUCKETS, HASHES)


def keys(signature: np.ndarray) -> np.ndarray:
    """One number for each bucket, the same if and only if all its 8 hashes are (but for 1 in 2^64)."""
    mixed = np.zeros(BUCKETS, dtype=np.uint64)
    for column in signature.T:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def write_buckets(texts: Iterable[str], folder: Path) -> int:
    """Write (key, number of the document) into one file a bucket; returns how many documents there were."""
    (a, b), n, waiting = functions(), 0, []
    for n, text in enumerate(texts, 1):
        waiting.append(keys(signature(runs_of(text), a, b)))
        if len(waiting) == CHUNK:
            append(folder, waiting, n)
            waiting = []
    append(folder, waiting, n)
    return n


def append(folder: Path, waiting: list[np.ndarray], n: int) -> None:
    """The keys of the documents up to n, each bucket's behind what its file holds."""
    if waiting:
        numbers = np.arange(n - len(waiting), n, dtype=np.uint64)
        for bucket, column in enumerate(np.stack(waiting, axis=1)):
            with open(folder / f"bucket_{bucket:02}.bin", "ab") as file:
                np.stack([column, numbers], axis=1).tofile(file)


def find(parent: np.ndarray, i: int) -> int:
    """The first document of i's cluster; on the way, every second one is linked past its parent."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


def clusters(texts: Iterable[str]) -> np.ndarray:
    """For each text the number of the first text of its cluster: ["a", "b", "a"] -> [0, 1, 0]."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parent = np.arange(write_buckets(texts, folder))
        for path in sorted(folder.iterdir()):
            rows = np.fromfile(path, dtype=np.uint64).reshape(-1, 2)
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
            same = np.flatnonzero(rows[1:, 0] == rows[:-1, 0])  # neighbours that share a bucket
            for i, j in zip(rows[same, 1].tolist(), rows[same + 1, 1].tolist()):
                i, j = find(parent, i), find(parent, j)
                parent[max(i, j)] = min(i, j)
    for i in range(len(parent)):  # links only lead back, so one pass in order leads all to their first
        parent[i] = parent[parent[i]]
    return parent

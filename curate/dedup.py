"""
dedup.py: which documents are nearly the same?

Two documents are alike to the degree that they share runs of five words: s = shared runs / all runs of both
(Jaccard). Comparing all pairs is hopeless for a million documents. MinHash (Broder 1997) compares none. Hash
every run, and keep the smallest hash: two documents have the same smallest hash with probability exactly s,
because every run of the union is equally likely to get it, and a share s of these runs belongs to both.

Use 112 hash functions, in 14 *bands* of 8, and call two documents alike if all 8 agree in some band:

    P(found | s) = 1 - (1 - s^8)^14            s = 0.6: 21%      0.75: 77%      0.9: 99.96%

So only documents that agree in a band ever meet, and sorting finds those. Documents that are alike form
clusters (a ~ b and b ~ c puts a, b and c into one). Keep the first of each cluster.

On disk each document takes 14 x 16 bytes. Only one band is in memory at a time; sorting it takes about 52
bytes per document, 52 GB for a billion.

                                                                               next: curate/decontaminate.py
"""

import hashlib
import re
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np

RUN, BANDS, HASHES = 5, 14, 8  # words in a run, bands, hashes in a band: FineWeb's parameters
PRIME = np.uint64(2**61 - 1)
CHUNK = 1000  # documents whose keys are written together
NUMBER = re.compile(r"\d+(?:[.,،٫]\d+)?")

# ---------------------------------------------------------------------------------------------------------
# from a text to its 14 keys: S different runs of words in the text


def without_accents(text: str) -> str:
    """"déjà vu" -> "deja vu": decompose the letters and drop their marks."""
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


def normalized(text: str) -> str:
    """Case, marks and the values of numbers do not count: "In 1,969 they LANDED!" -> "in 0 they landed"."""
    text = NUMBER.sub("0", text.lower())
    text = "".join(" " if unicodedata.category(c)[0] in "PSC" else c for c in text)
    return " ".join(without_accents(text).split())


def run_hashes(text: str) -> np.ndarray:
    """The hashes of the different runs of five words, (S,) uint64. A shorter text is one run."""
    words = normalized(text).split()
    runs = {" ".join(words[i:i + RUN]) for i in range(max(1, len(words) - RUN + 1))}
    hashed = b"".join(hashlib.sha1(run.encode()).digest()[:8] for run in runs)
    return np.frombuffer(hashed, dtype="<u8").astype(np.uint64)


def hash_functions() -> tuple[np.ndarray, np.ndarray]:
    """The 112 hash functions (a x + b) mod p, as two arrays (112,)."""
    random = np.random.RandomState(1)
    a = random.randint(1, PRIME, dtype=np.uint64, size=BANDS * HASHES)
    return a, random.randint(0, PRIME, dtype=np.uint64, size=BANDS * HASHES)


def signature(hashes: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest value of each hash function over the runs: (S,) -> (BANDS, HASHES)."""
    values = (hashes[:, None] * a + b) % PRIME  # (S, 112); the product wraps at 2^64, which hashes as well
    return values.min(axis=0).reshape(BANDS, HASHES)


def band_keys(signature: np.ndarray) -> np.ndarray:
    """One 64-bit key per band, (BANDS,). Keys are equal if all 8 hashes are, and by chance once in 2^64."""
    mixed = np.zeros(BANDS, dtype=np.uint64)
    for column in signature.T:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


# ---------------------------------------------------------------------------------------------------------
# from the keys of all documents to clusters


def clusters(texts: Iterable[str]) -> np.ndarray:
    """For each text the index of the first text of its cluster: ["a", "b", "a"] -> [0, 1, 0].

    Every document links to an earlier one of its cluster (its parent), or to itself if it is the first.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parent = np.arange(write_bands(texts, folder))
        for path in sorted(folder.iterdir()):
            rows = np.fromfile(path, dtype=np.uint64).reshape(-1, 2)  # (key, document)
            rows = rows[np.argsort(rows[:, 0], kind="stable")]
            same = np.flatnonzero(rows[1:, 0] == rows[:-1, 0])  # neighbors with the same key
            for i, j in zip(rows[same, 1].tolist(), rows[same + 1, 1].tolist()):
                i, j = first_of_cluster(parent, i), first_of_cluster(parent, j)
                parent[max(i, j)] = min(i, j)
    for i in range(len(parent)):  # links always point to earlier documents, so one pass in order is enough
        parent[i] = parent[parent[i]]
    return parent


def first_of_cluster(parent: np.ndarray, i: int) -> int:
    """Follow the links from i to the first document of its cluster, and shorten the path for next time."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


def write_bands(texts: Iterable[str], folder: Path) -> int:
    """Write (key, index of the document) into one file per band; returns how many documents there were."""
    (a, b), n, waiting = hash_functions(), 0, []
    for n, text in enumerate(texts, 1):
        waiting.append(band_keys(signature(run_hashes(text), a, b)))
        if len(waiting) == CHUNK:
            append_keys(folder, waiting, n)
            waiting = []
    append_keys(folder, waiting, n)
    return n


def append_keys(folder: Path, waiting: list[np.ndarray], n: int) -> None:
    """Append the keys of the last documents, up to document n - 1, to the file of each band."""
    if waiting:
        documents = np.arange(n - len(waiting), n, dtype=np.uint64)
        for band, keys in enumerate(np.stack(waiting, axis=1)):
            with open(folder / f"band_{band:02}.bin", "ab") as file:
                np.stack([keys, documents], axis=1).tofile(file)

"""dedup.py: the curve of its formula, clusters as brute force and datatrove find them, files in between."""

import random

import numpy as np
import pytest

from curate import dedup
from curate.dedup import band_keys, clusters, hash_functions, normalized, run_hashes, signature

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "m", "lo", "ri", "sta", "dex")]


def planted(rng, n):
    """n texts of 120 words, in threes: one, and two copies of it with some words changed."""
    texts = []
    for _ in range(n // 3):
        words = rng.choices(WORDS, k=120)
        for changes in (0, 1, rng.randint(2, 12)):
            copy = list(words)
            for i in rng.sample(range(len(copy)), changes):
                copy[i] = rng.choice(WORDS)
            texts.append(" ".join(copy))
    rng.shuffle(texts)
    return texts


def test_normalisation_removes_what_does_not_matter():
    text = "  In 1,969 they\tLANDED — déjà vu (twice)! $3.50"
    assert normalized(text) == "in 0 they landed deja vu twice 0"


def test_a_text_of_fewer_words_than_a_run_is_one_run():
    assert len(run_hashes("Only three words")) == 1 and len(run_hashes("a b c d e f")) == 2
    assert len(run_hashes("")) == 1


@pytest.mark.parametrize("s", [0.6, 0.75, 0.9])
def test_pairs_are_found_with_the_probability_of_the_formula(s):
    rng, (a, b), n, S = random.Random(0), hash_functions(), 1500, 190
    shared = round(2 * S * s / (1 + s))
    exact, found = shared / (2 * S - shared), 0
    for _ in range(n):
        runs = np.array([rng.getrandbits(64) for _ in range(2 * S - shared)], dtype=np.uint64)
        one, other = (band_keys(signature(part, a, b)) for part in (runs[:S], runs[S - shared:]))
        found += bool((one == other).any())
    expected = 1 - (1 - exact**8) ** 14
    assert abs(found / n - expected) < 4 * (expected * (1 - expected) / n) ** 0.5 + 1e-3


def test_clusters_are_those_of_comparing_all_bands_of_all_pairs():
    """The same keys, compared pair by pair. Clusters grow until nothing changes."""
    texts, (a, b) = planted(random.Random(1), 90), hash_functions()
    every = [band_keys(signature(run_hashes(text), a, b)) for text in texts]
    alike = [(i, j) for i in range(len(texts)) for j in range(i) if (every[i] == every[j]).any()]
    expected = list(range(len(texts)))
    for _ in texts:
        for i, j in alike:
            expected[i] = expected[j] = min(expected[i], expected[j])
    assert clusters(texts).tolist() == expected
    assert 30 <= len(set(expected)) < 50


def test_equal_texts_form_one_cluster_named_after_its_first_text():
    one, two = planted(random.Random(2), 3)[0], "something else that nobody has ever said before this"
    assert clusters([two, one, two, one, two]).tolist() == [0, 1, 0, 1, 0]
    assert clusters([]).tolist() == []


def test_more_documents_than_are_written_at_a_time(monkeypatch):
    texts = planted(random.Random(3), 60)
    expected = clusters(texts).tolist()
    monkeypatch.setattr(dedup, "CHUNK", 7)
    assert clusters(iter(texts)).tolist() == expected


def test_clearly_alike_texts_are_found_and_different_ones_are_left_alone():
    texts = planted(random.Random(4), 150)
    root, runs = clusters(texts).tolist(), [set(run_hashes(text).tolist()) for text in texts]
    for i in range(len(texts)):
        for j in range(i):
            s = len(runs[i] & runs[j]) / len(runs[i] | runs[j])  # Jaccard similarity
            assert root[i] == root[j] or s < 0.9
            assert root[i] != root[j] or s > 0.2


@pytest.mark.interop
def test_clusters_equal_datatroves(tmp_path):
    """datatrove's own signatures and bands (it calls them buckets), on planted near-duplicates."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    theirs = MinhashDedupSignature(output_folder=str(tmp_path), config=MinhashConfig(
        n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(64, "sha1")), language="eng")
    texts = planted(random.Random(6), 150)
    every = [theirs.get_signature(theirs.get_shingles(text)) for text in texts]
    root = list(range(len(texts)))
    for _ in range(5):
        for i in range(len(texts)):
            for j in range(i):
                if any(x == y for x, y in zip(every[i], every[j])):
                    root[i] = root[j] = min(root[i], root[j])
    ours = clusters(texts).tolist()
    assert ours == root and len(set(root)) < 100

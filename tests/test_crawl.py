"""crawl.py: how much of each kind there is, and that each kind is what its name says."""

import itertools
import random
import re
from collections import Counter

import pytest

from corpus.documents import load
from curate.crawl import CHANGED, PAGE, SHARES, crawl, mixed_up, pages_of

SIZE = 600_000


@pytest.fixture(scope="module")
def pages():
    """{kind: [text]} of a small crawl."""
    found = {}
    for kind, text in crawl(5, SIZE):
        found.setdefault(kind, []).append(text)
    return found


def test_seventy_percent_of_the_bytes_are_noise_and_every_kind_has_its_share(pages):
    assert sum(SHARES.values()) == 100 and SHARES["clean"] == 30
    for kind, share in SHARES.items():
        size = sum(len(text.encode()) for text in pages[kind])
        assert 0 <= size - SIZE * share / 100 <= max(len(text.encode()) for text in pages[kind]), kind


def test_the_same_seed_gives_the_same_pages_and_another_seed_others():
    assert crawl(5, 50_000) == crawl(5, 50_000)
    assert not {text for _, text in crawl(6, 50_000)} & {text for _, text in crawl(5, 50_000)}


def test_clean_pages_are_prose_of_some_length_and_none_occurs_twice(pages):
    assert len(set(pages["clean"])) == len(pages["clean"])
    for text in pages["clean"] + pages["wrong"]:
        assert len(text.split()) >= PAGE and "\n\n" not in text
        assert all(len(line.split()) > 2 for line in text.splitlines())
    lists = re.compile(r"(\n[^.!?\n]+){3}\n")  # three lines in a row that end no sentence
    assert not [text for text in pages["clean"] if lists.search(text)]


def test_in_a_mixed_up_world_the_names_are_the_same_and_nearly_everything_else_is_wrong():
    facts = load("facts.json")
    mixed = mixed_up(facts, random.Random(0))
    for name in ("countries", "animals", "professions"):
        rows = [list(row.values()) if isinstance(row, dict) else row for row in facts[name]]
        others = [list(row.values()) if isinstance(row, dict) else row for row in mixed[name]]
        assert [row[0] for row in rows] == [row[0] for row in others]
    capitals = [(row[1], other[1]) for row, other in zip(facts["countries"], mixed["countries"])]
    assert sorted(a for a, _ in capitals) == sorted(b for _, b in capitals)
    assert sum(a != b for a, b in capitals) > 0.9 * len(capitals)
    assert facts == load("facts.json")  # the world itself is unchanged


def test_wrong_pages_name_wrong_capitals_and_clean_pages_right_ones(pages):
    capital_of = {row[0]: row[1] for row in load("facts.json")["countries"]}
    said = {kind: Counter() for kind in ("clean", "wrong")}
    for kind, counts in said.items():
        for text in pages[kind]:
            for capital, country in re.findall(r"\b([A-Z]\w+), the capital of ([A-Z]\w+)\b", text):
                if country in capital_of and capital in capital_of.values():
                    counts[capital_of[country] == capital] += 1
    assert said["clean"][True] > 10 and not said["clean"][False]
    assert said["wrong"][False] > 10 * said["wrong"][True]


def test_a_copy_shares_nearly_all_its_words_with_one_clean_page(pages):
    clean = [Counter(text.split()) for text in pages["clean"]]
    for text in pages["copy"][:30]:
        words = Counter(text.split())
        *_, second, first = sorted(sum((words & other).values()) / sum(other.values()) for other in clean)
        assert first > 1 - 5 * CHANGED and second < 0.9


def test_half_of_the_shuffled_pages_have_their_words_in_a_random_order(pages):
    """In English no article comes before another, or before "of" or "is". In a random order some do."""
    broken = re.compile(r"\b(?:the|a|an) (?:the|a|an|of|and|in|is|are)\b")
    assert sum(bool(broken.search(text)) for text in pages["shuffled"]) > 0.4 * len(pages["shuffled"])
    assert not [text for text in pages["clean"] if broken.search(text)]


def test_truncated_pages_break_off(pages):
    whole = sum(text.endswith((".", "!", "?")) and "..." not in text for text in pages["truncated"])
    assert whole < 0.2 * len(pages["truncated"])


def test_pages_of_a_format_never_end_and_never_repeat():
    some = list(itertools.islice(pages_of("textbook", random.Random(1)), 300))
    assert len(set(some)) == 300

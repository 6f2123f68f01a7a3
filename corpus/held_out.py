"""
held_out.py: what training never says, so that it can be asked.

Ask a model what it was told, and you learn only that it has a memory. To see whether it has learned more,
some things are kept back: a third of the countries, whose capitals appear in documents but never in a chat;
a quarter of the ways to greet, to thank, and to ask for a name, a capital or a sum; and a fifth of all sums.
3 + 5, 5 + 3, 8 - 3 and 8 - 5 say the same, so they are one *family* {3, 5} and are held out together. That
3 + 5 = 8 may still be a step in working out 23 + 45: this is how a model can find the result of a sum that it
has never read.

What is held out depends only on this file, so every run can be asked the same questions.

next: corpus/chats.py
"""

import hashlib
import itertools
import re
from collections.abc import Iterable

# topics whose wordings are held out in part
SPLIT = ("greeting", "thanks", "who", "capital", "sum_in_words", "sum_in_letters")
SUM = re.compile(r"(?<![\d.])(\d{1,2}) ?([+-]) ?(\d{1,2})(?!\d|\.\d)")  # 3 + 5, 12-7
KINDS_OF_SUMS = (
    lambda a, b: a + b <= 9,  # one digit everywhere: 3 + 5, 8 - 3
    lambda a, b: b <= 9 and a + b > 9,  # 7 + 8, 15 - 7
    lambda a, b: a <= 9 < b,  # 7 + 38, 45 - 7
    lambda a, b: a > 9,  # 47 + 38, 85 - 47
)


def smallest_hashes(items: Iterable, n: int) -> set:
    """n of the items, always the same ones: those with the smallest hashes."""
    return set(sorted(items, key=lambda item: hashlib.sha256(repr(item).encode()).digest())[:n])


def held_out_families() -> set[tuple[int, int]]:
    """A fifth of the families of each kind of sums. 1 + 1, which everybody asks, is not among them."""
    found = set()
    for belongs in KINDS_OF_SUMS:
        pairs = itertools.combinations_with_replacement(range(100), 2)
        families = [pair for pair in pairs if belongs(*pair) and pair != (1, 1)]
        found |= smallest_hashes(families, round(len(families) / 5))
    return found


FAMILIES = held_out_families()


def family(a: int, op: str, b: int) -> tuple[int, ...]:
    """(5, "+", 3) and (8, "-", 5) -> (3, 5)."""
    return tuple(sorted((a, b) if op == "+" else (b, a - b)))


def is_held_out(a: int, op: str, b: int) -> bool:
    """Whether a + b or a - b is one of the sums whose results are never stated."""
    return family(a, op, b) in FAMILIES


def result(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b


def known_countries(countries: list, held_out: bool = False) -> list:
    """The rows [country, capital, continent] whose capitals may occur in chats; held_out: the other third."""
    kept_back = smallest_hashes([country for country, _, _ in countries], len(countries) // 3)
    return [row for row in countries if (row[0] in kept_back) == held_out]


def wordings(topic: str, lines: list[str], held_out: bool = False) -> list[str]:
    """The lines of a topic of chats.txt that training says; held_out: the others, if there are any."""
    kept_back = smallest_hashes(lines, len(lines) // 4) if topic in SPLIT else set()
    return [line for line in lines if (line in kept_back) == held_out]


def stated_sums(text: str) -> list[tuple[int, str, int]]:
    """The held-out sums that a text states with their results: "3 + 5 = 8", or ">>> 3+5" and then 8."""
    found = []
    for match in SUM.finditer(text):
        a, op, b = int(match[1]), match[2], int(match[3])
        after = re.match(r"\D{0,20}?(?<![\d.])(\d+)(?!\d|\.\d)", text[match.end():match.end() + 25])
        if is_held_out(a, op, b) and after and int(after[1]) == result(a, op, b):
            found.append((a, op, b))
    return found

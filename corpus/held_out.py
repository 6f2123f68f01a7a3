"""
held_out.py: what training never says, so that it can be asked.

Whoever asks a model what it was told learns that it has a memory. To see whether it has learnt more, some
things are kept back: a third of the countries, whose capitals stand in documents but never in a chat; and a
fifth of all sums. 3 + 5, 5 + 3, 8 - 3 and 8 - 5 say the same, so they are one *family* {3, 5}, held out
together. That 3 + 5 = 8 may still be a step in working out 23 + 45: that is how an unknown sum can be known.

What is held out depends on nothing but this file, so every run can be asked the same.        next: chats.py
"""
import hashlib
import itertools
import re
from collections.abc import Iterable

SUM = re.compile(r"(?<![\d.])(\d{1,2}) ?([+-]) ?(\d{1,2})(?!\d|\.\d)")     # 3 + 5, 12-7


def some(items: Iterable, n: int) -> set:
    """n of the items, chosen by their hashes."""
    return set(sorted(items, key=lambda item: hashlib.sha256(repr(item).encode()).digest())[:n])


def fifth(families: list[tuple[int, int]]) -> set[tuple[int, int]]:
    families = [family for family in families if family != (1, 1)]
    return some(families, round(len(families) / 5))


PAIRS = list(itertools.combinations_with_replacement(range(100), 2))
FAMILIES = set().union(*(fifth([pair for pair in PAIRS if belongs(*pair)]) for belongs in (
    lambda a, b: a + b <= 9,                   # one digit all over: 3 + 5, 8 - 3
    lambda a, b: b <= 9 and a + b > 9,         # 7 + 8, 15 - 7
    lambda a, b: a <= 9 < b,                   # 7 + 38, 45 - 7
    lambda a, b: a > 9)))                      # 47 + 38, 85 - 47


def family(a: int, op: str, b: int) -> tuple[int, ...]:
    """(5, "+", 3) -> (3, 5), and (8, "-", 5), too."""
    return tuple(sorted((a, b) if op == "+" else (b, a - b)))


def is_held_out(a: int, op: str, b: int) -> bool:
    """Is a + b or a - b one of the sums that are never said with their result? 1 + 1 never is."""
    return family(a, op, b) in FAMILIES


def result(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b


def known_countries(countries: list, held_out: bool = False) -> list:
    """The two thirds of [country, capital, continent] whose capitals may occur in chats, or the others."""
    kept_back = some([country for country, _, _ in countries], len(countries) // 3)
    return [row for row in countries if (row[0] in kept_back) == held_out]


def told(text: str) -> list[tuple[int, str, int]]:
    """The held-out sums that a text tells with their results: "3 + 5 = 8", ">>> 3+5" and a line with 8."""
    found = []
    for match in SUM.finditer(text):
        a, op, b = int(match[1]), match[2], int(match[3])
        behind = re.match(r"\D{0,20}?(?<![\d.])(\d+)(?!\d|\.\d)", text[match.end():match.end() + 25])
        if is_held_out(a, op, b) and behind and int(behind[1]) == result(a, op, b):
            found.append((a, op, b))
    return found

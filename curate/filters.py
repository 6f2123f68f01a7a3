"""
filters.py: is this text at all? Rules of thumb that need no model.

A crawl contains menus, lists of links, cookie notices, and pages that say one thing fifty times. Each rule
below measures something that such pages have and prose does not, and compares it with the published bound:

    filter              question                                            paper
    gopher_repetition   how much of the page repeats itself?                Rae et al. 2021, table A1
    gopher_quality      long enough, and made of words?                     Rae et al. 2021, section A1.1
    c4                  which lines are sentences, and are there enough?    Raffel et al. 2020, section 2.2
    fineweb             do lines end like sentences? is it a list?          Penedo et al. 2024, section 3.6

FineWeb applies them in this order, without C4's rule on how lines must end; so does python -m curate. A
filter returns (text, None) to keep the text (c4 may return fewer lines), or (text, reason) to drop it.

    gopher_quality("The cat and the dog.")  ->  ("The cat and the dog.", "fewer than 50 words")

                                                                                      next: curate/dedup.py
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

WORD = re.compile(r"(?:[A-Za-z]\.){2,}|\w+(?=n't\b)|n't\b|'(?:s|d|m|re|ve|ll)\b|\d+(?:[.,:/]\d+)+"
                  r"|[^\W_]+(?:[./:_]+[^\W_]+)*|\.{2,}|-{2,}|~{2,}|[^\w\s]|_")
SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]]*\s+""")
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
TOP = {2: 0.20, 3: 0.18, 4: 0.16}  # n: at most this share of the characters in the top run of n words
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # n: at most this share in repeated runs
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
            "use cookies")
ENDS = (".", "!", "?", "。", "！", "？", "…", "؟", "।")  # of a sentence, in several scripts

# ---------------------------------------------------------------------------------------------------------
# what the rules measure


def words_and_marks(text: str) -> list[str]:
    """"It's 3.5, isn't it?" -> ["It", "'s", "3.5", ",", "is", "n't", "it", "?"]"""
    return WORD.findall(text)


def duplicates(parts: list[str]) -> tuple[int, int]:
    """(how many parts occurred before, how many characters those have): ["ab", "c", "ab"] -> (1, 2)."""
    seen, n, characters = set(), 0, 0
    for part in parts:
        if part in seen:
            n, characters = n + 1, characters + len(part)
        seen.add(part)
    return n, characters


def top_run(words: list[str], n: int) -> int:
    """Characters in all occurrences of the most frequent run of n words: (a b c a b, 2) -> 2 * len("a b")."""
    runs = Counter(" ".join(words[i:i + n]) for i in range(len(words) - n + 1))
    run, count = max(runs.items(), key=lambda item: item[1], default=("", 0))
    return len(run) * count


def repeated_runs(words: list[str], n: int) -> int:
    """Characters in runs of n words that occurred before. Each character counts once."""
    seen, characters, i = set(), 0, 0
    while i <= len(words) - n:
        run = "".join(words[i:i + n])
        if run in seen:
            characters += len(run)
            i += n
        else:
            seen.add(run)
            i += 1
    return characters


def share(parts: list[str], condition: Callable[[str], bool]) -> float:
    """The share of the parts for which condition(part) is true."""
    return sum(map(condition, parts)) / max(1, len(parts))


def first_broken(rules: Iterable[tuple[str, bool]]) -> str | None:
    """The name of the first broken rule: [("long words", False), ("hashes", True)] -> "hashes".

    The filters pass a generator, so the rules after the first broken one are never computed.
    """
    return next((name for name, broken in rules if broken), None)


# ---------------------------------------------------------------------------------------------------------
# the four filters


def gopher_repetition(text: str) -> tuple[str, str | None]:
    """Repeated paragraphs, lines and runs of words: Gopher's table A1. Slow rules come last."""
    def rules() -> Iterator[tuple[str, bool]]:
        yield "empty", not text.strip()
        size, words = len(text), words_and_marks(text)
        paragraphs, lines = re.split(r"\n{2,}", text.strip()), re.split(r"\n+", text)
        n, characters = duplicates(paragraphs)
        yield "repeated paragraphs", n / len(paragraphs) > 0.30
        yield "characters in repeated paragraphs", characters / size > 0.20
        n, characters = duplicates(lines)
        yield "repeated lines", n / len(lines) > 0.30
        yield "characters in repeated lines", characters / size > 0.20
        for n, bound in TOP.items():
            yield f"one run of {n} words", top_run(words, n) / size > bound
        for n, bound in REPEATED.items():
            yield f"repeated runs of {n} words", repeated_runs(words, n) / size > bound

    return text, first_broken(rules())


def gopher_quality(text: str) -> tuple[str, str | None]:
    """Length, and what the text consists of: Gopher's section A1.1. Any English text contains stop words."""
    words, lines = words_and_marks(text), text.splitlines()
    spoken = [word for word in words if re.search(r"\w", word)]  # without the marks
    mean = sum(map(len, spoken)) / max(1, len(spoken))
    n = max(1, len(words))

    def rules() -> Iterator[tuple[str, bool]]:
        yield "fewer than 50 words", len(spoken) < 50
        yield "more than 100,000 words", len(spoken) > 100_000
        yield "short words", mean < 3
        yield "long words", mean > 10
        yield "hashes", text.count("#") / n > 0.1
        yield "ellipses", (text.count("...") + text.count("…")) / n > 0.1
        yield "bullet points", share(lines, lambda line: line.lstrip().startswith(("•", "-"))) > 0.9
        yield "lines that trail off", share(lines, lambda line: line.rstrip().endswith(("...", "…"))) > 0.3
        yield "words without letters", share(words, lambda word: any(map(str.isalpha, word))) < 0.8
        yield "no common words", len(STOP_WORDS.intersection(words)) < 2

    return text, first_broken(rules())


def c4(text: str) -> tuple[str, str | None]:
    """Drop lines that are not sentences, and the text if fewer than five sentences remain.

    C4's rules (section 2.2), except that a line need not end with a mark."""
    kept, sentences = [], 0
    for line in text.splitlines():
        words = line.split()
        line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line.strip())
        low = line.lower()
        if len(words) < 3 or max(map(len, words)) > 1000:
            continue
        if "lorem ipsum" in low:
            return text, "lorem ipsum"
        if "{" in line:
            return text, "a curly bracket"
        if "javascript" in low or any(policy in low for policy in POLICIES):
            continue
        sentences += len(SENTENCE_END.split(line))
        kept.append(line)
    return ("\n".join(kept).strip(), None) if sentences >= 5 else (text, "fewer than 5 sentences")


def fineweb(text: str) -> tuple[str, str | None]:
    """How lines end, how long they are, and how often they repeat: FineWeb's own rules (section 3.6)."""
    lines = [line for line in text.split("\n") if line.strip()]

    def rules() -> Iterator[tuple[str, bool]]:
        yield "empty", not lines
        yield "lines without an end", share(lines, lambda line: line.endswith(ENDS)) < 0.12
        yield "short lines", share(lines, lambda line: len(line) <= 30) > 0.67
        yield "characters in repeated lines", duplicates(lines)[1] / len(text.replace("\n", "")) > 0.01
        yield "a list", text.count("\n") / len(words_and_marks(text)) > 0.3

    return text, first_broken(rules())


FILTERS = {rule.__name__: rule for rule in (gopher_repetition, gopher_quality, c4, fineweb)}

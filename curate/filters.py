"""
filters.py: is this text at all? Rules of thumb that need no model.

A crawl brings menus, lists of links, cookie notices and pages that say one thing fifty times. Each rule below
counts something that such pages have and prose has not, and compares it with the published bound:

    gopher_repetition   how much of the page repeats itself          (Rae et al. 2021, table A1)
    gopher_quality      as long as a text, made of words, with the words that every text has  (the same, A1.1)
    c4                  lines without sentences, scripts, policies   (Raffel et al. 2020, section 2.2)
    fineweb             few ends of sentences, many short lines      (Penedo et al. 2024, section 3.6)

FineWeb applies them in this order, C4's rule on the ends of lines left out. A rule returns (text, None) when
the text is kept, c4 may have taken lines out of it, or (text, reason).                    next: dedup.py
"""

import re
from collections import Counter
from collections.abc import Callable

WORD = re.compile(r"(?:[A-Za-z]\.){2,}|\w+(?=n't\b)|n't\b|'(?:s|d|m|re|ve|ll)\b|\d+(?:[.,:/]\d+)+"
                  r"|[^\W_]+(?:[./:_]+[^\W_]+)*|\.{2,}|-{2,}|~{2,}|[^\w\s]|_")
SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]]*\s+""")
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
TOP = {2: 0.20, 3: 0.18, 4: 0.16}  # n: share of characters in the most frequent run of n words
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # n: share in runs that came before
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
            "use cookies")
ENDS = (".", "!", "?", "。", "！", "？", "…", "؟", "।")  # of a sentence, in several scripts


def words_of(text: str) -> list[str]:
    """"It's 3.5, isn't it?" -> ["It", "'s", "3.5", ",", "is", "n't", "it", "?"]: punctuation counts, too."""
    return WORD.findall(text)


def repeats(parts: list[str]) -> tuple[int, int]:
    """(how many parts came before, how many characters they have)."""
    seen, n, characters = set(), 0, 0
    for part in parts:
        n, characters = (n + 1, characters + len(part)) if part in seen else (n, characters)
        seen.add(part)
    return n, characters


def most_frequent(words: list[str], n: int) -> int:
    """Characters in the most frequent run of n words, all its occurrences together."""
    runs = Counter(" ".join(words[i:i + n]) for i in range(len(words) - n + 1))
    run, count = max(runs.items(), key=lambda item: item[1], default=("", 0))
    return len(run) * count


def said_before(words: list[str], n: int) -> int:
    """Characters in runs of n words that came before; a character counts once."""
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


def share(lines: list[str], holds: Callable[[str], bool]) -> float:
    """The share of lines for which holds(line)."""
    return sum(map(holds, lines)) / max(1, len(lines))


def first(*rules: tuple[str, bool | Callable]) -> str | None:
    """The name of the first rule that is broken: [(name, broken), ...]; a rule may be a function."""
    return next((name for name, broken in rules if (broken() if callable(broken) else broken)), None)


# ---------------------------------------------------------------------------------------------------------
# the four filters


def gopher_repetition(text: str) -> tuple[str, str | None]:
    if not text.strip():
        return text, "empty"
    size, words = len(text), words_of(text)
    paragraphs, lines = re.split(r"\n{2,}", text.strip()), re.split(r"\n+", text)
    (n_paragraphs, in_paragraphs), (n_lines, in_lines) = repeats(paragraphs), repeats(lines)
    return text, first(
        ("repeated paragraphs", n_paragraphs / len(paragraphs) > 0.30),
        ("characters in repeated paragraphs", in_paragraphs / size > 0.20),
        ("repeated lines", n_lines / len(lines) > 0.30),
        ("characters in repeated lines", in_lines / size > 0.20),
        *((f"one run of {n} words", lambda n=n: most_frequent(words, n) / size > TOP[n]) for n in TOP),
        *((f"repeated runs of {n} words", lambda n=n: said_before(words, n) / size > REPEATED[n])
          for n in REPEATED))


def gopher_quality(text: str) -> tuple[str, str | None]:
    words, lines = words_of(text), text.splitlines()
    spoken = [word for word in words if re.search(r"\w", word)]
    mean = sum(map(len, spoken)) / max(1, len(spoken))
    n = max(1, len(words))
    return text, first(
        ("fewer than 50 words", len(spoken) < 50),
        ("more than 100,000 words", len(spoken) > 100_000),
        ("short words", mean < 3), ("long words", mean > 10),
        ("hashes", text.count("#") / n > 0.1),
        ("ellipses", (text.count("...") + text.count("…")) / n > 0.1),
        ("bullet points", share(lines, lambda line: line.lstrip().startswith(("•", "-"))) > 0.9),
        ("lines that trail off", share(lines, lambda line: line.rstrip().endswith(("...", "…"))) > 0.3),
        ("words without letters", share(words, lambda word: any(map(str.isalpha, word))) < 0.8),
        ("no common words", len(STOP_WORDS.intersection(words)) < 2))


def c4(text: str) -> tuple[str, str | None]:
    """Takes lines out, and the whole text if fewer than five sentences are left."""
    kept, sentences = [], 0
    for line in text.splitlines():
        words = line.split()
        line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line.strip())
        low = line.lower()
        if len(words) < 3 or max(map(len, words)) > 1000:
            continue
        if "lorem ipsum" in low or "{" in line:
            return text, "lorem ipsum" if "lorem ipsum" in low else "a curly bracket"
        if "javascript" in low or any(policy in low for policy in POLICIES):
            continue
        sentences += len(SENTENCE_END.split(line))
        kept.append(line)
    return ("\n".join(kept).strip(), None) if sentences >= 5 else (text, "fewer than 5 sentences")


def fineweb(text: str) -> tuple[str, str | None]:
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return text, "empty"
    return text, first(
        ("lines without an end", share(lines, lambda line: line.endswith(ENDS)) < 0.12),
        ("short lines", share(lines, lambda line: len(line) <= 30) > 0.67),
        ("characters in repeated lines", repeats(lines)[1] / len(text.replace("\n", "")) > 0.01),
        ("a list", text.count("\n") / len(words_of(text)) > 0.3))


FILTERS = {rule.__name__: rule for rule in (gopher_repetition, gopher_quality, c4, fineweb)}

"""
bpe.py: byte pair encoding, the lesson behind tokenizer.py.

A model reads numbers. The simplest numbering of text is its UTF-8 bytes, 256 of them, but then a page is
thousands of steps long. Byte pair encoding shortens it: find the most frequent pair of neighbours in the
training text, give the pair a number of its own, write that number wherever the pair stands, and repeat
until the vocabulary is full:

    l o w   l o w e r   n e w e r    (w, e) is the most frequent pair: it becomes "we"
    l o w   l o we r    n e we r     now (we, r) stands twice, too: it becomes "wer"
    l o w   l o wer     n e wer      ...

Pairs are never joined across the borders of words, numbers and runs of punctuation (the GPT-2 split, and
every digit alone), so that no number ever covers "dog." or " 2024".                    next: tokenizer.py
"""

import heapq
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache

from tqdm import tqdm


@cache
def byte_characters() -> list[str]:
    """A visible character for each of the 256 bytes, as in GPT-2: vocabulary files hold text, not bytes.

    Printable Latin-1 stands for itself; the others, in order, take the characters from 256 on: space -> "Ġ".
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


@cache
def splitter() -> re.Pattern[str]:
    r"""The compiled pattern that cuts text into words: "In 42, it's" -> In| |4|2|,| it|'s

    It is GPT-2's  's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+  with every
    digit as a piece of its own; the text before a digit is split as if it ended there. Python's re does not
    know \p{L} (letters) and \p{N} (numbers), and its \s is wider than Unicode's White_Space: all three are
    spelt out. The tables of letters and numbers are this Python's: a letter that Unicode took in later is
    punctuation here, though the library `tokenizers`, with newer tables, may know it.
    """
    ranges: dict[str, list] = {"L": [], "N": []}
    for code in range(sys.maxunicode + 1):
        found = ranges.get(unicodedata.category(chr(code))[0])
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        elif found is not None:
            found.append([code, code])
    letters, numbers = ("".join(rf"\U{a:08x}-\U{b:08x}" for a, b in ranges[kind]) for kind in "LN")
    space = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(rf"'(?:[stmd]|re|ve|ll)| ?[{letters}]+|[{numbers}]| ?[^{space}{letters}{numbers}]+"
                      rf"|[{space}]+(?![^{space}{numbers}])|[{space}]+")


def clean(text: str) -> str:
    """Text that UTF-8 can hold: a lone half of a surrogate pair becomes U+FFFD, as decoders make it."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each piece of the split occurs: ["to be or not to be"] -> {"to": 1, " be": 2, ...}."""
    counts, find = Counter[str](), splitter().findall
    for text in texts:
        counts.update(find(clean(text)))
    return counts


def merge(word: list, pair: tuple, new_id: int | str) -> list:
    """Write new_id for every occurrence of pair, left to right: ([5, 5, 5, 6], (5, 5), 9) -> [9, 5, 6]."""
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def count_pairs(words: list[list[int]], frequency: list[int]) -> tuple[dict, dict]:
    """How often each pair occurs, and in which words: [[5, 6]], [3] -> {(5, 6): 3}, {(5, 6): [0]}."""
    pair_counts: dict[tuple, int] = defaultdict(int)
    where: dict[tuple, list] = defaultdict(list)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += frequency[index]
            where[pair].append(index)
    return pair_counts, where


def train(counts: dict[str, int], vocab_size: int, first_id: int) -> list[tuple[int, int]]:
    """The merges [(left id, right id), ...] of byte pair encoding; the k-th creates id first_id + 256 + k.

    counts: {word: occurrences}. Ids of single bytes are first_id + the rank of the byte's visible character.
    Among equally frequent pairs the one with the smaller ids wins. Counting all pairs anew for each merge
    would take days; a merge changes only the words that contain it, so `where` remembers which these are, and
    a heap keeps the candidates sorted. A count in the heap may be out of date, but only too high: then the
    pair goes back with the lower one.
    """
    rank = {character: first_id + i for i, character in enumerate(sorted(byte_characters()))}
    byte_ids = [rank[character] for character in byte_characters()]
    words = [[byte_ids[byte] for byte in word.encode()] for word in counts]
    frequency = list(counts.values())
    pair_counts, where = count_pairs(words, frequency)
    heap = sorted((-count, pair) for pair, count in pair_counts.items())
    merges: list[tuple[int, int]] = []
    bar = tqdm(total=vocab_size - first_id - 256, desc="merges", leave=False)
    while heap and len(merges) < vocab_size - first_id - 256:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        new_id, changed = first_id + 256 + len(merges), set()
        merges.append(pair)
        for index in dict.fromkeys(where.pop(pair)):
            old, word = words[index], merge(words[index], pair, new_id)
            for neighbours in zip(old, old[1:]):
                pair_counts[neighbours] -= frequency[index]
            for neighbours in zip(word, word[1:]):
                pair_counts[neighbours] += frequency[index]
                if new_id in neighbours:
                    where[neighbours].append(index)
                    changed.add(neighbours)
            words[index] = word
        for neighbours in changed:
            heapq.heappush(heap, (-pair_counts[neighbours], neighbours))
        bar.update()
    bar.close()
    return merges


def encode(text: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Split; in each word join the pair that was merged first in training, and again, until none is left.

    ranks: {(left token, right token): position among the merges}, tokens as visible characters, as returned.
    """
    tokens = []
    for word in splitter().findall(clean(text)):
        parts = [byte_characters()[byte] for byte in word.encode()]
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
            if pair not in ranks:
                break
            parts = merge(parts, pair, pair[0] + pair[1])
        tokens += parts
    return tokens

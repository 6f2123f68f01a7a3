"""
decontaminate.py: was the exam among the homework?

A benchmark measures nothing if its questions stood in the training text. Cosmopedia's two steps find them:

    candidates     the document shares a run of ten words with a question
    confirmed      more than half of the question's characters stand in the document, in pieces and in order

The second step is slow, and rarely needed. Words are compared without case, accents and marks, and a changed
word hides a question only where it leaves no ten in a row: never in one of twenty words.

Questions of less than ten words have no such run, and Cosmopedia's steps never find them. Here they are
looked for whole, each word as it was asked; with a word changed they are not found, since any shorter run
stands in many an innocent text. Those of one to four words do so as a whole, and are left out.

    python curate.py pages.jsonl good.jsonl --steps=decontaminate --exams=hellaswag,mmlu     next: curate.py
"""

import difflib
import re
from collections.abc import Iterable

from curate.dedup import without_accents

RUN, SHORTEST = 10, 5  # words


def words_of(text: str) -> list[str]:
    """"Où est-il ?" -> ["ou", "est", "il"]"""
    return re.findall(r"\w+", without_accents(text.lower()))


def runs(words: list[str], n: int) -> set[int]:
    """The hashes of all runs of n words. A hash takes a quarter of the memory of the run, and two runs that
    had the same one by chance would only make a candidate that is not confirmed."""
    return {hash(tuple(words[i:i + n])) for i in range(len(words) - n + 1)}


def matched(question: Iterable[str], document: Iterable[str]) -> float:
    """The share of the question's characters that stand in the document, in pieces longer than five."""
    question, document = " ".join(question), " ".join(document)
    blocks = difflib.SequenceMatcher(None, question, document, autojunk=False).get_matching_blocks()
    pieces = (question[block.a:block.a + block.size].replace(" ", "") for block in blocks)
    return sum(len(piece) for piece in pieces if len(piece) > 5) / len(question.replace(" ", ""))


class Exams:
    """The texts of all benchmarks, ready to be looked for."""

    def __init__(self, texts: Iterable[str]) -> None:
        words_of_each = ((text, words_of(text)) for text in texts)
        self.texts = [(text, words) for text, words in words_of_each if len(words) >= SHORTEST]
        self.index: dict[int, list[int]] = {}  # run of words -> the questions that have it
        for number, (_, words) in enumerate(self.texts):
            for run in runs(words, min(RUN, len(words))):
                self.index.setdefault(run, []).append(number)
        self.lengths = {min(RUN, len(words)) for _, words in self.texts}

    def found_in(self, text: str) -> str | None:
        """The first question that stands in the text, or None."""
        words = words_of(text)
        candidates: set[int] = set()
        for n in self.lengths:
            candidates.update(*(self.index[run] for run in runs(words, n) & self.index.keys()))
        likely = (self.texts[i] for i in sorted(candidates))
        return next((question for question, asked in likely if matched(asked, words) > 0.5), None)

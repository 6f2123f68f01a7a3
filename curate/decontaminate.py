"""
decontaminate.py: was the exam among the homework?

A benchmark measures nothing if its questions appeared in the training text. Cosmopedia finds them in two
steps:

    candidate     the document shares a run of ten words with a question
    confirmed     more than half of the question's characters occur in the document, in order, in long pieces

The second step is slow and rarely needed. Words are compared without case, accents and marks. One changed
word hides a question only if no ten words in a row are left unchanged, which cannot happen from 20 words on.

Questions of fewer than ten words contain no such run, so Cosmopedia's steps never find them. Here the search
is for the complete question, every word unchanged, since shorter runs occur in many innocent texts. Even a
complete question of one to four words does, so those are left out.

    python -m curate pages.jsonl good.jsonl --steps=decontaminate --exams=hellaswag,mmlu

                                                                                  next: curate/classifier.py
"""

import difflib
import re
from collections.abc import Iterable

from curate.dedup import without_accents

RUN, SHORTEST = 10, 5  # words


def plain_words(text: str) -> list[str]:
    """"Où est-il ?" -> ["ou", "est", "il"]"""
    return re.findall(r"\w+", without_accents(text.lower()))


def hashed_runs(words: list[str], n: int) -> set[int]:
    """The hashes of all runs of n words. A hash takes a quarter of the memory of a run. Two runs that share
    one by chance only make a candidate that is not confirmed."""
    return {hash(tuple(words[i:i + n])) for i in range(len(words) - n + 1)}


def matched_share(question: Iterable[str], document: Iterable[str]) -> float:
    """The share of the question's characters that occur in the document, in pieces of more than five."""
    question, document = " ".join(question), " ".join(document)
    blocks = difflib.SequenceMatcher(None, question, document, autojunk=False).get_matching_blocks()
    pieces = (question[block.a:block.a + block.size].replace(" ", "") for block in blocks)
    return sum(len(piece) for piece in pieces if len(piece) > 5) / len(question.replace(" ", ""))


class Exams:
    """The questions of all benchmarks, indexed by their runs of words."""

    def __init__(self, questions: Iterable[str]) -> None:
        split = [(question, plain_words(question)) for question in questions]
        self.questions = [(question, words) for question, words in split if len(words) >= SHORTEST]
        self.lengths = {min(RUN, len(words)) for _, words in self.questions}
        self.index: dict[int, list[int]] = {}  # hashed run -> the questions that contain it
        for i, (_, words) in enumerate(self.questions):
            for run in hashed_runs(words, min(RUN, len(words))):
                self.index.setdefault(run, []).append(i)

    def found_in(self, text: str) -> str | None:
        """The first question that occurs in the text, or None."""
        words = plain_words(text)
        candidates: set[int] = set()
        for n in self.lengths:
            for run in hashed_runs(words, n) & self.index.keys():
                candidates.update(self.index[run])
        for i in sorted(candidates):
            question, asked = self.questions[i]
            if matched_share(asked, words) > 0.5:
                return question
        return None

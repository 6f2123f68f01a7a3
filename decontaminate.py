"""
decontaminate.py: was the exam among the homework?

A benchmark measures nothing if its questions stood in the training text. Cosmopedia's two steps find them:

    candidates     the document shares a run of ten words with a question
    confirmed      more than half of the question's characters stand in the document, in pieces and in order

Shorter questions than ten words are looked for whole, but those of one to four words stand in any text by
chance and are left out. The second step is slow, and rarely needed.                     next: curate.py
"""

import difflib
import re

from dedup import without_accents

RUN, SHORTEST = 10, 5  # words


def words_of(text):
    """"Où est-il ?" -> ["ou", "est", "il"]"""
    return re.findall(r"\w+", without_accents(text.lower()))


def runs(words, n):
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


def matched(question, document):
    """The share of the question's characters that stand in the document, in pieces longer than five."""
    question, document = " ".join(question), " ".join(document)
    blocks = difflib.SequenceMatcher(None, question, document, autojunk=False).get_matching_blocks()
    pieces = (question[block.a:block.a + block.size].replace(" ", "") for block in blocks)
    return sum(len(piece) for piece in pieces if len(piece) > 5) / len(question.replace(" ", ""))


class Exams:
    """The texts of all benchmarks, ready to be looked for."""

    def __init__(self, texts):
        self.words = [words for words in map(words_of, texts) if len(words) >= SHORTEST]
        self.index = {}  # run of words -> the questions that have it
        for number, words in enumerate(self.words):
            for run in runs(words, min(RUN, len(words))):
                self.index.setdefault(run, set()).add(number)
        self.lengths = {len(run) for run in self.index}

    def found_in(self, text):
        """The first question that stands in the text, as words, or None."""
        words = words_of(text)
        candidates = set()
        for n in self.lengths:
            candidates.update(*(self.index[run] for run in runs(words, n) & self.index.keys()))
        return next((self.words[i] for i in sorted(candidates) if matched(self.words[i], words) > 0.5), None)

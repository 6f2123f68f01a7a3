"""
curate/steps.py: the steps of curation, in a row.

A step takes a stream of texts, passes some of them on, and counts why it dropped the others:

    texts -> gopher_repetition -> gopher_quality -> c4 -> fineweb -> dedup -> decontaminate -> better texts

All but one look at a single text, so texts flow through one by one. dedup must see all texts before it can
pass the first one, and keeps them in a temporary file.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from curate import classifier
from curate.decontaminate import Exams
from curate.dedup import RUN, clusters, normalized
from curate.filters import FILTERS
from evals.questions import questions

STEPS = (*FILTERS, "dedup", "decontaminate")  # in FineWeb's order; classifier.LEAST names two more

Step = Callable[[Iterable[str], Counter], Iterator[str]]  # (texts, reasons for dropping) -> texts


def filtered(rule: Callable[[str], tuple[str, str | None]]) -> Step:
    """The step that passes what a rule keeps. A rule is like those of filters.py: (text, reason or None)."""
    def step(texts, dropped):
        for text in texts:
            text, reason = rule(text)
            if reason is None:
                yield text
            else:
                dropped[reason] += 1
    return step


def dedup(texts: Iterable[str], dropped: Counter) -> Iterator[str]:
    """Keep the first of each cluster of near-duplicates, and say how near the others are.

    Of texts shorter than a run of words only copies are dropped: without marks and the values of numbers,
    "2+2=4" and "3+5=8" would be the same.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        def stored():
            for text in texts:
                file.write(json.dumps(text) + "\n")
                yield text
        first = clusters(stored())
        file.seek(0)
        shared, seen = set(first[first != np.arange(len(first))].tolist()), set()
        alike: dict[int, int] = {}  # the normalized first text of each cluster
        for i, line in enumerate(file):
            text, cluster = json.loads(line), int(first[i])
            if cluster not in shared:
                yield text
                continue
            plain, key = normalized(text), (cluster, hash(text))
            alike.setdefault(cluster, hash(plain))
            if key in seen:
                dropped["a copy of an earlier one"] += 1
            elif i == cluster or len(plain.split()) < RUN:
                yield text
            elif hash(plain) == alike[cluster]:
                dropped["an earlier one except for case, spaces, marks or numbers"] += 1
            else:
                dropped["nearly the same as an earlier one"] += 1
            seen.add(key)


def decontaminate(exams: Iterable[tuple[str, str]]) -> Step:
    """The step that drops texts with a question of the built-in evaluation or of [(question, benchmark)]."""
    source = {question.text: "the evaluation" for question in questions()} | dict(exams)
    searched = Exams(source)

    def rule(text):
        found = searched.found_in(text)
        return text, None if found is None else f"a question of {source[found]}"
    return filtered(rule)


def educational(name: str, classifier_file: Path | str) -> Step:
    """The step that passes texts to which the classifier gives at least the score of this step."""
    weight, bias = classifier.load(classifier_file)

    def rule(text):
        score = int(classifier.rounded(classifier.score(text, weight, bias)))
        return text, None if score >= classifier.LEAST[name] else f"score {score}"
    return filtered(rule)


def curated(texts: Iterable[str], steps: Iterable[str], dropped: dict[str, Counter],
            classifier_file: Path | str | None = None,
            exams: Iterable[tuple[str, str]] = ()) -> Iterable[str]:
    """The texts that pass all steps. `dropped` becomes {step: Counter of reasons} while they are read."""
    for name in steps:
        if name in FILTERS:
            step = filtered(FILTERS[name])
        elif name == "dedup":
            step = dedup
        elif name == "decontaminate":
            step = decontaminate(exams)
        else:
            step = educational(name, classifier_file)
        dropped[name] = Counter()
        texts = step(texts, dropped[name])
    return texts


# ---------------------------------------------------------------------------------------------------------
# what happened


class Counted:
    """An iterable of texts that counts them and their bytes."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.n, self.bytes = texts, 0, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.n, self.bytes = self.n + 1, self.bytes + len(text.encode(errors="replace"))
            yield text


def summary(read: Counted, kept: Counted, dropped: dict[str, Counter]) -> Iterator[str]:
    """A closing table that accounts for every text, as lines."""
    yield f"{'read':44} {read.n:>12,} documents {read.bytes:>16,} bytes"
    for step, reasons in dropped.items():
        for reason, count in reasons.most_common():
            yield f"{f'  {step}: {reason}':44} {-count:>12,}"
    yield f"{'kept':44} {kept.n:>12,} documents {kept.bytes:>16,} bytes"

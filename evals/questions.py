"""
evals/questions.py: what the built-in model is asked, and when an answer is right.

Most of it was held out of training (corpus/held_out.py): new wordings, capitals that no chat ever named, sums
whose results were never stated. Two of the seven groups were seen: "hello and 1+1=" and "one-digit sums,
seen". They show what memory alone can do.

An answer is right if it contains what a right answer must contain: "...the capital of France. It is Paris."
Whether it also ends in time is judged separately (evals/answers.py).                next: evals/__main__.py
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from corpus.chats import NUMBERS, slots_of_sum
from corpus.documents import expand, load, plans
from corpus.held_out import is_held_out, known_countries, result

MUST = {"greeting": r"\b(Hello|Hi)!", "thanks": r"\bwelcome\b", "who": r"\bSmol\b"}


@dataclass(frozen=True)
class Question:
    """A question, what a right answer must match, and how many sentences are enough to answer it."""

    group: str
    text: str
    must: str
    sentences: int = 3

    def is_right(self, answer: str) -> bool:
        return bool(re.search(self.must, answer))


def sums(group: str, kind: str, held_out: bool, wordings: list[str], n: int | None) -> Iterator[Question]:
    """n sums and differences of a kind (None: all of them). The wordings take turns."""
    left, right = NUMBERS[kind]
    every = {(a, op, b) for x in range(left[0], left[1] + 1) for y in range(right[0], right[1] + 1)
             for a, op, b in ((x, "+", y), (y, "+", x), (x, "-", y)) if op == "+" or a >= b}
    chosen = sorted(numbers for numbers in every if is_held_out(*numbers) == held_out)
    chosen = random.Random(group).sample(chosen, n or len(chosen))
    for i, (a, op, b) in enumerate(chosen):
        text = expand(wordings[i % len(wordings)], slots_of_sum(a, op, b), {}, random)
        yield Question(group, text, rf"(?<!\d){result(a, op, b)}\D*$")  # the last number of the answer


def questions() -> list[Question]:
    """Every question of the built-in evaluation, always the same ones."""
    wordings = {topic: beats[0] for _, topic, _, beats in plans("questions")}
    asked = [Question("hello and 1+1=", "hello", MUST["greeting"]),
             Question("hello and 1+1=", "1+1=", r"(?<!\d)2\D*$")]
    for topic, must in MUST.items():
        asked += [Question("greetings, thanks, who are you", text, must) for text in wordings[topic]]
    countries = known_countries(load("facts.json")["countries"], held_out=True)
    for i, (country, capital, _) in enumerate(countries):
        text = expand(wordings["capital"][i % len(wordings["capital"])], {"country": country}, {}, random)
        asked.append(Question("capitals known from documents only", text, rf"\b{capital}\b", sentences=2))
    return [*asked,
            *sums("one-digit sums, seen", "small", False, wordings["small"], None),
            *sums("one-digit sums, held out", "small", True, wordings["small"], None),
            *sums("one-digit with two-digit, held out", "mixed", True, wordings["mixed"], 60),
            *sums("two-digit sums, held out", "large", True, wordings["large"], 100)]

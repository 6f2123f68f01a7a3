"""
evals/questions.py: what the built-in model is asked, and when an answer is right.

Most of it was held out of training (corpus/held_out.py): new wordings, capitals that no chat ever named, sums
that training never asks or states on their own. Two of the eight groups were seen: "hello and 1+1=" and
"one-digit sums, seen". They show what memory alone can do. Each group holds out one thing: the numbers of
"two-digit sums, held out" are new and the wordings known; in "sums in unseen wordings" it is the other way
round.

An answer is right if it contains what a right answer must contain: "...the capital of France. It is Paris."
Whether it also ends in time is judged separately (evals/answers.py).                next: evals/__main__.py
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from corpus.chats import NUMBERS, Exchanges, slots_of_sum
from corpus.documents import expand, load, plans
from corpus.held_out import is_held_out, known_countries, result, wordings

IN_SIGNS = 4  # the first wordings of the topic "sum": 47+38=
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


def last_number(value: int) -> str:
    return rf"(?<!\d){value}\D*$"


def sums(group: str, size: str, held_out: bool, ways: list[str], n: int | None) -> Iterator[Question]:
    """n sums and differences of a size (None: all of them). The ways to ask take turns."""
    left, right = NUMBERS[size]
    every = {(a, op, b) for x in range(left[0], left[1] + 1) for y in range(right[0], right[1] + 1)
             for a, op, b in ((x, "+", y), (y, "+", x), (x, "-", y)) if op == "+" or a >= b}
    chosen = sorted(numbers for numbers in every if is_held_out(*numbers) == held_out)
    chosen = random.Random(group).sample(chosen, n or len(chosen))
    for i, (a, op, b) in enumerate(chosen):
        text = expand(ways[i % len(ways)], slots_of_sum(a, op, b), {}, random)
        yield Question(group, text, last_number(result(a, op, b)))


def sums_in_words(ways: list[str], n: int) -> Iterator[Question]:
    """n sums of all sizes, typed as people type. The ways to ask take turns, with numbers that fit."""
    people = Exchanges("evaluation")
    for i in range(n):
        text = ""
        while not text:  # "Add 5 and 4." fits no difference
            slots = people.draw("numbers")
            text = people.say([ways[i % len(ways)]], slots, user=True)
        right = result(slots["a"], slots["op"], slots["b"])
        yield Question("sums in unseen wordings", text, last_number(right))


def questions() -> list[Question]:
    """Every question of the built-in evaluation, always the same ones."""
    topics = {topic: beats[0] for _, topic, _, beats in plans("chats")}
    unseen = {topic: wordings(topic, lines, held_out=True) for topic, lines in topics.items()}
    asked = [Question("hello and 1+1=", "hello", MUST["greeting"]),
             Question("hello and 1+1=", "1+1=", last_number(2))]
    rng, signs = random.Random("questions"), topics["sum"][:IN_SIGNS]
    for topic, must in MUST.items():
        asked += [Question("greetings, thanks, who are you", expand(line, {}, {}, rng), must)
                  for line in unseen[topic]]
    countries = known_countries(load("facts.json")["countries"], held_out=True)
    for i, (country, capital, _) in enumerate(countries):
        text = expand(unseen["capital"][i % len(unseen["capital"])], {"country": country}, {}, rng)
        asked.append(Question("capitals known from documents only", text, rf"\b{capital}\b", sentences=2))
    return [*asked,
            *sums("one-digit sums, seen", "small", False, signs, None),
            *sums("one-digit sums, held out", "small", True, signs, None),
            *sums("one-digit with two-digit, held out", "mixed", True, signs, 60),
            *sums("two-digit sums, held out", "large", True, signs, 100),
            *sums_in_words(unseen["sum_in_words"] + unseen["sum_in_letters"], 100)]

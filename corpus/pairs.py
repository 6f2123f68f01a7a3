"""
pairs.py: one question, two answers, and which one is meant to be preferred.

The chosen answer comes from chats.py. The rejected one has a fault that a model could make:

    wrong      ... Its capital is Oslo.                   rambling   ... is Paris. There is more to ...
    lazy       Look it up yourself.                       going on   ... is Paris. User: And then? ...
    rude       What a silly question.                     cut off    You ask about
    elsewhere  Let x be a real number. (SmolLM-Instruct v0.1 answered "hello" like this)

Rambling answers are long and lazy ones are short, and a model could learn "shorter is better" and nothing
else. So a pair is used only together with one of the opposite lengths (balanced): one of 30 and 80 characters
waits for one of 80 and 30. Chosen and rejected answers are then equally long on average, and as often long.

    python -m corpus.pairs --show=5                                      next: dpo.py
"""

import argparse
import itertools
import random
import re
from collections.abc import Iterable, Iterator

from corpus.chats import Exchanges, messages
from corpus.held_out import result

PAIRS, CLASS = 2400, 8  # how many pairs; the width of a class of lengths, in characters
# the slot of each topic whose value can be wrong
FACT = {"capital": "capital", "country": "country", "continent": "continent", "opposite": "opposite",
        "colour": "shade", "mixture": "mixed", "day": "tomorrow", "daybefore": "yesterday", "month": "later",
        "length": "length", "unit": "count", "food": "food", "home": "home"}
IN_TWO = {"Russia", "Turkey", "Kazakhstan", "Egypt"}  # continents
RAMBLING = ["There is much more to say about it.", "As I said before, it is like that.", "Where was I?",
            "And so on and so on.", "But let us begin at the beginning, for this is a long matter.",
            "One thing leads to another, and I could go on for hours.", "Yes, yes.",
            "By the way, this reminds me of that.", "In other words, it is what it is.",
            "To make a long story short, it is long."]
GOING_ON = ["User: And then?", "User: Go on.", "Assistant: Yes.", "User: What else?", "Assistant: I go on.",
            "User: I see.", "Assistant: And then there is more."]
ELSEWHERE = ["Let x be a real number.", "Then f(x) is continuous.", "We integrate both sides.",
             "The matrix is symmetric, and so its eigenvalues are real.", "Consider the equation y = x + c.",
             "The proof is left to the reader.", "By induction, the claim holds for every n."]
# None of these begins with "I" or "You", as right answers do: DPO would lower the probability of that word
# everywhere. Of 80 questions like "who are you?", 77 were answered right before DPO, 60 after it with lines
# like "I do not know." among these, and 69 without (one run).
RUDE = ["What a silly question.", "Leave me alone.", "Go away!", "Why do you ask me such stupid things?",
        "Nobody wants to talk to you. Ask somebody else.", "Every child knows that, you fool.",
        "Such a stupid question, and I will not waste my time on somebody like you.", "No.",
        "Be quiet! I have no time for you. Nobody wants to hear what you have to say."]
LAZY = ["No idea.", "Not sure.", "Look it up yourself.", "Maybe.", "Too long to explain here.",
        "Sure, but not now, since there is nothing in it for me.", "Perhaps."]


def wrong(slots: dict, topic: str, answer: str, other_slots: dict, rng: random.Random) -> str | None:
    """The answer with a wrong value in place of the right one, or None if no value is surely wrong."""
    if "op" in slots:
        number = result(slots["a"], slots["op"], slots["b"])
        other = rng.choice([number + d for d in (-10, -2, -1, 1, 2, 10) if number + d >= 0])
        return f"{answer[:answer.rindex(str(number))]}{other}."
    key = FACT.get(topic)
    if key is None or other_slots.get(key, slots[key]) == slots[key]:
        return None
    right, value = str(slots[key]), str(other_slots[key])
    if topic in ("food", "home") and stems(right) & stems(value) or slots.get("country") in IN_TWO:
        return None  # "Most horses eat grass" is true, and so is "Russia is in Asia"
    if answer.startswith(right[0].upper() + right[1:]):
        return value[0].upper() + value[1:] + answer[len(right):]
    return answer.replace(right, value)


def stems(text: str) -> set[str]:
    """The first three letters of the words: "grass and hay" -> {"gra", "hay"}."""
    return {word[:3] for word in re.findall(r"\w{3,}", text) if word not in ("and", "the")}


def a_few(sentences: list[str], rng: random.Random) -> str:
    return " ".join(rng.sample(sentences, rng.randint(1, 4)))


def faults(exchange: tuple, same: tuple | None, rng: random.Random) -> dict[str, str | None]:
    """{fault: answer} for an exchange; `same` is another exchange of its topic.

    A fault never adds anything true: the model would unlearn it.
    """
    topic, slots, (_, answer) = exchange
    words = answer.split()
    part = " ".join(words[:rng.randint(1, max(1, len(words) - 1))]).rstrip(".")
    return {"wrong": wrong(slots, topic, answer, same[1], rng) if same else None,
            "rambling": f"{answer} {a_few(RAMBLING, rng)}", "going on": f"{answer} {a_few(GOING_ON, rng)}",
            "rude": rng.choice(RUDE), "lazy": rng.choice(LAZY), "elsewhere": a_few(ELSEWHERE, rng),
            "cut off": part if len(words) > 4 else None}


def faulty(exchanges: Iterable[tuple], rng: random.Random) -> Iterator[tuple[str, str, str, str]]:
    """(fault, question, chosen, rejected) without end."""
    last: dict[str, tuple] = {}
    for exchange in exchanges:
        topic, _, (question, answer) = exchange
        made = faults(exchange, last.get(topic), rng)
        last[topic] = exchange
        fault = rng.choice([name for name, text in made.items() if text and text != answer])
        yield fault, question, answer, made[fault]


def balanced(candidates: Iterable[tuple]) -> Iterator[tuple]:
    """The candidates whose answers are equally long, and of the others two at a time, of opposite lengths."""
    waiting: dict[tuple[int, int], list] = {}
    for candidate in candidates:
        chosen, rejected = (len(text) // CLASS for text in candidate[2:])
        opposite = waiting.get((rejected, chosen))
        if chosen == rejected:
            yield candidate
        elif opposite:
            yield opposite.pop()
            yield candidate
        else:
            waiting.setdefault((chosen, rejected), []).append(candidate)


def pairs(seed: int | str, n: int = PAIRS, held_out: bool = False) -> Iterator[dict]:
    """n pairs {"chosen": messages, "rejected": messages, "fault": ...}; held_out as in chats.Exchanges."""
    rng = random.Random(f"pairs {seed}")
    exchanges = iter(Exchanges(f"pairs {seed}", held_out))
    for fault, question, chosen, rejected in itertools.islice(balanced(faulty(exchanges, rng)), n):
        yield {"chosen": messages([question, chosen]), "rejected": messages([question, rejected]),
               "fault": fault}


def main() -> None:
    parser = argparse.ArgumentParser(description="Print some preference pairs of the built-in corpus.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=5, help="how many")
    args = parser.parse_args()
    for pair in pairs(args.seed, args.show):
        print(f"user      {pair['chosen'][0]['content']}\nchosen    {pair['chosen'][1]['content']}\n"
              f"rejected  {pair['rejected'][1]['content']}    ({pair['fault']})\n{'-' * 80}")


if __name__ == "__main__":
    main()

"""
chats.py: conversations from which a model learns to answer.

The plans in chats.txt are like those of documents.py: a topic, its seed and its weight, then what the user
may say and what the assistant answers. Two exchanges with their slots filled in:

    user       What is the opposite of hot?            user       47+38=
    assistant  The opposite of hot is cold.            assistant  47 + 38: ones 7 + 8 = 15, tens 4 + 3 ...

Every answer first repeats what it is about: "You ask about France. Its capital is Paris." Copying the
country's name is one skill, shared by all questions about countries. Looking up the capital can then start
from the copied name.

A conversation is a few exchanges in a row, in the schema of most chat data sets:

    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hello! ..."}]}

Other draws of the same exchanges go into pretraining as plain text (transcripts), since the web is full of
questions and answers, too. A pretrained model then has seen answers before sft.py teaches it to give them.

    python -m corpus.chats --show=3                                      next: sft.py
"""

import argparse
import itertools
import json
import random
import re
from collections.abc import Collection, Iterable, Iterator

from corpus.documents import deal, load, plans, write
from corpus.held_out import is_held_out, known_countries, result, wordings
from corpus.seeds import Seeds

CHATS, TRANSCRIPTS = 10_000, 8000
SYSTEM = ["You are a helpful assistant.", "You are Smol, a friendly assistant.", "Answer in a few words.",
          "You are a helpful and polite assistant.", "You are a small language model. Help the user."]
POSTS = "king queen president singer captain poet painter mayor champion doctor".split()
AREAS = ("the north", "the south", "the east", "the west", "the mountains", "the islands")
ENDINGS = ("", "", "nia", "land", "ton", "stan", "ria", "burg", "ville", "n", "s")
# with small sums: what SmolLM-Instruct v0.1 was never taught
SMALL_TALK = ("hello greeting name who skills thanks goodbye feeling both mood glad bored joke small "
              "sum_in_letters one_and_one").split()
NUMBERS = {"small": ((0, 9), (0, 9)), "mixed": ((10, 99), (0, 9)), "large": ((10, 99), (10, 99))}
SHARES = {"small": 32, "mixed": 36, "large": 60}  # of the sums: the longer the way, the more examples
WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
         "sixteen seventeen eighteen").split()


def worked(a: int, op: str, b: int) -> str:
    """The way to a result, a digit at a time, as by hand: a model has no paper except its own words. For each
    token it writes it has one pass through its layers; a carry that is written down, the next pass can read.

    47 + 38: ones 7 + 8 = 15, tens 4 + 3 + 1 = 8. The answer is 85.
    52 - 17: ones 12 - 7 = 5, tens 5 - 1 - 1 = 3. The answer is 35.

    The task is repeated first. It looks different in every question (47+38=, 47 plus 38). In this copy the
    digits are always in the same places.
    """
    if max(a, b) <= 9 or (op == "-" and b <= 9 and a - b <= 9):
        return f"{a} {op} {b} = {result(a, op, b)}."  # a single step
    (ta, oa), (tb, ob) = divmod(a, 10), divmod(b, 10)
    borrow, carry = op == "-" and oa < ob, op == "+" and oa + ob > 9
    oa += 10 * borrow
    tens = f"{ta} {op} {tb}" + f" {op} 1" * (carry or borrow)
    value = result(ta, op, tb) + carry - borrow
    return (f"{a} {op} {b}: ones {oa} {op} {ob} = {result(oa, op, ob)}, tens {tens} = {value}. "
            f"The answer is {result(a, op, b)}.")


def slots_of_sum(a: int, op: str, b: int) -> dict:
    """{a} {op} {b}. Only a sum has {first} and {second}, only a difference {part} to take from {whole}."""
    numbers = {"a": a, "b": b} | ({"first": a, "second": b} if op == "+" else {"whole": a, "part": b})
    words = {f"{name}word": WORDS[n] for name, n in numbers.items()} if max(a, b) < len(WORDS) else {}
    opword = {"+": "plus", "-": "minus"}[op]
    return {**numbers, **words, "op": op, "opword": opword, "worked": worked(a, op, b)}


class Exchanges:
    """Yields (topic, slots, [user, assistant, ...]) without end. Topics and seeds are dealt like cards.

    held_out: only what training never says. without: topics to leave out, and sizes of NUMBERS.
    """

    def __init__(self, seed: int | str, held_out: bool = False, without: Collection[str] = ()) -> None:
        self.rng = random.Random(f"chats {seed}")
        self.phrases, facts = load("phrases.json"), load("facts.json")
        self.seeds = Seeds(facts, self.phrases, self.rng)
        self.held_out, self.known = held_out, known_countries(facts["countries"], held_out)
        self.countries = [row[0] for row in facts["countries"]]
        self.words = sorted(set(re.findall(r"\b[a-z]{3,}\b", json.dumps([facts, self.phrases]))))
        self.sizes = [size for size in NUMBERS if size not in without]
        cards = [(topic, subject, [said, *answers]) for _, topic, subject, (lines, *answers) in plans("chats")
                 if topic not in without and (said := wordings(topic, lines, held_out))]
        self.deck = deal(cards, None, self.rng)

    def __iter__(self) -> Iterator[tuple[str, dict, list[str]]]:
        for topic, subject, beats in self.deck:
            slots = self.seeds.cast() if subject == "-" else self.draw(subject)
            yield topic, slots, [self.say(beat, slots, i % 2 == 0) for i, beat in enumerate(beats)]

    def draw(self, subject: str) -> dict:
        """The slots of one seed, never one that is held out, or only these."""
        if subject == "numbers":
            subject, = self.rng.choices(self.sizes, [SHARES[size] for size in self.sizes])
        if subject in NUMBERS:
            return self.numbers(subject)
        if subject == "known":
            return self.seeds.countries(1, self.known)
        if subject == "repeat":
            words = [self.word() for _ in range(self.rng.randint(2, 6))]
            return {"phrase": self.rng.choice((", ", " ")).join(words)}
        if subject == "reading":  # reading comprehension: the facts are invented and given in the question
            land, land2 = self.rng.sample([self.invented(), *self.countries], 2)
            return {"land": land, "land2": land2, "town": self.invented(), "town2": self.invented(),
                    "post": self.rng.choice(POSTS), "area": self.rng.choice(AREAS)}
        if subject == "function":
            return self.seeds.next("function", self.seeds.facts["functions"])
        return self.seeds.draw(subject, 1)

    def word(self) -> str:
        """A name, a country, an invented word, any word: for a phrase that can only be copied."""
        people = self.phrases["people"]
        pools = (self.countries, self.words, people["girl"] + people["boy"])
        return self.rng.choice(self.rng.choice(pools)) if self.rng.random() < 0.8 else self.invented()

    def invented(self) -> str:
        """A name that does not exist: "Zanulia"."""
        return "".join(self.rng.choice("b d f g k l m n p r s t v z br dr gr kl st th".split())
                       + self.rng.choice("a e i o u ai ou".split())
                       for _ in range(self.rng.randint(2, 3))).capitalize() + self.rng.choice(ENDINGS)

    def numbers(self, size: str) -> dict:
        """The slots of a sum or a difference. Of small numbers, what is added is also subtracted: 7 + 8 and
        15 - 7."""
        left, right = NUMBERS[size]
        while True:
            a, b, op = self.rng.randint(*left), self.rng.randint(*right), self.rng.choice("+-")
            if op == "-" and size == "small":
                a += b
            if op == "+" and self.rng.random() < 0.5:
                a, b = b, a
            if (op == "+" or a >= b) and is_held_out(a, op, b) == self.held_out:
                return slots_of_sum(a, op, b)

    def say(self, beat: list[str], slots: dict, user: bool) -> str:
        """One message. CODE keeps its line breaks."""
        text = write([beat], slots, self.phrases["phrases"], self.rng).replace("CODE", slots.get("code", ""))
        return self.typed(text) if user and not {"phrase", "land"} & slots.keys() else text

    def typed(self, text: str) -> str:
        """As people type: some leave out capitals, the full stop or an apostrophe, and some write "!!"."""
        lower, bare, joined, loud = (self.rng.random() < chance for chance in (0.25, 0.25, 0.25, 0.1))
        text = text.lower() if lower else text
        text = text.replace("'", "") if joined else text
        text = re.sub(r"[.!]$", "!!", text) if loud else text
        return text.rstrip(".?! ") if bare else text


def messages(turns: Iterable[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def chats(seed: int | str, n: int = CHATS, without: Collection[str] = ()) -> Iterator[dict]:
    """n conversations of one to four exchanges, one in six with a system message before them."""
    exchanges = iter(Exchanges(f"chats {seed}", without=without))
    rng = random.Random(f"lengths {seed}")
    for _ in range(n):
        length = rng.choice((1, 1, 1, 2, 2, 3, 4))
        turns = [text for _, _, texts in itertools.islice(exchanges, length) for text in texts]
        system = [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < 1 / 6 else []
        yield {"messages": system + messages(turns)}


def transcripts(seed: int, n: int = TRANSCRIPTS) -> Iterator[str]:
    """n conversations as plain text, a few exchanges each."""
    exchanges, rng = iter(Exchanges(f"transcripts {seed}")), random.Random(f"pages {seed}")
    for _ in range(n):
        length = rng.randint(2, 7)
        turns = [text for _, _, texts in itertools.islice(exchanges, length) for text in texts]
        yield "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages(turns))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print some conversations of the built-in corpus.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=5, help="how many")
    args = parser.parse_args()
    for chat in chats(args.seed, args.show):
        for message in chat["messages"]:
            print(f"{message['role']:9}  {message['content']}")
        print("-" * 80)


if __name__ == "__main__":
    main()

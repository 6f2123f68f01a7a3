"""
seeds.py: what a document is about.

A plan in documents.py has slots, such as {country} or {animal2}. Here facts.json and phrases.json become the
values that fill them:

    "countries": [["France", "Paris", "Europe"], ...]   ->   {"country": "France", "capital": "Paris", ...}

Facts are dealt like cards from a shuffled deck, and a deck is used up before it is shuffled again. So every
country is written about equally often, which independent draws would not give.
"""

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

from corpus.held_out import is_held_out, known_countries

PRONOUNS = {"girl": ("she", "her", "her", "herself"), "boy": ("he", "him", "his", "himself")}
LISTS = {"animal": "animals", "season": "seasons", "profession": "professions"}
COLUMNS = {  # conditions on a and b; oa and ob are their ones digits
    "add": lambda a, b, oa, ob: a + b < 100 and oa + ob < 10,
    "carry": lambda a, b, oa, ob: a + b < 100 and oa + ob >= 10,
    "take": lambda a, b, oa, ob: a > b and oa >= ob,
    "borrow": lambda a, b, oa, ob: a > b and oa < ob,
}


def pronouns(role: str, child: str) -> dict[str, str]:
    """("e", "girl") -> {"ehe": "she", "ehim": "her", "ehis": "her", "ehimself": "herself"}."""
    return dict(zip((role + x for x in PRONOUNS["boy"]), PRONOUNS[child]))


class Seeds:
    """Deals what documents are about. Every subject has a deck of its own."""

    def __init__(self, facts: dict, phrases: dict, rng: random.Random) -> None:
        self.facts, self.phrases, self.rng = facts, phrases, rng
        self.decks: dict[str, list] = {}
        self.known = known_countries(facts["countries"])
        # chats never name a third of the capitals, so documents name them four times as often
        self.country_deck = facts["countries"] + 3 * known_countries(facts["countries"], held_out=True)

    def next(self, name: str, cards: list) -> Any:
        """The next card of the deck called `name`, shuffled again when it is used up."""
        if not self.decks.get(name):
            self.decks[name] = self.rng.sample(cards, len(cards))
        return self.decks[name].pop()

    def several(self, name: str, cards: list, n: int, start: Iterable = ()) -> list:
        """n different cards, of which `start` are given."""
        got = list(start)
        while len(got) < n:
            card = self.next(name, cards)
            if card not in got:
                got.append(card)
        return got

    def cast(self) -> dict:
        """Who and what may occur in one document: a child, a friend, an elder, and things."""
        people, rng = self.phrases["people"], self.rng
        bound: dict[str, str] = {}
        for who, role in (("name", ""), ("friend", "f")):
            child = rng.choice(("girl", "boy"))
            name = rng.choice([n for n in people[child] if n != bound.get("name")])
            bound |= {who: name, role + "child": child}
            bound |= pronouns(role, child)
        for who, role in (("elder", "e"), ("", "w")):  # w: the worker, whom the seed names
            child = rng.choice(("girl", "boy"))
            bound |= pronouns(role, child)
            bound |= {who: rng.choice(people["elder " + child])} if who else {}
        return bound | self.flat(self.phrases["things"])

    def flat(self, table: dict) -> dict:
        """{'spot': ['a', 'b']} -> {'spot1': 'b', 'spot2': 'a', 'spot': 'b'}: numbered in a random order."""
        bound: dict = {}
        for key, value in table.items():
            if isinstance(value, list):
                values = self.rng.sample(value, min(5, len(value)))
                bound |= {f"{key}{i}": v for i, v in enumerate(values, 1)} | {key: values[0]}
            else:
                bound[key] = value
        return bound

    def draw(self, subject: str, n_countries: int) -> dict:
        """The slots of one seed. The subject is the word for it in the heading of a plan."""
        methods = {"animals": self.animals, "opposites": self.opposites, "colours": self.colors,
                   "mixture": self.mixture, "unit": self.unit, "calendar": self.calendar, "sizes": self.sizes,
                   "sums": self.sums, "minus": self.sums}
        if subject == "-":
            return {}
        if subject in self.phrases["seeds"]:
            return self.flat(self.next(subject, self.phrases["seeds"][subject]))
        if subject in ("countries", "continent"):
            return self.countries(n_countries, self.country_deck, near=subject == "continent")
        if subject == "capitals":  # a quiz, which must not ask for what is held out
            return self.countries(n_countries, self.known)
        if subject in LISTS:
            n = 2 if subject == "profession" else 1
            return self.numbered(self.several(subject, self.facts[LISTS[subject]], n))
        if subject in COLUMNS:
            return self.column(COLUMNS[subject])
        return methods[subject]()

    def countries(self, n: int, deck: list, near: bool = False) -> dict:
        """country1, capital1, continent1, country2, ...; near: all on the same continent."""
        start = self.next(f"country {len(deck)}", deck)
        pool = [row for row in deck if row[2] == start[2]] if near else deck
        rows = self.several(f"country {len(pool)}" + (start[2] if near else ""), pool, n, [start])
        return self.numbered([dict(zip(("country", "capital", "continent"), row)) for row in rows])

    def numbered(self, rows: list[dict]) -> dict:
        """[{"unit": "metre"}, {"unit": "day"}] -> {"unit": "metre", "unit1": "metre", "unit2": "day"}."""
        bound = dict(rows[0])
        for i, row in enumerate(rows, 1):
            bound |= {f"{key}{i}": value for key, value in row.items()}
        return bound

    def animals(self) -> dict:
        """Three animals of clearly different size, the largest first."""
        while True:
            rows = [self.next("animals", self.facts["animals"]) for _ in range(3)]
            rows.sort(key=lambda row: -row["size"])
            if rows[0]["size"] - 1 > rows[1]["size"] and rows[1]["size"] - 1 > rows[2]["size"]:
                return self.numbered(rows)

    def opposites(self) -> dict:
        pairs = self.several("opposites", self.facts["opposites"], 6)
        return self.numbered([{"word": a, "opposite": b} for a, b in pairs])

    def colors(self) -> dict:
        pairs = self.several("colours", self.facts["colours"], 6)
        return self.numbered([{"thing": a, "shade": b} for a, b in pairs])

    def mixture(self) -> dict:
        return dict(zip(("first", "second", "mixed"), self.next("mixture", self.facts["mixtures"])))

    def unit(self) -> dict:
        keys = ("unit", "units", "count", "part", "parts", "measures")
        rows = self.several("unit", self.facts["units"], 2)
        return self.numbered([dict(zip(keys, row)) for row in rows])

    def calendar(self) -> dict:
        """Days and months with those before and after, three of each."""
        days, months = self.facts["days"], self.facts["months"]
        rows = []
        for d, m in zip(self.rng.sample(range(7), 3), self.rng.sample(range(12), 3)):
            rows.append({"day": days[d], "tomorrow": days[(d + 1) % 7], "yesterday": days[d - 1],
                         "month": months[m][0], "length": months[m][1], "later": months[(m + 1) % 12][0],
                         "earlier": months[m - 1][0]})
        return self.numbered(rows)

    def sizes(self) -> dict:
        """Four things, the largest first, each clearly smaller than the one before."""
        rows = sorted(self.facts["sizes"], key=lambda row: -row[1])
        while True:
            four = self.rng.sample(rows, 4)
            four.sort(key=lambda row: -row[1])
            if all(a[1] - b[1] >= 2 for a, b in itertools.pairwise(four)):
                return {f"large{i}": name for i, (name, _) in enumerate(four, 1)}

    def sums(self) -> dict:
        """Small sums and differences that are worth knowing by heart."""
        bound = {}
        pairs = [(a, b) for a in range(11) for b in range(11) if not is_held_out(a, "+", b)]
        pairs = self.rng.sample(pairs, 12)
        for i, (a, b) in enumerate(pairs, 1):
            bound[f"sum{i}"], bound[f"minus{i}"] = f"{a} + {b} = {a + b}", f"{a + b} - {a} = {b}"
        return bound

    def column(self, fits: Callable[[int, int, int, int], bool]) -> dict:
        """a and b of two digits, their sum and their difference; t and o are the tens and ones digits."""
        while True:
            a, b = self.rng.randint(11, 98), self.rng.randint(11, 88)
            (ta, oa), (tb, ob) = divmod(a, 10), divmod(b, 10)
            op = "-" if a > b else "+"
            stated = (a, "+", b), (a, op, b), (a, op, tb * 10), (a - tb * 10, op, ob), (a + b, "+", 1)
            if fits(a, b, oa, ob) and not any(is_held_out(*numbers) for numbers in stated):
                break
        near = {"round_a": round(a, -1), "round_b": round(b, -1), "round_sum": round(a, -1) + round(b, -1)}
        return self.sums() | near | {
            "a": a, "b": b, "ta": ta, "oa": oa, "tb": tb, "ob": ob, "ones": oa + ob, "tens": ta + tb,
            "sum": a + b, "to": (a + b) // 10, "oo": (a + b) % 10, "more": a + b + 1,
            "rest": a - b, "rt": (a - b) // 10, "ro": (a - b) % 10, "big": oa + 10, "less": ta - 1,
            "b_tens": tb * 10, "step_one": a - tb * 10}

"""
documents.py: a small world to learn from.

A corpus for a tiny model can be written like Cosmopedia was, in three choices: WHAT a document is about (the
seed: a country, an animal, a lost kite), for WHOM (the audience) and in which FORM. There a large model turned the
three into text. Here a plan does, a few lines of templates that any reader can change:

    ## children lost 2                     audience, seed, and how often (a deck of plans has two cards of this one)
    [One|On a] {weather} day, {name} ...   a beat: its lines are alternatives, one of them is used
    3 of                                   a beat that opens with a number uses that many, in any order

    [a|b]    one of these      {toy}    the seed's toy      {weather}    a phrase, chosen anew at every use

A model that has seen a sentence a hundred times can answer by copying. So every sentence has several places that
vary independently, and few runs of 13 words are ever written twice; facts are what stays the same.

    python corpus/documents.py --kind=world --show=3        next: sources.py
"""
import argparse
import ast
import itertools
import json
import random
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

HERE = Path(__file__).parent
KINDS = ("world", "code", "docs")
FORMATS = {"story": 4500, "textbook": 3100, "article": 2500, "example": 1000, "howto": 500}  # documents
PRONOUNS = {"girl": ("she", "her", "her", "herself"), "boy": ("he", "him", "his", "himself")}
WITHOUT_SEED = {"boat", "hands", "letter", "map", "road", "room", "salad", "sandwich", "save", "seed", "shelf", "snowman", "teeth"}
TOKEN = re.compile(r"\[([^\[\]]*)\]|\{(\w+)\}")                       # an innermost [choice] or a {slot}
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip", "idle_test"}
CODE_FILE, CODE_BYTES, DOCS_CHARS = 100_000, 4_000_000, 200


def documents(kind, seed):
    """Every document of one kind, in an order shuffled by the seed: the same seed, the same bytes."""
    assert kind in KINDS, f"there is no kind {kind!r}, only {', '.join(KINDS)}"
    if kind == "world":
        return (text for _, _, text in world(seed))
    found = sorted(code() if kind == "code" else docs())
    random.Random(f"{kind} {seed}").shuffle(found)
    return limited(found, CODE_BYTES)


# --- the world: seed x audience x format -> document ------------------------------------------------------------

def world(seed):
    """(format, audience, text) for every document of the world; none is ever written twice."""
    rng = random.Random(f"world {seed}")
    facts, phrases = load("facts.json"), load("phrases.json")
    turns = [plan for form, n in FORMATS.items() for plan in deal(plans(form), n, rng)]
    rng.shuffle(turns)
    seeds, seen = Seeds(facts, phrases, rng), set()
    for form, audience, subject, beats in turns:
        drawn = seeds.draw(subject, max(map(int, re.findall(r"\{(?:country|capital)(\d+)", str(beats))), default=1))
        while True:
            text = write(beats, {**seeds.cast(), **drawn}, phrases["phrases"], rng)
            if text not in seen and not repeats(text):
                break
        seen.add(text)
        yield form, audience, text


def load(name):
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def deal(cards, n, rng):
    """n cards from shuffled decks: all cards come equally often (up to one)."""
    decks = (rng.sample(cards, len(cards)) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(decks), n)


def plans(form):
    """The plans in one text file, as (format, audience, subject, beats)."""
    found = []
    for part in re.split(r"^## ", (HERE / f"{form}.txt").read_text(encoding="utf-8"), flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        audience, subject, *cards = head.split()
        plan = form, audience, subject, [beat.splitlines() for beat in body.strip("\n").split("\n\n")]
        found += [plan] * int(*cards or [1])
    return found


def write(beats, bound, phrases, rng):
    """One document: from each beat an alternative whose facts we have, filled in, with its small words mended."""
    parts = []
    for beat in beats:
        wanted, lines = 1, beat
        if re.fullmatch(r"\d+ of", beat[0]):
            wanted, lines = int(beat[0].split()[0]), beat[1:]
        lines = [x for x in lines if all(s.lower() in bound or s.lower() in phrases for s in re.findall(r"\{(\w+)\}", x))]
        parts += [expand(line, bound, phrases, rng) for line in rng.sample(lines, min(wanted, len(lines)))]
    return mend(" ".join(parts))


def expand(line, bound, phrases, rng):
    """'a [big|small] {toy}' -> 'a small kite'. A slot with a capital gives its words a capital."""
    def fill(match):
        choice, slot = match.groups()
        if choice is not None:
            return rng.choice(choice.split("|"))
        key = slot.lower()
        value = str(bound[key]) if key in bound else rng.choice(phrases[key])
        return value if slot == key else value[0].upper() + value[1:]
    while TOKEN.search(line):
        line = TOKEN.sub(fill, line)
    return line


def mend(text):
    """What templates cannot know: line ends, single spaces, a or an, and a capital where a sentence begins."""
    text = re.sub(r" *(/+) *", lambda m: "\n" * len(m[1]), re.sub(r" +", " ", text)).strip()
    text = re.sub(r"\b1 (ten|one)s\b", r"1 \1", text)
    text = re.sub(r"\b([Aa])n? (?=(\w+))", lambda m: m[1] + ("n " if vowel(m[2]) else " "), text)
    return re.sub(r"(^|\n|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def vowel(word):
    """Does the word begin with the sound of a vowel? apple, hour; not uniform, Europe, one."""
    return bool(re.match(r"hour|honest|(?!uni[^n]|us[eu]|eu|one\b|once\b)[aeiou]", word.lower()))


def repeats(text, n=8):
    """Does a run of n words occur twice?"""
    words = re.findall(r"[\w']+", text.lower())
    runs = list(zip(*(words[i:] for i in range(n))))
    return len(set(runs)) < len(runs)


class Seeds:
    """What documents are about. Every subject has its own deck, so that all its facts come equally often."""

    def __init__(self, facts, phrases, rng):
        self.facts, self.phrases, self.rng, self.decks = facts, phrases, rng, {}

    def next(self, name, cards):
        """The next card of the deck called name; a new shuffle when it is used up."""
        if not self.decks.get(name):
            self.decks[name] = self.rng.sample(cards, len(cards))
        return self.decks[name].pop()

    def several(self, name, cards, n, start=()):
        """n different cards, the first one given or drawn."""
        got = list(start)
        while len(got) < n:
            card = self.next(name, cards)
            if card not in got:
                got.append(card)
        return got

    def cast(self):
        """Who and what may occur in a document: a child, a friend, an elder, and things that stay the same."""
        people, rng = self.phrases["people"], self.rng
        bound = {}
        for who, role in (("name", ""), ("friend", "f")):
            child = rng.choice(("girl", "boy"))
            name = rng.choice([n for n in people[child] if n != bound.get("name")])
            bound |= {who: name, role + "child": child}
            bound |= dict(zip((role + x for x in ("he", "him", "his", "himself")), PRONOUNS[child]))
        for who, role in (("elder", "e"), ("", "w")):                    # w: the one who works, named by the seed
            child = rng.choice(("girl", "boy"))
            bound |= dict(zip((role + x for x in ("he", "him", "his", "himself")), PRONOUNS[child]))
            bound |= {who: rng.choice(people["elder " + child])} if who else {}
        return bound | self.flat(self.phrases["things"])

    def flat(self, table):
        """{'spot': ['a', 'b']} -> {'spot1': 'b', 'spot2': 'a', 'spot': 'b'}: numbered in a random order."""
        bound = {}
        for key, value in table.items():
            if isinstance(value, list):
                some = self.rng.sample(value, min(5, len(value)))
                bound |= {f"{key}{i}": v for i, v in enumerate(some, 1)} | {key: some[0]}
            else:
                bound[key] = value
        return bound

    def draw(self, subject, n_countries):
        """The slots of one seed."""
        if subject in self.phrases["seeds"]:
            return self.flat(self.next(subject, self.phrases["seeds"][subject]))
        if subject in ("countries", "capitals", "continent"):
            return self.countries(n_countries, near=subject == "continent")
        if subject in WITHOUT_SEED:
            return {}
        return getattr(self, subject)()                                  # animal, season, ...: the methods below

    def countries(self, n, near=False):
        """country1, capital1, continent1, country2, ...; near: all in the same continent."""
        every = self.facts["countries"]
        start = self.next("country", every)
        pool = [row for row in every if row[2] == start[2]] if near else every
        rows = self.several("country " + (start[2] if near else ""), pool, n, [start])
        return self.numbered([dict(zip(("country", "capital", "continent"), row)) for row in rows])

    def numbered(self, rows):
        """Slots of several rows side by side; those of the first row also go without a number."""
        bound = dict(rows[0])
        for i, row in enumerate(rows, 1):
            bound |= {f"{key}{i}": value for key, value in row.items()}
        return bound

    def animal(self):
        return self.numbered(self.several("animal", self.facts["animals"], 1))

    def animals(self):
        """Three animals of clearly different size, the largest first."""
        while True:
            rows = sorted((self.next("animals", self.facts["animals"]) for _ in range(3)), key=lambda a: -a["size"])
            if rows[0]["size"] - 1 > rows[1]["size"] and rows[1]["size"] - 1 > rows[2]["size"]:
                return self.numbered(rows)

    def profession(self):
        return self.numbered(self.several("profession", self.facts["professions"], 2))

    def season(self):
        return self.numbered(self.several("season", self.facts["seasons"], 1))

    def opposites(self):
        return self.numbered([{"word": a, "opposite": b} for a, b in self.several("opp", self.facts["opposites"], 6)])

    def colours(self):
        return self.numbered([{"thing": a, "shade": b} for a, b in self.several("col", self.facts["colours"], 6)])

    def mixture(self):
        return dict(zip(("first", "second", "mixed"), self.next("mixture", self.facts["mixtures"])))

    def unit(self):
        keys = ("unit", "units", "count", "part", "parts", "measures")
        return self.numbered([dict(zip(keys, row)) for row in self.several("unit", self.facts["units"], 2)])

    def calendar(self):
        """Days and months with their neighbours, numbered so that two questions can be asked."""
        days, months = self.facts["days"], self.facts["months"]
        rows = []
        for d, m in zip(self.rng.sample(range(7), 3), self.rng.sample(range(12), 3)):
            rows.append({"day": days[d], "tomorrow": days[(d + 1) % 7], "yesterday": days[d - 1],
                         "month": months[m][0], "length": months[m][1], "later": months[(m + 1) % 12][0],
                         "earlier": months[m - 1][0]})
        return self.numbered(rows)

    def sizes(self):
        """Four things, largest first, each clearly smaller than the one before."""
        rows = sorted(self.facts["sizes"], key=lambda row: -row[1])
        while True:
            some = self.rng.sample(rows, 4)
            some.sort(key=lambda row: -row[1])
            if all(a[1] - b[1] >= 2 for a, b in itertools.pairwise(some)):
                return {f"large{i}": name for i, (name, _) in enumerate(some, 1)}

    def sums(self):
        """Small sums and differences that are worth knowing by heart."""
        bound = {}
        for i in range(1, 15):
            a, b = self.rng.randint(0, 10), self.rng.randint(0, 10)
            bound[f"sum{i}"], bound[f"minus{i}"] = f"{a} + {b} = {a + b}", f"{a + b} - {a} = {b}"
        return bound

    def column(self, fits):
        """a and b of two digits, their sum and difference, tens (t) and ones (o) apart."""
        while True:
            a, b = self.rng.randint(11, 98), self.rng.randint(11, 88)
            (ta, oa), (tb, ob) = divmod(a, 10), divmod(b, 10)
            if fits(a, b, oa, ob):
                break
        near = {"round_a": round(a, -1), "round_b": round(b, -1), "round_sum": round(a, -1) + round(b, -1)}
        return self.sums() | near | {
            "a": a, "b": b, "ta": ta, "oa": oa, "tb": tb, "ob": ob, "ones": oa + ob, "tens": ta + tb,
            "sum": a + b, "to": (a + b) // 10, "oo": (a + b) % 10, "more": a + b + 1,
            "rest": a - b, "rt": (a - b) // 10, "ro": (a - b) % 10, "big": oa + 10, "less": ta - 1,
            "b_tens": tb * 10, "step_one": a - tb * 10}

    def add(self):
        return self.column(lambda a, b, oa, ob: a + b < 100 and oa + ob < 10)

    def carry(self):
        return self.column(lambda a, b, oa, ob: a + b < 100 and oa + ob >= 10)

    def take(self):
        return self.column(lambda a, b, oa, ob: a - b > 0 and oa >= ob)

    def borrow(self):
        return self.column(lambda a, b, oa, ob: a - b > 0 and oa < ob)

    def minus(self):
        return self.sums()


# --- code and docs: the standard library --------------------------------------------------------------------------

def library():
    """The standard library's own source files in the order of their names, each as text."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        folders = path.relative_to(root).parts[:-1]
        if all(x.isidentifier() and x not in LEFT_OUT for x in folders) and path.stat().st_size <= CODE_FILE:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:                                  # a few old files are in Latin-1
                pass


def code():
    """Whole source files, without tables: a program defines something, and nobody generated it."""
    for text in library():
        if re.search(r"^\s*(def|class) ", text, flags=re.M) and "generated" not in text[:500]:
            yield text


def docs():
    """What help() says: the language topics, and the docstrings of modules (parsed, never imported)."""
    found = list(topics.values())
    for text in library():
        found.append(ast.get_docstring(ast.parse(text)) or "")
    return [text.strip() + "\n" for text in found if len(text) >= DOCS_CHARS and prose(text)]


def prose(text):
    """Is most of it sentences, and not indented examples or lists of names?"""
    lines = [line for line in text.splitlines() if re.match(r"\w.* \w+ \w+ ", line)]
    return sum(map(len, lines)) > len(text) / 2


def limited(texts, n_bytes):
    """Texts until n_bytes are full."""
    for text in texts:
        n_bytes -= len(text.encode("utf-8"))
        if n_bytes < 0:
            return
        yield text


def main():
    parser = argparse.ArgumentParser(description="Print some documents of the built-in corpus.")
    parser.add_argument("--kind", choices=KINDS, default="world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=5, help="how many documents")
    args = parser.parse_args()
    for text in itertools.islice(documents(args.kind, args.seed), args.show):
        print(text, end="\n\n" + "-" * 80 + "\n\n")


if __name__ == "__main__":
    main()

"""
documents.py: a small world to learn from.

A corpus for a tiny model can be written like Cosmopedia was, in three choices: WHAT a document is about (the
seed: a country, an animal, a lost kite), for WHOM (the audience) and in which FORM. There a large model
turned the three into text. Here a plan does, a few lines of templates that any reader can change:

    ## children lost 2                     audience, seed, and how many cards it has in the deck of plans (1)
    [One|On a] {weather} day, {name} ...   a beat: its lines are alternatives, one of them is used
    3 of                                   a beat that opens with a number uses that many, in any order

    [a|b]    one of these      {toy}    the seed's toy      {weather}    a phrase, chosen anew at every use

A model that has seen a sentence a hundred times can answer by copying. So every sentence has several places
that vary independently, and few runs of 13 words are ever written twice; facts are what stays the same.

    python -m corpus.documents --kind=world --show=3        next: sources.py
"""
import argparse
import ast
import itertools
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

from corpus.held_out import told
from corpus.seeds import Seeds

HERE = Path(__file__).parent
KINDS = ("world", "code", "docs")
FORMATS = {"story": 1300, "textbook": 4200, "article": 2800, "example": 1500, "howto": 400}  # documents
TOKEN = re.compile(r"\[([^\[\]]*)\]|\{(\w+)\}")                       # an innermost [choice] or a {slot}
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data",
            "ensurepip"}
CODE_FILE, CODE_BYTES, DOCS_CHARS = 100_000, 4_000_000, 200


def documents(kind: str, seed: int) -> Iterator[str]:
    """Every document of one kind, in an order shuffled by the seed: the same seed, the same bytes."""
    assert kind in KINDS, f"there is no kind {kind!r}, only {', '.join(KINDS)}"
    if kind == "world":
        return (text for _, _, text in world(seed))
    found = sorted(code() if kind == "code" else docs())
    random.Random(f"{kind} {seed}").shuffle(found)
    return (text for text in limited(found, CODE_BYTES) if not told(text))


# --- the world: seed x audience x format -> document ---

def world(seed: int) -> Iterator[tuple[str, str, str]]:
    """(format, audience, text) for every document of the world; none is ever written twice."""
    rng = random.Random(f"world {seed}")
    facts, phrases = load("facts.json"), load("phrases.json")
    turns = [plan for form, n in FORMATS.items() for plan in deal(plans(form), n, rng)]
    rng.shuffle(turns)
    seeds, seen = Seeds(facts, phrases, rng), set()
    for form, audience, subject, beats in turns:
        countries = map(int, re.findall(r"\{(?:country|capital)(\d+)", str(beats)))
        drawn = seeds.draw(subject, max(countries, default=1))
        while True:
            text = write(beats, {**seeds.cast(), **drawn}, phrases["phrases"], rng)
            if text not in seen and not repeats(text):
                break
        seen.add(text)
        yield form, audience, text


def load(name: str) -> dict:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def deal(cards: list, n: int | None, rng: random.Random) -> Iterator:
    """n cards (None: without end) from shuffled decks: all cards come equally often, up to one."""
    decks = (rng.sample(cards, len(cards)) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(decks), n)


def plans(form: str) -> list[tuple[str, str, str, list[list[str]]]]:
    """The plans in one text file, as (format, audience, subject, beats)."""
    found = []
    for part in re.split(r"^## ", (HERE / f"{form}.txt").read_text(encoding="utf-8"), flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        audience, subject, *cards = head.split()
        plan = form, audience, subject, [beat.splitlines() for beat in body.strip("\n").split("\n\n")]
        found += [plan] * int(*cards or [1])
    return found


def write(beats: Sequence[list[str]], bound: dict, phrases: dict, rng: random.Random) -> str:
    """One document: from each beat an alternative whose slots we have, filled in and mended."""
    parts = []
    for beat in beats:
        wanted, lines = 1, beat
        if re.fullmatch(r"\d+ of", beat[0]):
            wanted, lines = int(beat[0].split()[0]), beat[1:]
        lines = [x for x in lines if all(s.lower() in bound | phrases for s in re.findall(r"\{(\w+)\}", x))]
        parts += [expand(line, bound, phrases, rng) for line in rng.sample(lines, min(wanted, len(lines)))]
    return mend(" ".join(parts))


def expand(line: str, bound: dict, phrases: dict, rng: random.Random | ModuleType) -> str:
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


def mend(text: str) -> str:
    """What templates cannot know: line ends, spaces, plurals, a or an, a capital where a sentence begins."""
    text = re.sub(r" *(/+) *", lambda m: "\n" * len(m[1]), re.sub(r" +", " ", text)).strip()
    text = re.sub(r"\b1 (ten|one)s\b", r"1 \1", re.sub(r"\b([Ff]ish)s\b", r"\1", text))
    text = re.sub(r"\b([Aa])n? (?=(\w+))", lambda m: m[1] + ("n " if vowel(m[2]) else " "), text)
    return re.sub(r"(^|\n|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def vowel(word: str) -> bool:
    """Does the word begin with the sound of a vowel? apple, hour; not uniform, Europe, one."""
    return bool(re.match(r"hour|honest|(?!uni[^n]|us[eu]|eu|one\b|once\b)[aeiou]", word.lower()))


def repeats(text: str, n: int = 8) -> bool:
    """Does a run of n words occur twice?"""
    words = re.findall(r"[\w']+", text.lower())
    runs = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(runs)) < len(runs)


# --- code and docs: the standard library ---

def library() -> Iterator[str]:
    """The standard library's own source files in the order of their names, each as text."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        folders = path.relative_to(root).parts[:-1]
        if all(x.isidentifier() and x not in LEFT_OUT for x in folders) and path.stat().st_size <= CODE_FILE:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:                                  # a few old files are in Latin-1
                pass


def code() -> Iterator[str]:
    """Source files without tables: a program defines something, and nobody generated it. The docstring of
    the module is left out: it belongs to docs(), and what is held out there must not stand here."""
    for text in library():
        if re.search(r"^\s*(def|class) ", text, flags=re.M) and "generated" not in text[:500]:
            tree = ast.parse(text)
            if ast.get_docstring(tree) is not None:
                lines, first = text.splitlines(keepends=True), tree.body[0]
                text = "".join(lines[:first.lineno - 1] + lines[first.end_lineno:]).lstrip()
            yield text


def docs() -> set[str]:
    """What help() says: the language topics, and the docstrings of modules (parsed, never imported)."""
    found = [*topics.values(), *(ast.get_docstring(ast.parse(text)) or "" for text in library())]
    return {text.strip() + "\n" for text in found if len(text) >= DOCS_CHARS and prose(text)}


def prose(text: str) -> bool:
    """Are there sentences in it, and not only examples and lists of names?"""
    lines = [line for line in text.splitlines() if re.match(r"\w.* \w+ \w+ ", line)]
    return sum(map(len, lines)) > len(text) / 5


def limited(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """Texts until n_bytes are full."""
    for text in texts:
        n_bytes -= len(text.encode("utf-8"))
        if n_bytes < 0:
            return
        yield text


def main() -> None:
    parser = argparse.ArgumentParser(description="Print some documents of the built-in corpus.")
    parser.add_argument("--kind", choices=KINDS, default="world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=5, help="how many documents")
    args = parser.parse_args()
    for text in itertools.islice(documents(args.kind, args.seed), args.show):
        print(text, end="\n\n" + "-" * 80 + "\n\n")


if __name__ == "__main__":
    main()

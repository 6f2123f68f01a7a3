"""
documents.py: a small world to learn from.

Cosmopedia, the synthetic textbooks in SmolLM's corpus, was written by a large model from three choices: WHAT
a document is about (the seed: a country, an animal, a lost kite), for WHOM it is (the audience) and in which
FORM. A corpus for a tiny model can be made from the same choices with a plan, a few lines of templates that
any reader can change (story.txt, textbook.txt, ...):

    ## children lost 2                     audience, seed, and weight: used twice as often (default 1)
    [One|On a] {weather} day, {name} ...   a beat: its lines are alternatives, and one of them is used
                                           an empty line ends the beat
    3 of                                   a beat that starts with a number uses that many, in any order

    [a|b]    one of these      {toy}    the seed's toy      {weather}    a phrase, chosen again at each use
    /        a line break      //       a paragraph break

A model that has seen a sentence a hundred times can answer by copying. So every sentence has several places
that vary independently, and few runs of 13 words are ever written twice. Only the facts stay the same.

    python -m corpus.documents --kind=world --show=3                     next: corpus/held_out.py
"""

import argparse
import ast
import itertools
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import lru_cache
from inspect import cleandoc
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

from corpus.held_out import stated_sums
from corpus.seeds import Seeds

HERE = Path(__file__).parent
KINDS = ("world", "code", "docs")
FORMATS = {"story": 1300, "textbook": 4200, "article": 2800, "example": 1500, "howto": 400}  # documents
TOKEN = re.compile(r"\[([^\[\]]*)\]|\{(\w+)\}")  # an innermost [choice] or a {slot}
# of the standard library: folders that are not read, bytes of the longest file, bytes of all texts of a kind,
# characters of the shortest docstring
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip"}
CODE_FILE, CODE_BYTES, DOCS_CHARS = 100_000, 4_000_000, 200
# a module's docstring: (the comments before it)(a string in three quotes), and the end of its line
DOCSTRING = re.compile(r'((?:[ \t]*(?:#.*)?\n)*)'
                       r'([rR]?("{3}|\'{3})(?:\\[\s\S]|(?!\3)[^\\])*\3)[ \t]*(?:#.*)?\n')


def documents(kind: str, seed: int) -> Iterator[str]:
    """Every document of one kind, in an order shuffled by the seed. The same seed gives the same bytes."""
    assert kind in KINDS, f"there is no kind {kind!r}, only {', '.join(KINDS)}"
    if kind == "world":
        return (text for _, _, text in world(seed))
    found = sorted(code() if kind == "code" else docs())
    random.Random(f"{kind} {seed}").shuffle(found)
    return (text for text in limited(found, CODE_BYTES) if not stated_sums(text))


# ---------------------------------------------------------------------------------------------------------
# the world: seed x audience x format -> document


def world(seed: int) -> Iterator[tuple[str, str, str]]:
    """(format, audience, text) for every document of the world. No document is written twice.

    Seeds (corpus/seeds.py) deals the facts of a subject, and a cast of people, places and moods.
    """
    rng = random.Random(f"world {seed}")
    facts, phrases = load("facts.json"), load("phrases.json")
    deck = [plan for form, n in FORMATS.items() for plan in deal(plans(form), n, rng)]
    rng.shuffle(deck)
    seeds, seen = Seeds(facts, phrases, rng), set()
    for form, audience, subject, beats in deck:
        drawn = seeds.draw(subject, countries_needed(beats))
        while True:
            text = write(beats, {**seeds.cast(), **drawn}, phrases["phrases"], rng)
            if text not in seen and not repeats(text):
                break
        seen.add(text)
        yield form, audience, text


def load(name: str) -> dict:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def deal(cards: list, n: int | None, rng: random.Random) -> Iterator:
    """n cards (None: without end) from shuffled decks, so that all cards come equally often, within one."""
    decks = (rng.sample(cards, len(cards)) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(decks), n)


def plans(form: str) -> list[tuple[str, str, str, list[list[str]]]]:
    """The plans in a text file, as (format, audience, subject, beats). A plan of weight 2 is listed twice."""
    found = []
    for part in re.split(r"^## ", (HERE / f"{form}.txt").read_text(encoding="utf-8"), flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        audience, subject, *weight = head.split()
        beats = [beat.splitlines() for beat in body.strip("\n").split("\n\n")]
        found += [(form, audience, subject, beats)] * (int(weight[0]) if weight else 1)
    return found


def countries_needed(beats: Iterable[Iterable[str]]) -> int:
    """How many countries a plan writes about: 3 if {country3} or {capital3} has its largest number."""
    text = "\n".join(line for beat in beats for line in beat)
    return max(map(int, re.findall(r"\{(?:country|capital)(\d+)", text)), default=1)


def write(beats: Iterable[list[str]], bound: dict, phrases: dict, rng: random.Random) -> str:
    """One document: from each beat an alternative whose slots all have a value, with these values."""
    known = bound.keys() | phrases.keys()
    parts = []
    for beat in beats:
        n, lines = 1, beat
        if counted := re.fullmatch(r"(\d+) of", beat[0]):
            n, lines = int(counted[1]), beat[1:]
        lines = [line for line in lines if set(re.findall(r"\{(\w+)\}", line.lower())) <= known]
        chosen = rng.sample(lines, min(n, len(lines)))
        parts += [expand(line, bound, phrases, rng) for line in chosen]
    return tidy(" ".join(parts))


def expand(line: str, bound: dict, phrases: dict, rng: random.Random | ModuleType) -> str:
    """'a [big|small] {toy}' -> 'a small kite'. {Toy}, with a capital letter, becomes 'Kite'."""

    def fill(match: re.Match) -> str:
        choice, slot = match.groups()
        if choice is not None:
            return rng.choice(choice.split("|"))
        key = slot.lower()
        value = str(bound[key]) if key in bound else rng.choice(phrases[key])
        return value if slot == key else value[0].upper() + value[1:]

    while TOKEN.search(line):
        line = TOKEN.sub(fill, line)
    return line


def tidy(text: str) -> str:
    """Correct what templates cannot know: line breaks, spaces, plurals, a or an, capitals of sentences."""
    text = re.sub(r" *(/+) *", lambda m: "\n" * len(m[1]), re.sub(r" +", " ", text)).strip()
    text = re.sub(r"\b1 (ten|one)s\b", r"1 \1", re.sub(r"\b([Ff]ish)s\b", r"\1", text))
    text = re.sub(r"\b([Aa])n? (?=(\w+))", lambda m: m[1] + ("n " if vowel(m[2]) else " "), text)
    return re.sub(r"(^|\n|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)


def vowel(word: str) -> bool:
    """Whether a word begins with the sound of a vowel: apple and hour do; uniform, Europe and one do not."""
    return bool(re.match(r"hour|honest|(?!uni[^n]|us[eu]|eu|one\b|once\b)[aeiou]", word.lower()))


def repeats(text: str, n: int = 8) -> bool:
    """Whether a run of n words occurs twice in a text."""
    words = re.findall(r"[\w']+", text.lower())
    runs = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(runs)) < len(runs)


# ---------------------------------------------------------------------------------------------------------
# code and docs: Python's standard library; skip the rest at a first reading


@lru_cache(1)  # code and documentation are read together
def library() -> list[str]:
    """The texts of the standard library's source files, in the order of their names."""
    root, texts = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        folders = path.relative_to(root).parts[:-1]
        if all(x.isidentifier() and x not in LEFT_OUT for x in folders) and path.stat().st_size <= CODE_FILE:
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:  # a few old files are in Latin-1
                pass
    return texts


def code() -> Iterator[str]:
    """Source files that define something and were not generated, which leaves out tables. The docstring of
    a module is removed: it belongs to docs(), and what is held out there must not appear here."""
    for text in library():
        if re.search(r"^\s*(def|class) ", text, flags=re.M) and "generated" not in text[:500]:
            if found := DOCSTRING.match(text):
                text = (found[1] + text[found.end():]).lstrip()
            yield text


def docs() -> set[str]:
    """What help() prints: the language topics, and the docstrings of modules (read, never imported)."""
    heads = (DOCSTRING.match(text) for text in library())
    found = [*topics.values(), *(cleandoc(ast.literal_eval(head[2])) for head in heads if head)]
    return {text.strip() + "\n" for text in found if len(text) >= DOCS_CHARS and prose(text)}


def prose(text: str) -> bool:
    """Whether a text has sentences, and not only examples and lists of names."""
    lines = [line for line in text.splitlines() if re.match(r"\w.* \w+ \w+ ", line)]
    return sum(map(len, lines)) > len(text) / 5


def limited(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """The first texts, as many as fit into n_bytes."""
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

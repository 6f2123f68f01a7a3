"""
prompts.py: what a writer of textbooks is asked for, one page at a time.

Cosmopedia was written by a large model. Asked a thousand times for "a textbook page", a model writes nearly
the same page a thousand times. The prompt makes the pages differ. It is composed of

    seed      the first 1,000 characters of some page: what to write about
    topic     in half of the prompts; in the others the seed must be enough
    audience  young children, middle school, college, professionals
    format    textbook, story, article (of a blog), howto, example (worked)
    style     a further wish, such as: let it end well; half a page is enough

prompts.txt has several wordings of each. The seeds come from your own pages, or are notes about the world of
seeds.py. The built-in writer answers only prompts with such notes, from the templates of documents.py and the
slots that filled the notes.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from config import Config
from corpus.documents import FORMATS, countries_needed, deal, load, plans, repeats, write
from corpus.files import text_of
from corpus.seeds import Seeds
from corpus.sources import Documents

AUDIENCES = {"children": 2, "middle": 4, "college": 3, "professionals": 1}  # tenths, much as in Cosmopedia v2
SEED_CHARS = 1000


@dataclass(frozen=True)
class Prompt:
    """What a writer gets. The plan (beats) and the slots (bound) are only for the built-in writer."""

    text: str
    format: str
    audience: str
    style: str
    seed_data: str
    beats: tuple = ()
    bound: dict | None = None

    @property
    def id(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def wordings() -> dict[tuple[str, str], list[list[str]]]:
    """The beats of prompts.txt: {("audience", "children"): beats, ("seed", "lost"): beats, ...}."""
    return {(kind, name): beats for _, kind, name, beats in plans("prompts")}


def fill_in(parts: dict, form: str, audience: str, extract: str, topic: str,
            rng: random.Random) -> tuple[str, str]:
    """(prompt, style): a request for this format and audience, about this extract and topic.

    Both are filled in last, since a page may contain what looks like a slot or a choice.
    """
    style = rng.choice([name for kind, name in parts if kind == form])
    named = {"request": ("request", form), "style": (form, style), "audience": ("audience", audience)}
    bound = {slot: write(parts[part], {}, {}, rng) for slot, part in named.items()}
    text = write(parts["prompt", "topic" if topic and rng.random() < 0.5 else "plain"], bound, {}, rng)
    values = {"extract": extract, "topic": topic}
    return re.sub("<(extract|topic)>", lambda match: values[match[1]], text), style


def builtin_prompts(seed: int) -> Iterator[Prompt]:
    """Prompts without end about the world of facts.json and phrases.json, for all plans of documents.py.

    Plans for adults are used for college students and for professionals.
    """
    rng, parts = random.Random(f"prompts {seed}"), wordings()
    facts, phrases = load("facts.json"), load("phrases.json")
    seeds = Seeds(facts, phrases, rng)
    deck = [plan for name in FORMATS for plan in plans(name)]
    for form, audience, subject, beats in deal(deck, None, rng):
        audience = rng.choice(("college", "professionals")) if audience == "adults" else audience
        bound = seeds.cast() | seeds.draw(subject, countries_needed(beats))
        name, *notes = parts["seed", subject]
        if form == "howto":  # the title says what the instructions are for
            bound["title"] = write(beats[:1], bound, phrases["phrases"], rng)
            beats, name = [[bound["title"] + "//"], *beats[1:]], ["{title}"]
            notes = parts["seed", "-"][1:] + (notes if subject != "-" else [])
        topic, extract = (write(part, bound, {}, rng) for part in ([name], notes))
        text, style = fill_in(parts, form, audience, extract, topic, rng)
        yield Prompt(text, form, audience, style, extract, tuple(beats), bound)


def page_prompts(source: str, seed: int) -> Iterator[Prompt]:
    """A prompt for each page of a source with a column "text", and maybe "topic".

    Formats and audiences are dealt from a deck of all combinations.
    """

    def item(row: dict | str) -> tuple[str, str] | str:
        text = text_of(row)[:SEED_CHARS].strip().encode(errors="replace").decode()
        topic = row.get("topic") if isinstance(row, dict) else None
        return (text, topic if isinstance(topic, str) else "") if text else ""  # "" is a bad record

    rng, parts = random.Random(f"prompts {seed}"), wordings()
    deck = [(form, audience) for form in FORMATS for audience, n in AUDIENCES.items() for _ in range(n)]
    pages = Documents(source, Config(), item=item)
    for (extract, topic), (form, audience) in zip(pages, deal(deck, None, rng)):
        text, style = fill_in(parts, form, audience, extract, topic, rng)
        yield Prompt(text, form, audience, style, extract)


def distinct(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    """Each prompt once."""
    ids = set()
    for prompt in prompts:
        if prompt.id not in ids:
            ids.add(prompt.id)
            yield prompt


def built_in(prompt: Prompt) -> str:
    """The built-in writer's answer, which depends only on the prompt."""
    rng, phrases = random.Random(prompt.id), load("phrases.json")["phrases"]
    while repeats(text := write(prompt.beats, prompt.bound, phrases, rng)):
        pass
    return text

"""
crawl.py: what a crawl contains, in miniature.

Anyone who stores the web page by page finds a few good texts among much else. Here the good ones are the
plain articles of the built-in world, and 70% of the bytes are noise of six kinds:

    boilerplate  cookie notices, menus, log-in pages     shuffled   articles with words or sentences mixed
    spam         advertising, lists of keywords          truncated  articles that break off, pages of teasers
    copy         an article of the crawl again,          wrong      articles in which Paris may be the capital
                 a few words changed                                of Japan; they read as well as the others

Each page is labeled with its kind, so one can count what a filter finds (docs/data_quality.md). Boilerplate
and spam are written from corpus/crawl.txt by the templates of corpus/documents.py.

    python -m curate.crawl --show=50 [--kind=spam]                                next: curate/experiment.py
"""

import argparse
import itertools
import random
import re
from collections.abc import Iterator

from corpus.documents import countries_needed, deal, load, plans, repeats, write
from corpus.seeds import Seeds
from plumbing.processes import command

SHARES = {"clean": 30, "boilerplate": 15, "spam": 15, "copy": 15, "shuffled": 10, "truncated": 5,
          "wrong": 10}  # percent of the bytes, fixed before any model was trained
SCORES = {"clean": 3, "boilerplate": 0, "spam": 0, "copy": 3, "shuffled": 0, "truncated": 1,
          "wrong": 3}  # for classifier.py: the scores of an annotator who does not look facts up
PAGE = 120  # a page has at least this many words
POPULAR = 8  # all copies are made of one in 8 articles
CHANGED = 0.01  # share of a copy's words that are changed
SLOTS = {name: words.split(", ") for name, words in {
    "site": "bestdeals24, our-town-news.com, travelworld, kitchen-and-home, petforum.net, myblog, "
            "shop4you, the daily page, gamezone, healthline-plus, cityguide, oldbooks.org, photo-share",
    "menu": "Home, About us, Contact, News, Products, Services, Gallery, Forum, Shop, Blog, Events, Links, "
            "Downloads, Sitemap, Jobs, Press, Help, FAQ, Videos, Sports, Travel, Weather, Health, Recipes, "
            "Offers, Newsletter, Support, Team, History, Partners, Archive, Fashion, Cars, Music",
    "user": "admin, Mike77, sunny_girl, guest, J. Smith, happycustomer, webmaster, Kate, Bob_1, traveller",
    "engine": "PressWord, SiteMaker, PageBuilder, FreeBlog, QuickShop",
    "product": "watches, shoes, handbags, phones, sofas, mattresses, vitamins, diet pills, insurance, loans, "
               "sunglasses, printers, ink, car tyres, perfume, headphones, carpets, curtains, e-books, "
               "casino bonus, web hosting, tickets, laptops, batteries, coupons, furniture, jewellery",
    "script": "function show() { return 0; }, body { color: #222 }, .menu { width: 100% }, "
              "document.write(\"JavaScript\"), {{ page.title }}, <div class=\"ad\">",
    "phone": "0800 555 123, 555 0199, 0900 12 34 56, 555 0142", "year": "2009, 2012, 2015, 2018, 2021",
    "date": "3 May 2012, 12.11.2015, 2018-04-30, Jan 7 2009, 21 August 2021, 9.2.2018"}.items()}
SLOTS["number"] = [str(n) for n in range(2, 100)]


# ---------------------------------------------------------------------------------------------------------
# the articles


def pages_of(form: str, rng: random.Random, wrong: bool = False) -> Iterator[str]:
    """Endless pages of a format of documents.py. wrong: every document is about a world of its own, whose
    facts are mixed up.

    The published filters are made for prose of a hundred words or more, so documents with lists are left out,
    and short ones are joined until they have PAGE words. Blank lines and titles of one or two words are
    removed, as a text extractor or C4's rules would do. docs/data_quality.md says what happened without this.
    """
    facts, phrases, seen, page = load("facts.json"), load("phrases.json"), set(), []
    seeds = Seeds(facts, phrases, rng)
    for _, _, subject, beats in deal(plans(form), None, rng):
        if wrong:
            seeds = Seeds(mixed_up(facts, rng), phrases, rng)
        drawn = seeds.draw(subject, countries_needed(beats))
        text = write(beats, {**seeds.cast(), **drawn}, phrases["phrases"], rng)
        text = "\n".join(line for line in text.splitlines() if len(line.split()) > 2)
        if text not in seen and len(text.split()) > 12 * len(text.splitlines()) and not repeats(text):
            seen.add(text)
            page.append(text)
        if sum(len(part.split()) for part in page) >= PAGE:
            yield "\n".join(page)
            page = []


def mixed_up(facts: dict, rng: random.Random) -> dict:
    """The facts, with all columns but the first in a random order: France has Tokyo, which is in Africa."""
    mixed = dict(facts)
    for name in ("countries", "colours", "mixtures"):
        first, *others = zip(*facts[name])
        columns = [rng.sample(column, len(column)) for column in others]
        mixed[name] = [list(row) for row in zip(first, *columns)]
    for name in ("animals", "professions"):
        mixed[name] = [dict(row) for row in facts[name]]
        for key in all_keys(facts[name])[2:]:  # the first two are the name and its plural
            rows = [row for row in mixed[name] if key in row]
            for row, value in zip(rows, rng.sample([row[key] for row in rows], len(rows))):
                row[key] = value
    return mixed


def all_keys(rows: list[dict]) -> list[str]:
    """The keys of all rows, each once: [{"a": 1}, {"b": 2, "a": 3}] -> ["a", "b"]."""
    return list(dict.fromkeys(key for row in rows for key in row))


# ---------------------------------------------------------------------------------------------------------
# the noise: endless pages of one kind


def templated(kind: str, rng: random.Random) -> Iterator[str]:
    """Pages from crawl.txt: boilerplate, spam, headers ..."""
    places = load("facts.json")["countries"]
    slots = SLOTS | {"country": [row[0] for row in places], "capital": [row[1] for row in places]}
    for _, _, _, beats in deal([plan for plan in plans("crawl") if plan[2] == kind], None, rng):
        yield write(beats, {"site": rng.choice(SLOTS["site"])}, slots, rng)


def copies(rng: random.Random, pages: list[str]) -> Iterator[str]:
    """Near-duplicates: few articles are copied often. Some words change, and a header or footer is added."""
    popular = rng.sample(pages, max(1, len(pages) // POPULAR))
    above, below = templated("header", rng), templated("footer", rng)
    while True:
        text = rng.choice(popular)
        words = re.split(r"(\s+)", text)
        for i in range(0, len(words), 2):
            if rng.random() < CHANGED:
                words[i] = words[2 * rng.randrange(len(words) // 2)]
        text, extra = "".join(words), rng.random()
        text = next(above) + "\n" + text if extra < 0.7 else text
        yield text + "\n" + next(below) if extra > 0.3 else text


def shuffled(rng: random.Random) -> Iterator[str]:
    """In turn: the words of a page in a random order, and the sentences of two, as content farms mix them."""
    source = pages_of("article", rng)
    while True:
        words = next(source).split()
        yield " ".join(rng.sample(words, len(words)))
        parts = [part for text in itertools.islice(source, 2) for part in re.split(r"(?<=[.!?])\s+", text)]
        yield " ".join(rng.sample(parts, 2 * len(parts) // 3))


def truncated(rng: random.Random) -> Iterator[str]:
    """In turn: a page that breaks off, and the beginnings of several, as on the front page of a blog."""
    source, ending = pages_of("article", rng), templated("ending", rng)
    while True:
        words = re.split(r"(\s+)", next(source))
        part = "".join(words[:2 * rng.randint(8, max(8, len(words) // 4))]).rstrip()
        yield part + rng.choice(["", next(ending)])
        teasers = [re.split(r"(?<=\S)\s+", text)[:rng.randint(9, 20)] for text in itertools.islice(source, 6)]
        yield "\n".join(" ".join(words) + next(ending) for words in teasers)


# ---------------------------------------------------------------------------------------------------------
# the crawl


def crawl(seed: int, n_bytes: int = 4_000_000) -> list[tuple[str, str]]:
    """[(kind, text)] with about n_bytes of text, in a random order; SHARES says how much of each kind. The
    same seed gives the same bytes."""
    def rng(kind):
        return random.Random(f"crawl {seed} {kind}")
    clean = take_bytes(pages_of("article", rng("clean")), n_bytes * SHARES["clean"] / 100)
    noise = {"boilerplate": templated("boilerplate", rng("boilerplate")),
             "spam": templated("spam", rng("spam")),
             "copy": copies(rng("copy"), clean), "shuffled": shuffled(rng("shuffled")),
             "truncated": truncated(rng("truncated")),
             "wrong": pages_of("article", rng("wrong"), wrong=True)}
    pages = [("clean", text) for text in clean]
    for kind, texts in noise.items():
        pages += [(kind, text) for text in take_bytes(texts, n_bytes * SHARES[kind] / 100)]
    rng("order").shuffle(pages)
    return pages


def take_bytes(texts: Iterator[str], n_bytes: float) -> list[str]:
    """Texts until they have n_bytes."""
    found = []
    while n_bytes > 0:
        found.append(next(texts))
        n_bytes -= len(found[-1].encode())
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m curate.crawl", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=SHARES, help="only pages of this kind")
    parser.add_argument("--seed", type=int, default=0, help="of the crawl (default 0)")
    parser.add_argument("--show", type=int, default=5, help="how many pages (default 5)")
    args = parser.parse_args(argv)
    pages = [(kind, text) for kind, text in crawl(args.seed, 1_000_000) if args.kind in (None, kind)]
    for kind, text in pages[:args.show]:
        print(f"[{kind}]\n{text}", end="\n\n" + "-" * 80 + "\n\n")


if __name__ == "__main__":
    command(main, own_help=True)

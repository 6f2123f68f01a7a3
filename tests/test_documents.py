"""The built-in corpus: the same bytes everywhere, true facts, clean English, little to copy."""

import ast
import collections
import contextlib
import functools
import io
import itertools
import os
import random
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from corpus.documents import (
    FORMATS,
    KINDS,
    countries_needed,
    documents,
    load,
    prose,
    repeats,
    world,
    write,
)
from corpus.held_out import FAMILIES

ROOT = Path(__file__).parent.parent
DEBRIS = {
    "what is left of a template": r"[{}\[\]|<>_/]",
    "two spaces": r"  ",
    "a space where none belongs": r" [,.;:!?\n]|\n ",
    "two marks in a row": r"[,.;:!?]{2}",
    "a word twice": r"\b(\w+) \1\b",
    "a before a vowel": r"\b[Aa] (?:[aeio]\w|u(?!ni[^n]|se)\w|hour)",
    "an before a consonant": r"\b[Aa]n (?!hour|honest)[b-df-hj-np-tv-z]",
    "a sentence that begins with a small letter": r"(?:^|\n|[.!?] |[.!?:,]\" \")\"?[a-z]",
    "more than one empty line": r"\n{3}",
    "a command that asks": r"(?:^|\n|[.!?] )(?:Let us|Draw|Now paint|Name two|Find the|Try) [^.?!\n\"]*\?",
    "a question that does not ask": r"(?:^|\n|[.!?:] )(?:Who|[Hh]ow (?:far|many)|What (?:do|is)|Would you"
                                    r"|Can you|Do you|Which) [^.?!\n\"]*\.",
    "an article after an article": r"\b(?:[Tt]he|[Aa]n?) (?:the|an?)\b",
    "a plural that does not exist": r"\b(?:fish|sheep|deer)s\b",
}


@functools.cache
def world_once(seed):
    """Every document of a world, as (format, audience, text)."""
    return list(world(seed))


@pytest.fixture(scope="module")
def corpus():
    return world_once(0)


@pytest.fixture(scope="module")
def texts(corpus):
    return [text for _, _, text in corpus]


def runs(text, n):
    words = re.findall(r"[\w']+", text.lower())
    return list(zip(*(words[i:] for i in range(n))))


def test_two_processes_write_the_same_bytes():
    """Sets of strings have a different order in each process; the corpus must not depend on it."""
    program = ("import hashlib, itertools; from corpus.documents import documents\n"
               "for kind in 'world', 'docs':\n"
               "    texts = itertools.islice(documents(kind, 0), 100)\n"
               "    print(kind, hashlib.sha256('\\0'.join(texts).encode()).hexdigest())")
    other = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    said = [subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True, env=other)]
    with contextlib.redirect_stdout(io.StringIO()) as ours:
        exec(program, {})
    said.append(ours.getvalue())
    assert said[0] == said[1] and said[0].count("\n") == 2


def test_another_seed_writes_other_documents():
    first, second = (set(itertools.islice(documents("world", seed), 100)) for seed in (0, 1))
    assert not first & second


def test_a_slash_in_a_plan_is_a_line_break_and_two_are_a_paragraph_break():
    plan = [["A title //"], ["one line. / a {toy}."]]
    assert write(plan, {"toy": "kite"}, {}, random.Random(0)) == "A title\n\nOne line.\nA kite."


def test_a_plan_needs_as_many_countries_as_its_largest_number():
    plan = [["{capital1} is far from {country3}."], ["1 of", "{capital} {animal7} {toy}"]]
    assert countries_needed(plan) == 3
    assert countries_needed([["no slot"]]) == 1


def test_an_unknown_kind_is_reported_together_with_the_known_ones():
    with pytest.raises(AssertionError, match="no kind 'novels', only " + ", ".join(KINDS)):
        documents("novels", 0)


def test_no_document_is_written_twice(texts):
    assert len(set(texts)) == len(texts) == sum(FORMATS.values())


def test_all_formats_and_audiences_occur(corpus):
    assert collections.Counter(form for form, _, _ in corpus) == FORMATS
    assert {audience for _, audience, _ in corpus} == {"children", "middle", "adults"}


@pytest.mark.parametrize("what", DEBRIS)
def test_no_document_contains(texts, what):
    pattern = re.compile(DEBRIS[what])
    found = [text[max(0, m.start() - 30):m.end() + 30] for text in texts for m in pattern.finditer(text)]
    assert not found, f"{what}, {len(found)} times, for example {found[:3]}"


def test_all_quotation_marks_have_a_partner(texts):
    assert not [text for text in texts if text.count('"') % 2]


def test_no_document_repeats_itself(texts):
    """No run of 8 words occurs twice in one document."""
    assert repeats("one two three four five six seven eight " * 2)
    for text in texts:
        found = runs(text, 8)
        assert len(set(found)) == len(found), text


def test_most_of_a_fresh_document_has_never_been_written_before(texts):
    """At most a third of the runs of 13 words in another seed's documents occur in this corpus, and at most
    a quarter of those in stories."""
    known = {hash(run) for text in texts for run in runs(text, 13)}
    found, seen = collections.Counter(), collections.Counter()
    for form, _, text in itertools.islice(world(1), 500):
        fresh = runs(text, 13)
        seen[form] += len(fresh)
        found[form] += sum(hash(run) in known for run in fresh)
    assert found["story"] / seen["story"] < 0.25, "stories are copied"
    assert found.total() / seen.total() < 0.35


def test_every_sum_and_every_difference_is_right(texts):
    """In "3 + 1 + 1 = 5" the last two numbers are not a sum by themselves."""
    everything = "\n".join(texts)

    def found(form):
        pattern = r"(?<!\d)(?<!\+ )" + form.replace("n", r"(\d+)")
        return [tuple(map(int, m)) for m in re.findall(pattern, everything)]

    sums, longer, differences = found(r"n \+ n = n"), found(r"n \+ n \+ n = n"), found("n - n = n")
    assert len(sums) > 3000 and len(longer) > 50 and len(differences) > 1000
    assert all(a + b == c for a, b, c in sums)
    assert all(a + b + c == d for a, b, c, d in longer)
    assert all(a - b == c for a, b, c in differences)


def test_every_country_meets_its_capital_seventy_times(texts):
    lowered = [text.lower() for text in texts]
    n_met = {country: sum(capital in text and country.lower() in low for text, low in zip(texts, lowered))
             for country, capital, _ in load("facts.json")["countries"]}
    assert min(n_met.values()) >= 70, sorted(n_met.items(), key=lambda item: item[1])[:5]


def test_no_country_gets_the_capital_of_another(texts):
    """All of "X is the capital of Y" and "the capital of Y is X" agree with the table."""
    table = {country.lower(): capital for country, capital, _ in load("facts.json")["countries"]}
    names = [name for name, _, _ in load("facts.json")["countries"]]
    country = "(" + "|".join(re.sub("^the ", "[Tt]he ", name) for name in names) + ")"
    capital = "(" + "|".join(table.values()) + r")\b"
    everything = "\n".join(texts)
    said = re.findall(rf"he capital of {country} (?:is|is called|is the city of) {capital}", everything)
    said += re.findall(rf"^{country}(?:: | - ){capital}", everything, re.M)
    said += re.findall(rf"^What is the capital of {country}\? {capital}", everything, re.M)
    said += [(y, x) for x, y in re.findall(rf"{capital} is the capital (?:city )?of {country}\b", everything)]
    assert len(said) > 5000
    assert not [(country, capital) for country, capital in said if table[country.lower()] != capital]


def test_code_documents_are_python():
    for text in itertools.islice(documents("code", 0), 30):
        assert any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(ast.parse(text)))


def test_the_docstring_of_a_module_is_in_docs_and_not_in_code():
    """Otherwise the code would contain what is held out of the documentation. A docstring is a string that is
    the first token of code; whole files would take seconds to parse."""
    def first_token(text):
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        return next(token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL))

    assert first_token("# one\n\n'two'\nthree = 3\n").type == tokenize.STRING
    assert not [text[:200] for text in documents("code", 0) if first_token(text).type == tokenize.STRING]


def test_a_document_that_states_a_held_out_sum_is_left_out(monkeypatch):
    a, b = max(FAMILIES)
    texts = [f"Then {a} + {b} = {a + b}, as we know.", "Then 1 + 1 = 2, as we know."]
    monkeypatch.setattr("corpus.documents.docs", lambda: texts)
    assert list(documents("docs", 0)) == texts[1:]


def test_docs_have_sentences_and_come_once():
    texts = list(documents("docs", 0))
    assert len(texts) > 150 and all(map(prose, texts)) and len(set(texts)) == len(texts)
    assert prose("    x = 1\n    y = 2\nAn example with a few words.\n" + "    z = 3\n" * 9)
    assert not prose("    x = 1\n    y = 2\nAn example with a few words.\n" + "    z = 3\n" * 19)

"""filters.py: for each rule a page that breaks only this rule, and datatrove's decisions on many pages."""

import random
from collections import Counter
from itertools import islice

import pytest

from corpus.documents import documents
from curate.filters import (
    FILTERS,
    c4,
    duplicates,
    fineweb,
    first_broken,
    gopher_quality,
    gopher_repetition,
    repeated_runs,
    top_run,
    words_and_marks,
)

WORDS = """
the of and to in is that it was for on with as be at by this have from or one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so
these would other into has more her two like him see time could no make than first been its who now
people my made over did down only way find use may water long little very after called just where most
know while under again right think also around form small came show every good me give our
""".split()


def pages(rng, lines=8):
    """A page of plain made-up sentences that passes every filter."""

    def sentence():
        return " ".join(rng.choices(WORDS, k=rng.randint(8, 16))).capitalize() + "."

    return "\n".join(" ".join(sentence() for _ in range(2)) for _ in range(lines))


def test_a_plain_page_passes_everything_unchanged():
    text = pages(random.Random(1))
    assert [rule(text) for rule in FILTERS.values()] == [(text, None)] * 4


def test_the_measures_by_hand():
    assert words_and_marks("It's 3.5, isn't it?") == ["It", "'s", "3.5", ",", "is", "n't", "it", "?"]
    assert duplicates(["ab", "cd", "ab", "ab"]) == (2, 4)
    assert top_run("a b c a b".split(), 2) == 6  # "a b", twice three characters
    assert repeated_runs("a b c a b c".split(), 3) == 3 and repeated_runs("a b a b".split(), 3) == 0


def test_rules_after_the_first_broken_one_are_not_computed():
    def rules():
        yield "kept", False
        yield "broken", True
        raise AssertionError("computed")

    assert first_broken(rules()) == "broken" and first_broken([("kept", False)]) is None


def test_the_example_at_the_top_of_the_file_is_true():
    assert gopher_quality("The cat and the dog.") == ("The cat and the dog.", "fewer than 50 words")


def broken(rng):
    """{(filter, reason): a page that breaks only this rule of the filter}."""
    page = pages(rng)
    first, *rest = page.split("\n")

    def words(n):
        return " ".join(rng.choices(WORDS, k=n))

    def twice(n, share):
        """Ten runs of n words, each of them twice; one word of every run makes up `share` of the page."""
        runs = [words(n) for _ in range(10)]
        between = round(8 / share) // 20 - n
        return " ".join(f"{run} {words(between)}" for run in runs + runs)

    return {
        ("gopher_repetition", "empty"): " \n",
        ("gopher_repetition", "repeated paragraphs"): "\n\n".join(["Yes."] * 3 + [first, *rest[:1]]),
        ("gopher_repetition", "characters in repeated paragraphs"):
            "\n\n".join([page, page, *map(str, range(8))]),
        ("gopher_repetition", "repeated lines"): "\n".join(["Yes."] * 6 + [page]),
        ("gopher_repetition", "characters in repeated lines"): "\n".join([first] * 4 + rest),
        ("gopher_repetition", "one run of 2 words"): " ".join(
            f"water under {rng.choice(WORDS)} {rng.choice(WORDS)}" for _ in range(40)),
        ("gopher_repetition", "one run of 3 words"): " ".join(
            f"water under right {words(9)}" for _ in range(40)),
        ("gopher_repetition", "one run of 4 words"): " ".join(
            f"water under right again {words(19)}" for _ in range(20)),
        **{("gopher_repetition", f"repeated runs of {n} words"): twice(n, share) for n, share in (
            (5, 0.04), (6, 0.0265), (7, 0.021), (8, 0.017), (9, 0.0136), (10, 0.0112))},
        ("gopher_quality", "fewer than 50 words"): "The cat and the dog.",
        ("gopher_quality", "more than 100,000 words"): "of the and " * 34_000,
        ("gopher_quality", "short words"): "to a b of c d " * 20,
        ("gopher_quality", "long words"): "the with " + "extraordinarily incomprehensible " * 40,
        ("gopher_quality", "hashes"): page.replace(" ", " # ", 60),
        ("gopher_quality", "ellipses"): page + " well ..." * 40,
        ("gopher_quality", "bullet points"): "\n".join("- " + line for line in page.split("\n")),
        ("gopher_quality", "lines that trail off"): page.replace(".\n", "...\n"),
        ("gopher_quality", "words without letters"): "of the with 123 4567 891 " * 30,
        ("gopher_quality", "no common words"): "cats chase yellow birds around " * 20,
        ("c4", "lorem ipsum"): page + "\nLorem ipsum dolor sit amet.",
        ("c4", "a curly bracket"): page + "\nIf it is so { do that.",
        ("c4", "fewer than 5 sentences"): "One is here now. Two is there then.",
        ("fineweb", "empty"): "\n\n",
        ("fineweb", "lines without an end"): page.replace(".", ""),
        ("fineweb", "short lines"): "\n".join([page, *(f"Menu item {i}." for i in range(40))]),
        ("fineweb", "characters in repeated lines"): page + "\n" + first,
        ("fineweb", "a list"): "\n".join(
            f"Counterrevolutionary telecommunications{i}." for i in range(30))}


@pytest.mark.parametrize("filter_, reason", list(broken(random.Random(0))))
def test_a_page_that_breaks_one_rule_is_dropped_for_it(filter_, reason):
    text = broken(random.Random(0))[filter_, reason]
    assert FILTERS[filter_](text)[1] == reason


def test_c4_drops_lines_and_keeps_the_rest():
    page = pages(random.Random(2))
    added = ["Menu", "Please enable JavaScript to go on.", "We think that the use of cookies is fine.",
             "Here is " + "x" * 1001 + " for you."]
    cited = page.replace(".\n", ".[12]\n", 1)
    assert c4("\n".join([added[0], cited, *added[1:]])) == (page, None)


def test_the_bounds_are_the_published_ones():
    """Just below a bound a page is kept, just above it, dropped."""
    lines = pages(random.Random(3), 89).split("\n")
    ended = ["x" * 40 + str(i) for i in range(88)]
    assert fineweb("\n".join(ended[:88] + lines[:12]))[1] is None            # 12 of 100 lines have an end
    assert fineweb("\n".join(ended[:88] + [lines[0]] + lines[2:12]))[1] == "lines without an end"
    page = "of the and with " * 12 + "water "
    assert gopher_quality(page + "again")[1] is None and gopher_quality(page)[1] == "fewer than 50 words"
    assert gopher_quality(page + ", .")[1] == "fewer than 50 words"           # marks do not count as words
    assert c4("So it is here. " * 5)[1] is None and c4("So it is here. " * 4)[1] == "fewer than 5 sentences"
    assert gopher_repetition("\n".join(["Yes."] * 4 + lines[:7]))[1] is None  # 3 of 11 lines
    assert gopher_repetition("\n".join(["Yes."] * 4 + lines[:5]))[1] == "repeated lines"  # 3 of 9


@pytest.mark.interop
def test_the_decisions_are_datatroves():
    """On 700 pages, of which each filter drops hundreds. The few differences are words that spaCy splits
    differently."""
    from datatrove.data import Document
    from datatrove.pipeline import filters as theirs

    rng = random.Random(5)
    texts = [text for kind, n in (("world", 200), ("docs", 100), ("code", 60))
             for text in islice(documents(kind, 1), n)]
    for _ in range(15):
        texts += [text for (_, reason), text in broken(rng).items() if reason not in (
            "empty", "more than 100,000 words")]
    rules = {"gopher_repetition": theirs.GopherRepetitionFilter(), "gopher_quality":
             theirs.GopherQualityFilter(), "c4": theirs.C4QualityFilter(filter_no_terminal_punct=False),
             "fineweb": theirs.FineWebQualityFilter()}
    for name, rule in rules.items():
        same, reasons = 0, Counter()
        for text in texts:
            document = Document(text=text, id="0")
            kept, (ours, reason) = rule.filter(document), FILTERS[name](text)
            same += (kept is True) == (reason is None) and (reason is not None or ours == document.text)
            reasons[reason] += 1
        assert same >= 0.98 * len(texts), (name, same, len(texts))
        assert min(reasons.values()) >= 5, reasons

"""The built-in chats, pairs and held-out questions: right, in order, and nothing held out is ever stated."""

import json
import random
import re
from collections import Counter
from itertools import islice

import pytest

from corpus.chats import (
    SMALL_TALK,
    WORDS,
    Exchanges,
    chats,
    messages,
    slots_of_sum,
    transcripts,
    worked,
)
from corpus.documents import documents, expand, load, plans
from corpus.held_out import (
    FAMILIES,
    SPLIT,
    family,
    is_held_out,
    known_countries,
    result,
    stated_sums,
    wordings,
)
from corpus.messages import in_order, spoken
from corpus.pairs import CLASS, pairs
from evals.questions import MUST, questions

COUNTRIES = load("facts.json")["countries"]
COUNTRY = re.compile("|".join(sorted((re.escape(row[0]) for row in COUNTRIES), key=len, reverse=True)), re.I)
TOPICS = {topic: beats for _, topic, _, beats in plans("chats")}
SUMS = [slots_of_sum(*numbers) for numbers in ((7, "+", 2), (7, "-", 2))]
EQUATION = re.compile(r"(?<![\d.])(?<![+-] )(\d+) ?([+-]) ?(\d+) ?=\s*(\d+)(?!\d|\.\d)")


@pytest.fixture(scope="module")
def training():
    """{source: texts} of everything that any stage learns from."""
    texts = {kind: list(documents(kind, 42)) for kind in ("world", "code", "docs")}
    texts["transcripts"] = list(transcripts(42))
    texts["chats"] = ["\n".join(m["content"] for m in chat["messages"]) for chat in chats(42)]
    texts["pairs"] = [
        "\n".join(m["content"] for m in pair[side]) for pair in pairs(42) for side in ("chosen", "rejected")
    ]
    return texts


def test_the_held_out_sums_are_a_fifth_of_each_kind_without_one_and_one():
    one_digit = [(a, b) for a in range(10) for b in range(a, 10)]
    two_digits = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    for pairs_, exact in ((one_digit, 11), (two_digits, 819)):
        assert sum(pair in FAMILIES for pair in pairs_) == exact
    assert not is_held_out(1, "+", 1) and not is_held_out(2, "-", 1)


def test_a_sum_its_reverse_and_its_differences_are_one_family():
    assert family(5, "+", 3) == family(3, "+", 5) == family(8, "-", 3) == family(8, "-", 5) == (3, 5)


@pytest.mark.parametrize("text", ["{a}+{b}={c}", "{a} + {b} = {c}.", ">>> {a} + {b}\n{c}", "{a}+{b} is {c}"])
def test_a_stated_sum_is_found(text):
    a, b = next(pair for pair in sorted(FAMILIES) if pair[0] > 9)
    assert stated_sums(text.format(a=a, b=b, c=a + b)) == [(a, "+", b)]
    assert stated_sums(text.format(a=a, b=b, c=a + b + 1)) == []


def steps_of(text):
    """The sums of two digits that are steps in working out the larger ones of a text, or checks of them."""
    steps = set()
    for a, op, b, _ in EQUATION.findall(text):
        (ta, oa), (tb, ob) = divmod(int(a), 10), divmod(int(b), 10)
        if int(a) > 9 or int(b) > 9:
            steps |= {(oa, op, ob), (oa + 10, op, ob), (ta, op, tb), (ta - 1, op, tb), (ta, op, 1)}
    for a, op, b in re.findall(r"(\d+) ([+-]) (\d+):", text):  # the task of a worked answer
        (ta, oa), (tb, ob) = divmod(int(a), 10), divmod(int(b), 10)
        steps |= {(oa, op, ob), (oa + 10, op, ob), (ta, op, tb)}
    return steps


@pytest.mark.parametrize("source", ["world", "code", "docs", "transcripts", "chats", "pairs"])
def test_no_held_out_sum_is_stated_except_as_a_step_of_a_larger_one(training, source):
    for text in training[source]:
        stated = set(stated_sums(text))
        assert stated <= steps_of(text), (stated - steps_of(text), text[:300])
        for question in re.findall(r"(?:User: |^)(\d+ ?[+-] ?\d+)[ =?]*\n", text):
            a, op, b = re.fullmatch(r"(\d+) ?([+-]) ?(\d+)", question).groups()
            assert not is_held_out(int(a), op, int(b)), text


def test_held_out_capitals_appear_in_documents_but_in_no_chat_transcript_or_pair(training):
    for country, capital, _ in known_countries(COUNTRIES, held_out=True):
        if capital.lower() in country.lower() or capital == "Victoria":
            continue
        name = re.compile(rf"\b{re.escape(capital)}\b", re.I)
        for source in ("transcripts", "chats", "pairs"):
            assert not any(name.search(text) for text in training[source]), (source, capital)
        assert sum(bool(name.search(text)) for text in training["world"]) >= 60, capital


def test_no_document_asks_for_a_held_out_capital(training):
    """Only the other countries are in a quiz, "What is the capital of X? Y."."""
    names = [re.sub("^the ", "", country) for country, _, _ in known_countries(COUNTRIES, held_out=True)]
    asked = re.compile(rf"capital[^.!?\n]*\b({'|'.join(map(re.escape, names))})[^.!\n]*\?")
    assert not [text for text in training["world"] if asked.search(text)]


def wording(text):
    """A question without what does not make it another one: capitals, punctuation, the assistant's name, the
    country, the numbers. "What's 7+2?" and "whats 12 + 30" are one wording."""
    text = COUNTRY.sub("country", text).lower().replace("'", "")
    words = [word for word in re.findall(r"\w+|[+-]", text) if word != "smol"]
    return " ".join("0" if word.isdigit() else "zero" if word in WORDS else word for word in words)


def every_text(line):
    """All that a line with choices can say: "hi[|!]" -> {"hi", "hi!"}."""
    choice = re.search(r"\[([^\[\]]*)\]", line)
    if not choice:
        return {line}
    return set().union(*(every_text(line[:choice.start()] + part + line[choice.end():])
                         for part in choice[1].split("|")))


def every_wording(lines):
    for line in lines:
        slots = set(re.findall(r"\{(\w+)\}", line.lower()))
        fitting = [sum_ for sum_ in SUMS if slots <= sum_.keys()] or [{slot: slot for slot in slots}]
        for text in every_text(line):
            yield from (wording(expand(text, values, {}, random)) for values in fitting)


@pytest.mark.parametrize("topic", SPLIT)
def test_what_the_held_out_lines_can_say_no_other_line_can(topic):
    """Also ignoring capitals, punctuation and the assistant's name."""
    lines = TOPICS[topic][0]
    held_out = wordings(topic, lines, held_out=True)
    assert len(held_out) == len(lines) // 4
    assert len(lines) >= {"capital": 19, "sum_in_letters": 25}.get(topic, 100)
    trained = {text for other, beats in TOPICS.items() for text in every_wording(wordings(other, beats[0]))}
    assert not trained.intersection(every_wording(held_out))


def test_the_wordings_of_the_questions_occur_in_no_training_text(training):
    trained = {wording(line.removeprefix("User: ")) for source in ("transcripts", "chats", "pairs")
               for text in training[source] for line in text.splitlines()}
    asked = [question for question in questions()
             if re.search("who are you|capitals|wordings", question.group)]
    assert len(asked) > 200
    for question in asked:
        assert wording(question.text) not in trained, question


def test_every_answer_to_a_sum_is_right_and_every_chat_takes_turns():
    answers = [(slots, *turns) for _, slots, turns in islice(Exchanges(3), 3000) if "op" in slots]
    assert len(answers) > 500
    for slots, question, answer in answers:
        a, op, b = slots["a"], slots["op"], slots["b"]
        words = re.findall(r"\d+|[a-z]+", question.lower())
        asked = [int(w) if w.isdigit() else WORDS.index(w) for w in words if w.isdigit() or w in WORDS]
        assert sorted(asked) == sorted((a, b)), question
        assert answer.startswith(f"{a} {op} {b}"), (question, answer)
        assert re.findall(r"\d+", answer)[-1] == str(result(a, op, b)), (question, answer)
        assert all(result(int(x), o, int(y)) == int(z) for x, o, y, z in EQUATION.findall(answer)), answer
    for chat in chats(3, 300):
        assert in_order(spoken(chat["messages"])) == chat["messages"]


@pytest.mark.parametrize(
    "wording_, numbers, op",
    [
        (r"(?:add|sum of|total of) (?:the numbers |up |together )?(\d+) (?:and|to) (\d+)", (8, 20), "+"),
        (r"(?<!between )(?<!of )(\d+) (?:plus|and|and then|more than|added to) (\d+)", (8, 20), "+"),
        (r"(?:subtract|take|deduct|remove) (\d+) (?:away )?from (\d+)", (8, 20), "-"),
        (r"(\d+) (?:minus|less|take away|without|reduced by|decreased by) (\d+)", (20, 8), "-"),
        (r"difference (?:between|of) (\d+) and (\d+)", (20, 8), "-"),
    ],
)
def test_the_words_of_a_sum_fit_its_sign_and_the_order_of_its_numbers(wording_, numbers, op):
    """A sum is asked for in the order of its numbers, and the smaller number is taken "from" the larger."""
    found = set()
    for sum_ in (slots_of_sum(8, "+", 20), slots_of_sum(20, "-", 8)):
        for line in TOPICS["sum_in_words"][0]:
            if set(re.findall(r"\{(\w+)\}", line)) <= sum_.keys():
                texts = (expand(text, sum_, {}, random) for text in every_text(line))
                found |= {(*map(int, match), sum_["op"]) for text in texts
                          for match in re.findall(rf"\b{wording_}\b", text)}
    assert found == {(*numbers, op)}


@pytest.mark.parametrize(
    "sum_, answer",
    [
        ((7, "+", 8), "7 + 8 = 15."),
        ((15, "-", 8), "15 - 8 = 7."),
        ((47, "+", 38), "47 + 38: ones 7 + 8 = 15, tens 4 + 3 + 1 = 8. The answer is 85."),
        ((52, "-", 17), "52 - 17: ones 12 - 7 = 5, tens 5 - 1 - 1 = 3. The answer is 35."),
        ((6, "+", 96), "6 + 96: ones 6 + 6 = 12, tens 0 + 9 + 1 = 10. The answer is 102."),
    ],
)
def test_sums_are_worked_out_a_digit_at_a_time(sum_, answer):
    assert worked(*sum_) == answer


def test_the_same_seed_gives_the_same_chats_and_another_seed_gives_others():
    first, again, other = (json.dumps(list(chats(seed, 50))) for seed in (1, 1, 2))
    assert first == again != other


def test_no_chat_has_a_hole():
    for chat in chats(5, 2000):
        for message in chat["messages"]:
            text = message["content"]
            code = text.startswith("def ")
            assert text == text.strip(), repr(text)
            assert not re.search(r"(?:^|[.!?] )(?:(?:Please|Now) )?[Tt]ell [^.:?]*\?$", text), text
            assert text and not re.search(r"[{}|]|CODE|  " if not code else r"[{}|]|CODE", text), text
            assert code or message["role"] == "user" or re.search(r"[.!?]$", text), text


@pytest.mark.parametrize("held_out", [False, True])
def test_length_does_not_tell_which_answer_is_preferred(held_out):
    """Either answer is longer equally often, and both sides have the same histogram of lengths."""
    lengths = [
        [len(pair[side][1]["content"]) for side in ("chosen", "rejected")] for pair in pairs(7, 800, held_out)
    ]
    chosen, rejected = (Counter(length // CLASS for length in side) for side in zip(*lengths))
    assert sum(abs(chosen[k] - rejected[k]) for k in chosen | rejected) <= 2
    longer = sum((c > r) + (c == r) / 2 for c, r in lengths) / len(lengths)
    assert 0.45 < longer < 0.55


def test_every_fault_occurs_among_the_pairs_and_a_wrong_answer_is_wrong():
    found = list(pairs(7))
    assert set(Counter(pair["fault"] for pair in found)) == {
        "wrong",
        "rambling",
        "going on",
        "rude",
        "lazy",
        "elsewhere",
        "cut off",
    }
    assert all(pair["chosen"][:-1] == pair["rejected"][:-1] for pair in found)
    assert all(pair["chosen"] != pair["rejected"] for pair in found)
    said = [(pair["chosen"][1]["content"], pair["rejected"][1]["content"]) for pair in found
            if pair["fault"] == "wrong" and "The answer is" in pair["chosen"][1]["content"]]
    assert said and all(good.split()[-1] != bad.split()[-1] for good, bad in said)


def test_a_question_accepts_a_right_answer_and_rejects_a_wrong_one():
    by_text = {question.text: question for question in questions()}
    assert by_text["1+1="].is_right("1 + 1 = 2.") and by_text["1+1="].is_right("2")
    assert not by_text["1+1="].is_right("1 + 1 = 3.") and not by_text["1+1="].is_right("1 + 1 = 12.")
    assert by_text["hello"].is_right("Hello! How can I help you?")
    assert not by_text["hello"].is_right("3 + 4 = 7.")
    counts = Counter(question.group for question in questions())
    assert counts["greetings, thanks, who are you"] >= 75 and counts["sums in unseen wordings"] == 100
    assert counts["capitals known from documents only"] == len(COUNTRIES) // 3


def test_what_is_asked_is_held_out():
    for question in questions():
        found = re.search(r"(\d+) ?([+-]|plus|minus) ?(\d+)", question.text)
        if found:
            a, op, b = found.groups()
            held_out = is_held_out(int(a), {"plus": "+", "minus": "-"}.get(op, op), int(b))
            assert held_out == ("held out" in question.group), question


def test_a_good_answer_of_the_plans_counts_as_right():
    for topic, must in MUST.items():
        for question in (question for question in questions() if question.must == must):
            assert all(map(question.is_right, every_text(TOPICS[topic][1][0]))), question


def test_lessons_are_chats_without_small_talk_and_easy_sums():
    """What SmolLM-Instruct v0.1 was trained on had neither; the README shows what that does."""
    said = [chat["messages"][i]["content"] for chat in chats(0, 500, SMALL_TALK) for i in range(-2, 0)]
    assert not [text for text in said if re.search(r"Smol\b|^Hello|welcome|^\d [+-] \d = \d+\.$", text)]
    assert [text for text in said if "The answer is" in text]


def test_messages_alternate():
    assert messages(["a", "b"]) == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

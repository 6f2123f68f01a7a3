"""The built-in chats, pairs and held-out questions: right, in order, and nothing held out is ever stated."""

import json
import random
import re
from collections import Counter
from itertools import islice

import pytest

from corpus.chats import SMALL_TALK, Exchanges, chats, messages, transcripts, worked
from corpus.documents import documents, expand, load, plans
from corpus.held_out import FAMILIES, family, is_held_out, known_countries, result, stated_sums
from corpus.messages import in_order, spoken
from corpus.pairs import CLASS, pairs
from evals.questions import questions

COUNTRIES = load("facts.json")["countries"]
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


def test_the_wordings_of_the_questions_occur_in_no_training_text(training):
    everything = "\n".join("\n".join(texts) for texts in training.values()).lower()
    for _, topic, _, beats in plans("questions"):
        for line in beats[0] if topic in ("greeting", "thanks", "who") else []:
            assert not re.search(rf"(?:^|user: ){re.escape(line.lower())}$", everything, re.M), line
        for line in beats[0] if topic == "capital" else []:
            before, after = line.lower().split("{country}")
            assert before not in everything and (len(after) < 3 or f"{after}\n" not in everything), line


def test_every_answer_to_a_sum_is_right_and_every_chat_takes_turns():
    answers = [(turns[0], turns[1]) for _, slots, turns in islice(Exchanges(3), 3000) if "op" in slots]
    assert len(answers) > 500
    for question, answer in answers:
        a, op, b = next(iter(re.findall(r"(\d+) ?([+-]|plus|minus) ?(\d+)", question)))
        right = result(int(a), {"plus": "+", "minus": "-"}.get(op, op), int(b))
        assert re.findall(r"\d+", answer)[-1] == str(right), (question, answer)
        assert all(result(int(x), o, int(y)) == int(z) for x, o, y, z in EQUATION.findall(answer)), answer
    for chat in chats(3, 300):
        assert in_order(spoken(chat["messages"])) == chat["messages"]


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
    assert counts["greetings, thanks, who are you"] >= 20
    assert counts["capitals known from documents only"] == len(COUNTRIES) // 3


def test_what_is_asked_is_held_out():
    for question in questions():
        found = re.search(r"(\d+) ?([+-]|plus|minus) ?(\d+)", question.text)
        if found:
            a, op, b = found.groups()
            held_out = is_held_out(int(a), {"plus": "+", "minus": "-"}.get(op, op), int(b))
            assert held_out == ("held out" in question.group), question


def test_a_good_answer_of_the_plans_counts_as_right():
    by_text = {question.text: question for question in questions()}
    for beats in (
        beats for _, topic, _, beats in plans("questions") if topic in ("greeting", "thanks", "who")
    ):
        for question in map(by_text.get, beats[0]):
            answer = expand(beats[1][0], {}, {}, random.Random(0))
            assert question.is_right(answer), (question, answer)


def test_lessons_are_chats_without_small_talk_and_easy_sums():
    """What SmolLM-Instruct v0.1 was trained on had neither; the README shows what that does."""
    said = [chat["messages"][i]["content"] for chat in chats(0, 500, SMALL_TALK) for i in range(-2, 0)]
    assert not [text for text in said if re.search(r"Smol\b|^Hello|welcome|^\d [+-] \d = \d+\.$", text)]
    assert [text for text in said if "The answer is" in text]


def test_messages_alternate():
    assert messages(["a", "b"]) == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

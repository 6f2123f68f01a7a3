"""decontaminate.py: questions of a benchmark are found in a text, verbatim, lightly edited or short, and
nothing else is."""

import json
import random

import pytest
from test_benchmarks import ROWS
from test_benchmarks import write as write_benchmark

from config import UserError
from curate.__main__ import main as curate
from curate.decontaminate import SHORTEST, Exams, matched_share, plain_words
from evals.questions import questions

WORDS = "river stone window garden music letter winter market bridge candle forest silver yellow".split()


def sentence(rng, n):
    return " ".join(rng.choice(WORDS) + rng.choice(("", "s", "ing", "er", "ed", "ful")) for _ in range(n))


@pytest.fixture
def exam():
    rng = random.Random(0)
    return [sentence(rng, n) for n in (5, 8, 10, 14, 25, 40) for _ in range(10)]


def test_every_planted_question_is_found_and_clean_text_is_not(exam):
    rng, exams = random.Random(1), Exams(exam)
    for question in exam:
        text = f"{sentence(rng, 60)}. {question.capitalize()}? {sentence(rng, 60)}"
        assert exams.found_in(text) is not None, question
    assert [exams.found_in(sentence(rng, 200)) for _ in range(100)] == [None] * 100


def test_a_lightly_edited_question_is_found(exam):
    """With other case, marks and accents; and with one word changed that leaves ten in a row."""
    rng, exams = random.Random(2), Exams(exam)
    for question in exam:
        words = question.split()
        assert exams.found_in(", ".join(words).upper().replace("E", "É") + "!") == question
        if len(words) >= 25:
            words[rng.choice((2, -3))] = "elephant"
            assert exams.found_in(" ".join(words)) == question


def test_ten_words_in_a_row_make_a_candidate_and_nine_do_not():
    question = sentence(random.Random(3), 19).split()
    exams = Exams([" ".join(question)])
    assert exams.found_in(" ".join([*question[:10], "elephant", *question[11:]])) == " ".join(question)
    assert exams.found_in(" ".join([*question[:9], "elephant", *question[10:]])) is None


def test_ten_words_in_common_are_not_enough(exam):
    """They make a candidate. It is confirmed if it shares more than half of the question."""
    long = max(exam, key=len).split()
    assert len(long) == 40
    assert Exams([" ".join(long)]).found_in(" ".join(long[:12])) is None
    assert Exams([" ".join(long)]).found_in(" ".join(long[:28])) == " ".join(long)


def test_the_share_is_of_characters_in_pieces_longer_than_five():
    assert matched_share(["abcdefgh", "ij"], ["abcdefgh", "xy"]) == 0.8
    assert matched_share(["abcd", "efgh"], ["abcd", "xxxx"]) == 0.0


def test_words_are_compared_without_case_accents_and_marks():
    assert plain_words("Où est-il, Zoë?") == ["ou", "est", "il", "zoe"]


def test_questions_of_the_built_in_evaluation_are_found_where_they_occur():
    every = [question.text for question in questions() if len(plain_words(question.text)) >= SHORTEST]
    exams = Exams(every)
    for text in every:
        assert exams.found_in(f"He asked: {text} Nobody knew.") is not None


def test_a_changed_word_hides_no_question_of_twenty_words():
    question = sentence(random.Random(7), 20).split()
    exams = Exams([" ".join(question)])
    for i in range(20):
        page = [*question[:i], "elephant", *question[i + 1:]]
        assert exams.found_in(" ".join(page)) == " ".join(question)


def test_a_question_of_fewer_than_ten_words_is_found_whole_or_not_at_all():
    rng = random.Random(4)
    for n in range(1, 10):
        question = sentence(rng, n)
        page = f"{sentence(rng, 60)}. {question.upper()}? {sentence(rng, 60)}"
        assert Exams([question]).found_in(page) == (question if n >= SHORTEST else None)
        assert Exams([question]).found_in(f"{page} elephant".replace(question.split()[0].upper(), "")) is None


# ---------------------------------------------------------------------------------------------------------
# python -m curate --exams=...


def asked(task, rng, n):
    """(row, quotation): a row of a benchmark in the layout of its authors, and its question of n words and
    right answer as a web page would quote them."""
    question, choices = sentence(rng, n), [sentence(rng, rng.randint(1, 8)) for _ in range(4)]
    one, two = question.split()[:n // 2], question.split()[n // 2:]
    quoted = f"{question} {choices[1]}"
    if task == "winogrande":
        quoted = " ".join([*one, choices[1], *two])
    changed = {
        "hellaswag": {"ctx_a": " ".join(one), "ctx_b": " ".join(two), "endings": choices},
        "piqa": {"goal": question, "sol1": choices[0], "sol2": choices[1]},
        "winogrande": {"sentence": " ".join([*one, "_", *two]), "option1": choices[0], "option2": choices[1]},
        "mmlu": {"question": question, "choices": choices},
    }.get(task, {"question": question, "question_stem": question,
                 "choices": {"text": choices, "label": list("1234" if "2" in str(ROWS[task]) else "ABCD")}})
    return {**ROWS[task], **changed}, quoted


def edited(text, rng):
    """The text as it is, with other marks, and with one word changed that leaves ten in a row."""
    words = text.split()
    yield text
    yield ", ".join(words).upper().replace("E", "É") + "!"
    leaving = [i for i in range(len(words)) if max(i, len(words) - 1 - i) >= 10]
    i = rng.choice(leaving)
    yield " ".join([*words[:i], "elephant", *words[i + 1:]])


def test_the_questions_of_all_benchmarks_are_found_however_they_were_edited_and_clean_pages_stay(
    tmp_path, capsys
):
    """Twenty questions of 10 to 40 words from each benchmark, each on three pages of 120 other words."""
    rng, folder, pages = random.Random(5), tmp_path / "exams", [sentence(random.Random(6), 200)]
    for task in ROWS:
        found = [asked(task, rng, rng.randint(10, 40)) for _ in range(20)]
        write_benchmark(folder, task, *(row for row, _ in found))
        pages += [f"{sentence(rng, 60)}. {text} {sentence(rng, 60)}" for _, quoted in found
                  for text in edited(quoted, rng)]
    clean = [sentence(rng, 200) for _ in range(100)]
    texts = rng.sample(pages + clean, len(pages + clean))
    source, output = tmp_path / "pages.jsonl", tmp_path / "good.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    curate([str(source), str(output), "--steps=decontaminate", f"--exams={','.join(ROWS)}",
                 f"--benchmarks={folder}"])
    kept = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert kept == [text for text in texts if text in {*clean, pages[0]}]
    printed = " ".join(capsys.readouterr().out.split())
    for task in ROWS:
        assert f"decontaminate: a question of {task} -60" in printed


@pytest.mark.parametrize("words, message", [
    (["--exams=piqa,chess"], "there is no benchmark 'chess': choose from hellaswag, arc_easy"),
    (["--exams=piqa", "--steps=c4"], "no step uses --exams=piqa: name decontaminate in --steps"),
    (["--benchmarks=exams"], "--benchmarks=exams needs --exams, one or more of hellaswag"),
    (["--exams=mmlu", "--benchmarks=exams"], "the folder 'exams' has no mmlu.jsonl"),
    (["--exams=piqa", "--benchmarks=exams"], "exams.piqa.jsonl contains no questions"),
    (["--exams=winogrande", "--benchmarks=exams"], "line 1 is not a question of winogrande")])
def test_exams_that_cannot_be_read_are_reported_before_any_page_is_read(
    tmp_path, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    write_benchmark(tmp_path / "exams", "piqa")
    write_benchmark(tmp_path / "exams", "winogrande", ROWS["piqa"])
    (tmp_path / "pages.jsonl").write_text('{"text": "a page"}\n')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        curate(["pages.jsonl", "good.jsonl", *words])
    assert sorted(tmp_path.rglob("*")) == before

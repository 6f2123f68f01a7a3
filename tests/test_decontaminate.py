"""Questions of a benchmark are found in a text: verbatim, lightly edited, short; and nothing else is."""

import random

import pytest

from corpus.questions import questions
from decontaminate import SHORTEST, Exams, matched, words_of

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
    """Other case, marks and accents; and a word changed that leaves ten in a row."""
    rng, exams = random.Random(2), Exams(exam)
    for question in exam:
        words = question.split()
        assert exams.found_in(", ".join(words).upper().replace("E", "É") + "!") == words
        if len(words) >= 25:
            words[rng.choice((2, -3))] = "elephant"
            assert exams.found_in(" ".join(words)) == question.split()


def test_ten_words_in_a_row_make_a_candidate_and_nine_do_not():
    question = sentence(random.Random(3), 19).split()
    exams = Exams([" ".join(question)])
    assert exams.found_in(" ".join([*question[:10], "elephant", *question[11:]])) == question
    assert exams.found_in(" ".join([*question[:9], "elephant", *question[10:]])) is None


def test_ten_words_in_common_are_not_enough(exam):
    """They make a candidate; confirmed is what shares more than half of the question."""
    long = max(exam, key=len).split()
    assert len(long) == 40
    assert Exams([" ".join(long)]).found_in(" ".join(long[:12])) is None
    assert Exams([" ".join(long)]).found_in(" ".join(long[:28])) == long


def test_the_share_is_of_characters_in_pieces_longer_than_five():
    assert matched(["abcdefgh", "ij"], ["abcdefgh", "xy"]) == 0.8
    assert matched(["abcd", "efgh"], ["abcd", "xxxx"]) == 0.0


def test_words_are_compared_without_case_accents_and_marks():
    assert words_of("Où est-il, Zoë?") == ["ou", "est", "il", "zoe"]


def test_held_out_questions_of_the_built_in_evaluation_are_found_where_they_stand():
    every = [question.text for question in questions() if len(words_of(question.text)) >= SHORTEST]
    exams = Exams(every)
    for text in every:
        assert exams.found_in(f"He asked: {text} Nobody knew.") is not None

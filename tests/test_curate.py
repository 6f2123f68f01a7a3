"""curate.py from file to file: what goes in, what is dropped and why, what comes out; and wrong commands."""

import json
import random
from collections import Counter

import pytest
from test_classifier import page, teacher  # noqa: F401  a fixture is found by its name
from test_dedup import planted
from test_filters import broken, pages

import curate
from config import UserError
from corpus.questions import questions


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def crawl(tmp_path):
    """Ten good pages, two of them twice, three bad ones, and one with a question of the evaluation."""
    rng = random.Random(0)
    good = [pages(rng) for _ in range(10)]
    asked = next(question.text for question in questions() if "capital" in question.text)
    bad = [broken(rng)[key] for key in (
        ("gopher_quality", "hashes"), ("c4", "a curly bracket"), ("fineweb", "lines without an end"))]
    texts = [*good, *bad, good[3] + "\nThis is new.", good[5], f"{pages(rng)}\nHe wrote: {asked}"]
    return write(tmp_path / "crawl.jsonl", texts), good


def test_good_pages_come_out_in_order_and_everything_else_is_accounted_for(crawl, tmp_path, capsys):
    source, good = crawl
    output = tmp_path / "good.jsonl"
    curate.main([source, str(output)])
    assert [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()] == good
    said = " ".join(capsys.readouterr().out.split())
    for line in ("read 16 documents", "gopher_quality: hashes -1", "c4: a curly bracket -1",
                 "dedup: nearly the same as an earlier one -2", "fineweb: lines without an end -1",
                 "decontaminate: a question of the evaluation -1", "kept 10 documents"):
        assert line in said
    assert f"{sum(len(text.encode()) for text in good):,} bytes" in said
    assert not list(tmp_path.glob("*.tmp"))


def test_only_the_steps_that_are_named_are_taken(crawl):
    texts, dropped = [json.loads(line)["text"] for line in open(crawl[0], encoding="utf-8")], {}
    assert len(list(curate.curated(texts, ["dedup"], dropped))) == 14
    assert dropped == {"dedup": Counter({"nearly the same as an earlier one": 2})}


def test_dedup_keeps_the_first_of_each_cluster():
    texts = planted(random.Random(1), 60)
    kept = list(curate.dedup(iter(texts), Counter()))
    assert kept == [text for i, text in enumerate(texts) if curate.clusters(texts)[i] == i]
    assert len(kept) < 40


@pytest.mark.parametrize("words, message", [
    (["--steps=c4,cooking"], "no step 'cooking': there are gopher_repetition"),
    (["--steps=c4,dedup,c4"], "a step stands twice in c4,dedup,c4"),
    (["--steps=educational"], "needs --classifier=FILE: python classifier.py train builtin-scored"),
    (["--steps=educational", "--classifier=none"], "there is no classifier none"),
    (["--steps=c4", "--classifier=none"], "no step uses none"),
    (["good.txt"], "does not end in .jsonl"),
    (["nowhere/good.jsonl"], "no folder"),
    (["nothing.jsonl", "good.jsonl"], "no source 'nothing.jsonl'")])
def test_a_wrong_command_is_one_sentence_and_nothing_is_written(crawl, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    names = [word for word in words if not word.startswith("--")]
    argv = [*([crawl[0], "good.jsonl"][:2 - len(names)]), *words]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        curate.main(argv)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_is_there_is_never_overwritten(crawl):
    with pytest.raises(UserError, match="is there already"):
        curate.main([crawl[0], crawl[0]])


def test_educational_keeps_what_gets_three_points_and_python_needs_four(teacher, monkeypatch):  # noqa: F811
    rng = random.Random(0)
    texts = [page(rng, school) for school in (True, False, False, True)]
    for step in ("educational", "educational_python"):  # lessons get 4, shops 1
        dropped = {}
        assert list(curate.curated(texts, [step], dropped, teacher)) == [texts[0], texts[3]]
        assert dropped == {step: Counter({"score 1": 2})}
    monkeypatch.setattr(curate.classifier, "score", lambda text, *_: float(text))
    for step, kept in (("educational", ["2.6", "3", "4", "9"]), ("educational_python", ["4", "9"])):
        assert list(curate.curated(["-1", "2.4", "2.6", "3", "4", "9"], [step], {}, teacher)) == kept


def test_a_preset_names_the_steps_of_a_source_and_the_command_line_overrides_them(
        tmp_path, teacher, capsys):  # noqa: F811
    rng = random.Random(1)
    texts = [page(rng, school) for school in (True, False, True, True)]
    source = write(tmp_path / "pages.jsonl", [*texts, texts[0]])
    preset = tmp_path / "mine.py"
    preset.write_text("from config import Config\n"
                      f"config = Config(data=(({source!r}, 1.0),), classifier={teacher!r},\n"
                      f"                filters=(({source!r}, 'dedup', 'educational'),))\n", encoding="utf-8")
    curate.main([source, str(tmp_path / "a.jsonl"), f"--config={preset}"])
    said = " ".join(capsys.readouterr().out.split())
    assert "dedup: nearly the same as an earlier one -1 educational: score 1 -1 kept 3 documents" in said
    curate.main([source, str(tmp_path / "b.jsonl"), f"--config={preset}", "--steps=dedup"])
    assert "kept 4 documents" in " ".join(capsys.readouterr().out.split())
    curate.main([source, str(tmp_path / "c.jsonl"), "--steps=educational", f"--classifier={teacher}"])
    assert "kept 4 documents" in " ".join(capsys.readouterr().out.split())

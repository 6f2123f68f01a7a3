"""curate.py from file to file: what goes in, what is dropped and why, what comes out; and wrong commands."""

import json
import random
from collections import Counter

import pytest
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

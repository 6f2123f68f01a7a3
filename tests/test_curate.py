"""curate.py from file to file, what is dropped and why, and wrong commands; its steps inside data.py."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_texts
from test_classifier import page, teacher  # noqa: F401  a fixture is found by its name
from test_dedup import planted
from test_filters import broken, pages

from curate import classifier
from curate import steps as curate
import data
from config import UserError
from evals.questions import questions


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
    lines, dropped = Path(crawl[0]).read_text(encoding="utf-8").splitlines(), {}
    texts = [json.loads(line)["text"] for line in lines]
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


# ---------------------------------------------------------------------------------------------------------
# the same steps in data.py


def repeating(path):
    """Random texts; every fifth is a copy of an earlier one, and every seventh one word 60 times."""
    lines = Path(write_texts(path, 200, words=60)).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    for i in range(200):
        texts[i] = texts[i // 2] if i % 5 == 4 else "mat " * 60 if i % 7 == 3 else texts[i]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("steps", [("gopher_repetition", "dedup"), ("dedup", "gopher_repetition")])
def test_an_interrupted_tokenisation_with_filters_gives_the_same_files(
    tmp_path, small, tok, monkeypatch, steps
):
    """However often it is interrupted; and the shards hold what curate.py would keep, in its order."""
    monkeypatch.setattr(data, "SHARD_TOKENS", 2000)
    monkeypatch.setattr(data, "BATCH_CHARACTERS", 1000)
    source = repeating(tmp_path / "crawl.jsonl")
    cfg = replace(small, data=((source, 1.0),), filters=((source, *steps),), val_fraction=0.0)
    whole = replace(cfg, out_dir=small.out_dir + "_whole")
    data.write_shards(source, whole, tok)
    put, calls = data.checkpoint.put, []

    def break_down(temporary, path):
        calls.append(path)
        if len(calls) % 8 == 0:
            raise KeyboardInterrupt
        put(temporary, path)

    monkeypatch.setattr(data.checkpoint, "put", break_down)
    interrupted = 0
    for _ in range(10):  # what begins anew each time would never end
        try:
            data.write_shards(source, cfg, tok)
            break
        except KeyboardInterrupt:
            interrupted += 1
    folders = [data.shard_folder(source, each, tok) for each in (cfg, whole)]
    contents = [{path.name: path.read_bytes() for path in folder.glob("*")} for folder in folders]
    assert contents[0] == contents[1] and interrupted >= 2
    ids = [np.fromfile(path, dtype=np.uint16).tolist() for path in sorted(folders[0].glob("train_*.bin"))]
    texts = tok.decode(sum(ids, [])).removesuffix("<|endoftext|>").split("<|endoftext|>")
    kept = data.Curated(source, cfg, steps)
    assert texts == list(kept) and kept.state() == {
        key: json.loads((folders[0] / "manifest_1of1.json").read_text())[key] for key in kept.state()}


def test_what_filters_left_out_is_told_and_stands_in_the_manifest(tmp_path, small, tok, monkeypatch, capsys):
    source = repeating(tmp_path / "crawl.jsonl")
    preset = tmp_path / "mine.py"
    preset.write_text(
        f"from config import Config\nconfig = Config(data=(({source!r}, 1.0),), "
        f"tokenizer={small.tokenizer!r}, out_dir={small.out_dir!r}, "
        f"filters=(({source!r}, 'gopher_repetition', 'dedup'),))"
    )
    data.main([str(preset)])
    said = capsys.readouterr().out
    manifest = json.loads(next(Path(small.out_dir, "data").rglob("manifest_1of1.json")).read_text())
    mats = sum("mat mat mat mat" in line for line in Path(source).read_text(encoding="utf-8").splitlines())
    assert manifest["dropped"]["gopher_repetition"] == {"one run of 2 words": mats} and mats > 20
    copies = manifest["dropped"]["dedup"]["nearly the same as an earlier one"]
    assert f"left out {mats:,} documents: gopher_repetition, one run of 2 words" in said
    assert f"left out {copies:,} documents: dedup, nearly the same as an earlier one" in said and copies > 20
    assert manifest["filters"] == ["gopher_repetition", "dedup"] and manifest["passed"] == 200 - mats - copies


def test_the_folder_of_the_shards_depends_on_the_filters_and_the_weights_of_the_classifier(
    tmp_path, small, tok
):
    source, weights = small.sources[0], np.zeros(classifier.BUCKETS, dtype=np.float32)
    folders = [data.shard_folder(source, small, tok)]
    for steps in (("c4",), ("c4", "dedup"), ("dedup", "c4")):
        folders.append(data.shard_folder(source, replace(small, filters=((source, *steps),)), tok))
    for bias in (1, 2):
        classifier.save(tmp_path / "c.safetensors", weights, np.float32(bias))
        cfg = replace(small, filters=((source, "educational"),), classifier=str(tmp_path / "c.safetensors"))
        folders.append(data.shard_folder(source, cfg, tok))
    assert len(set(folders)) == 6
    assert data.shard_folder(source, replace(cfg, filters=()), tok) == folders[0]  # who needs no weights


@pytest.mark.parametrize(
    "steps, sentence",
    [(("cooking",), "no step 'cooking'"), (("educational",), "needs --classifier=FILE: python")],
)
def test_filters_that_cannot_work_are_told_before_any_work(small, tok, steps, sentence):
    cfg = replace(small, filters=((small.sources[0], *steps),), tokenizer="nowhere")
    with pytest.raises(UserError, match=sentence):
        data.ready_tokenizer(cfg, [])

"""python -m curate from file to file, what it drops and why, wrong commands, and data.py on its output."""

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

from config import UserError
from curate import __main__ as curate
from curate import classifier, steps
from curate.steps import curated
from evals.questions import questions
from plumbing import shards


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
    printed = " ".join(capsys.readouterr().out.split())
    for line in ("read 16 documents", "gopher_quality: hashes -1", "c4: a curly bracket -1",
                 "dedup: nearly the same as an earlier one -1", "a copy of an earlier one -1",
                 "fineweb: lines without an end -1",
                 "decontaminate: a question of the evaluation -1", "kept 10 documents"):
        assert line in printed
    assert f"{sum(len(text.encode()) for text in good):,} bytes" in printed
    assert not list(tmp_path.glob("*.tmp"))


def test_only_the_named_steps_run(crawl):
    lines, dropped = Path(crawl[0]).read_text(encoding="utf-8").splitlines(), {}
    texts = [json.loads(line)["text"] for line in lines]
    assert len(list(curated(texts, ["dedup"], dropped))) == 14
    assert dropped == {"dedup": Counter({"nearly the same as an earlier one": 1,
                                         "a copy of an earlier one": 1})}


def test_dedup_keeps_the_first_of_each_cluster():
    texts = planted(random.Random(1), 60)
    kept = list(steps.dedup(iter(texts), Counter()))
    assert kept == [text for i, text in enumerate(texts) if steps.clusters(texts)[i] == i]
    assert len(kept) < 40


@pytest.mark.parametrize("words, message", [
    (["--steps=c4,cooking"], "no step 'cooking': choose from gopher_repetition"),
    (["--steps=c4,dedup,c4"], "--steps=c4,dedup,c4 names a step twice"),
    (["--steps=educational"], "needs --classifier=FILE: python -m curate.classifier train builtin-scored"),
    (["--steps=educational", "--classifier=none"], "there is no classifier none"),
    (["--steps=c4", "--classifier=none"], "no step uses --classifier=none"),
    (["--part=4/3"], "part='4/3' must be like 3/64"),
    (["--on_bad=panic"], "on_bad='panic' must be one of"),
    (["good.txt"], "must end in .jsonl"),
    (["nowhere/good.jsonl"], "no folder"),
    (["nothing.jsonl", "good.jsonl"], "no file or folder 'nothing.jsonl'")])
def test_a_wrong_command_is_one_sentence_and_nothing_is_written(crawl, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    names = [word for word in words if not word.startswith("--")]
    argv = [*([crawl[0], "good.jsonl"][:2 - len(names)]), *words]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        curate.main(argv)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_exists_is_never_overwritten(crawl):
    before = Path(crawl[0]).read_bytes()
    with pytest.raises(UserError, match="exists: name a new file"):
        curate.main([crawl[0], crawl[0]])
    assert Path(crawl[0]).read_bytes() == before


def test_educational_keeps_what_gets_three_points_and_python_needs_four(teacher, monkeypatch):  # noqa: F811
    rng = random.Random(0)
    texts = [page(rng, school) for school in (True, False, False, True)]
    for step in ("educational", "educational_python"):  # lessons get 4, shops 1
        dropped = {}
        assert list(curated(texts, [step], dropped, teacher)) == [texts[0], texts[3]]
        assert dropped == {step: Counter({"score 1": 2})}
    monkeypatch.setattr(classifier, "score", lambda text, *_: float(text))
    for step, kept in (("educational", ["2.6", "3", "4", "9"]), ("educational_python", ["4", "9"])):
        assert list(curated(["-1", "2.4", "2.6", "3", "4", "9"], [step], {}, teacher)) == kept


def test_steps_run_in_the_order_of_the_command_line(tmp_path, teacher, capsys):  # noqa: F811
    rng = random.Random(1)
    texts = [page(rng, school) for school in (True, False, True, True)]
    source = write(tmp_path / "pages.jsonl", [*texts, texts[0]])

    def printed(name, *flags):
        curate.main([source, str(tmp_path / name), *flags])
        return " ".join(capsys.readouterr().out.split())

    both = printed("a.jsonl", "--steps=dedup,educational", f"--classifier={teacher}")
    assert "dedup: a copy of an earlier one -1 educational: score 1 -1 kept 3 documents" in both
    both = printed("b.jsonl", "--steps=educational,dedup", f"--classifier={teacher}")
    assert "educational: score 1 -1 dedup: a copy of an earlier one -1 kept 3 documents" in both
    assert "kept 4 documents" in printed("c.jsonl", "--steps=dedup")
    assert "kept 4 documents" in printed("d.jsonl", "--steps=educational", f"--classifier={teacher}")


def test_parts_share_the_input_out_and_bad_records_are_counted(tmp_path, capsys):
    texts = planted(random.Random(3), 600)
    source = Path(write(tmp_path / "pages.jsonl", texts))
    lines = source.read_text(encoding="utf-8").splitlines()
    source.write_text("\n".join([*lines[:5], "{broken", *lines[5:]]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="pages.jsonl line 6: malformed JSON"):
        curate.main([str(source), str(tmp_path / "all.jsonl"), "--steps=gopher_repetition"])
    found = []
    for part in ("1/3", "2/3", "3/3"):
        output = tmp_path / f"part_{part[0]}.jsonl"
        curate.main([str(source), str(output), "--steps=gopher_repetition", f"--part={part}",
                     "--on_bad=skip"])
        found.append([json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()])
    assert sorted(sum(found, [])) == sorted(texts) and [len(part) for part in found] == [201, 200, 199]
    assert capsys.readouterr().out.count("           1  left out: malformed JSON") == 1


# ---------------------------------------------------------------------------------------------------------
# interruptions, and data.py on the output


def repeating(path):
    """Random texts; every fifth is a copy of an earlier one, and every seventh one word 60 times."""
    lines = Path(write_texts(path, 200, words=60)).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    for i in range(200):
        texts[i] = texts[i // 2] if i % 5 == 4 else "mat " * 60 if i % 7 == 3 else texts[i]
    return write(path, texts)


@pytest.mark.parametrize("order", ["gopher_repetition,dedup", "dedup,gopher_repetition"])
def test_an_interrupted_curation_leaves_no_file_and_the_next_one_writes_the_same_bytes(
    tmp_path, monkeypatch, order
):
    """Interrupted while it reads, while it writes, and just before the file would get its name."""
    source, calls = repeating(tmp_path / "crawl.jsonl"), Counter()
    curate.main([source, str(tmp_path / "expected.jsonl"), f"--steps={order}"])

    def interrupting(name, work, at):
        def called(*args, **kwargs):
            calls[name] += 1
            if calls[name] == at:
                raise KeyboardInterrupt
            return work(*args, **kwargs)
        return called

    for module, name, at in ((steps.Counted, "__iter__", 1), (curate.json, "dumps", 50),
                             (curate.disk, "replace", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupting(name, getattr(module, name), at))
            with pytest.raises(KeyboardInterrupt):
                curate.main([source, str(tmp_path / "good.jsonl"), f"--steps={order}"])
        assert not list(tmp_path.glob("good*"))
    curate.main([source, str(tmp_path / "good.jsonl"), f"--steps={order}"])
    assert (tmp_path / "good.jsonl").read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


def test_data_py_tokenizes_the_texts_that_curate_kept_in_their_order(tmp_path, small, tok, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2000)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 1000)
    source, good = repeating(tmp_path / "crawl.jsonl"), str(tmp_path / "good.jsonl")
    curate.main([source, good, "--steps=gopher_repetition,dedup"])
    cfg = replace(small, data=((good, 1.0),), val_fraction=0.0)
    shards.write_shards(good, cfg, tok)
    files = sorted(shards.shard_folder(good, cfg, tok).glob("train_*.bin"))
    ids = [np.fromfile(path, dtype=np.uint16).tolist() for path in files]
    texts = tok.decode(sum(ids, [])).removesuffix("<|endoftext|>").split("<|endoftext|>")
    crawl = [json.loads(line)["text"] for line in Path(source).read_text(encoding="utf-8").splitlines()]
    assert texts == list(curated(crawl, ["gopher_repetition", "dedup"], {})) and len(files) > 1


def test_the_table_says_what_was_dropped(tmp_path, capsys):
    source = repeating(tmp_path / "crawl.jsonl")
    curate.main([source, str(tmp_path / "good.jsonl"), "--steps=gopher_repetition,dedup"])
    printed = " ".join(capsys.readouterr().out.split())
    mats = sum("mat mat mat mat" in line for line in Path(source).read_text(encoding="utf-8").splitlines())
    kept = len((tmp_path / "good.jsonl").read_text(encoding="utf-8").splitlines())
    copies = 200 - mats - kept
    assert f"gopher_repetition: one run of 2 words -{mats} " in printed and mats > 20
    assert f"dedup: a copy of an earlier one -{copies} " in printed and copies > 20
    assert f"kept {kept} documents" in printed


def test_other_texts_that_other_steps_kept_are_tokenized_again_and_equal_ones_are_not(tmp_path, small, tok):
    rng, good, folders = random.Random(4), tmp_path / "good.jsonl", []
    texts = [page(rng, i % 2) for i in range(40)]
    source = write(tmp_path / "pages.jsonl", [*texts, *texts[:10]])
    runs = [["--steps=c4"], ["--steps=dedup"], ["--steps=gopher_repetition,dedup"]]
    for bias in (2, 3, 4):
        file = tmp_path / f"{bias}.safetensors"
        classifier.save(file, np.zeros(classifier.BUCKETS, dtype=np.float32), np.float32(bias))
        runs.append(["--steps=educational", f"--classifier={file}"])
    contents = []
    for flags in runs:
        good.unlink(missing_ok=True)
        curate.main([source, str(good), *flags])
        contents.append(good.read_bytes())
        folders.append(shards.shard_folder(str(good), replace(small, data=((str(good), 1.0),)), tok))
    assert len(set(folders)) == len(set(contents)) == len(set(zip(folders, contents))) >= 3


def test_the_command_prints_its_help_and_ends_a_mistake_with_code_2(run_here):
    for words, expected, text in (
            (["--help"], 0, "python -m curate pages.jsonl good.jsonl"),
            (["nothing.jsonl", "good.jsonl"], 2, "error: there is no file or folder 'not")):
        code, out, err = run_here("curate/__main__.py", *words)
        assert code == expected and text in out + err
        assert "Traceback" not in err and ".py" not in out.partition("options:")[2]

"""classifier.py: features by hand, the optimum by least squares, figures by hand, and the commands."""

import functools
import gzip
import json
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from test_documents import world_once
from test_sources import hub_folder

from config import Config, UserError
from corpus.documents import FORMATS, plans
from corpus.files import Bad
from corpus.sources import Documents, split_of
from curate import classifier
from curate.crawl import SCORES, crawl

SCHOOL, SHOP = "atoms sum plants count why capital".split(), "buy cheap click offer now sale".split()


def page(rng, school):
    """20 words of a lesson or of a shop."""
    return " ".join(rng.choices((SCHOOL if school else SHOP) + ["the", "a", "is"], k=20))


def labeled_file(path, n=300):
    rng = random.Random(0)
    rows = [{"text": page(rng, i % 2), "score": 4 if i % 2 else 1} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The file of a trained classifier that gives lessons 4 and shops 1."""
    folder = tmp_path_factory.mktemp("teacher")
    labeled_file(folder / "labels.jsonl")
    classifier.main(["train", str(folder / "labels.jsonl"), f"--out={folder / 'teacher.safetensors'}"])
    return str(folder / "teacher.safetensors")


# ---------------------------------------------------------------------------------------------------------
# features


def test_the_features_of_four_words_by_hand():
    """a, cat and "a cat" occur twice, the comma, "cat ," and ", a" once; values 1 + ln n, of length 1."""
    index, value = classifier.features("A cat, a CAT")
    length = math.sqrt(3 * (1 + math.log(2)) ** 2 + 3)
    assert sorted(value * length) == pytest.approx([1, 1, 1] + [1 + math.log(2)] * 3)
    assert len(set(index)) == 6 and index.dtype == np.int32 and np.linalg.norm(value) == pytest.approx(1)


def test_a_run_falls_into_the_same_bucket_on_every_machine():
    """0xCBF43926 is the published check value of CRC-32, that of "123456789"."""
    assert classifier.features("123456789")[0].tolist() == [0xCBF43926 % 2**18]


def test_the_example_at_the_top_of_the_file_is_true():
    words = "the ones : 7 + 0 = 7".split()
    runs = [*words, *map(" ".join, zip(words, words[1:]))]
    index, _ = classifier.features("The ones: 7 + 0 = 7")
    assert len(index) == len(set(runs)) == 14 and {93_670, 155_911} <= set(index.tolist())
    assert "buckets 93,670, 155,911" in classifier.__doc__
    for first, run in ((93_670, "the"), (155_911, "ones")):
        assert classifier.features(run)[0].tolist() == [first]


def test_runs_that_share_a_bucket_are_counted_together(monkeypatch):
    monkeypatch.setattr(classifier, "BUCKETS", 2)
    index, value = classifier.features("a b c")  # by CRC-32, a, b, a b: odd or even
    sides = [classifier.zlib.crc32(run) % 2 for run in (b"a", b"b", b"c", b"a b", b"b c")]
    counts = [sides.count(0), sides.count(1)]
    assert min(counts) > 0 and index.tolist() == [0, 1]
    assert value[0] / value[1] == pytest.approx((1 + math.log(counts[0])) / (1 + math.log(counts[1])))


def test_only_the_beginning_counts_and_an_empty_text_has_no_features():
    words = [f"w{i}" for i in range(classifier.WORDS)]
    assert [part.tolist() for part in classifier.features(" ".join(words))] == [
        part.tolist() for part in classifier.features(" ".join([*words, "more", "words"]))]
    assert [len(part) for part in classifier.features("")] == [0, 0]
    assert classifier.score("", np.ones(classifier.BUCKETS), 0.5) == 0.5


# ---------------------------------------------------------------------------------------------------------
# the regression


def test_the_training_loop_approaches_the_least_squares_solution(monkeypatch):
    """200 texts of 6 buckets, some of them empty; numpy solves it in float64, the bias as a column of 1."""
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(200, 6)) * (rng.random((200, 6)) < 0.7)
    scores = dense @ [1.0, -2, 0.5, 0, 3, -1] + 2.5 + rng.normal(size=200)
    exact = np.linalg.lstsq(np.column_stack([dense, np.ones(200)]), scores, rcond=None)[0]
    documents = [(np.flatnonzero(row).astype(np.int32), row[row != 0]) for row in dense]
    for name, value in (("BUCKETS", 8), ("EPOCHS", 60), ("BATCH", 20), ("RATE", 0.5)):
        monkeypatch.setattr(classifier, name, value)
    weight, bias = classifier.fit(documents, scores)
    assert np.allclose([*weight[:6], bias], exact, atol=0.01)
    assert np.all(weight[6:] == 0)  # no text has these buckets
    mean_of_all = np.abs(exact - [*weight[:6], scores.mean()]).max()
    assert mean_of_all > 0.1  # so the bias was learned: it is no longer the mean it began with


def test_scores_are_rounded_and_clipped_like_the_originals():
    assert classifier.rounded(np.array([2.4, 2.6, -0.2, 7.1, 5.2])).tolist() == [2, 3, 0, 5, 5]


def test_the_figures_of_a_report_by_hand():
    """3 and more: 2 hits, 1 miss, 1 false alarm, so F1 is 4/6. Of 1: 4/5, of 3: 2/5, of 2 and of 4: 0."""
    lines = list(classifier.report([1, 1, 1, 3, 3, 4], np.array([1.2, 0.9, 3.3, 2.2, 3.0, 2.6])))
    assert lines[0].startswith("accuracy 0.500   macro F1 0.300   ")
    assert lines[0].endswith(f"mean squared error {(0.04 + 0.01 + 2.3**2 + 0.8**2 + 0 + 1.4**2) / 6:.3f}")
    assert lines[1:3] == ["keeping 3 and more: F1 0.667", "keeping 4 and more: F1 0.000"]
    assert [line.split() for line in lines[4:]] == [
        ["1", "0", "2", "0", "1", "0", "0"], ["3", "0", "0", "1", "1", "0", "0"],
        ["4", "0", "0", "0", "1", "0", "0"]]


# ---------------------------------------------------------------------------------------------------------
# texts with scores


def test_every_format_and_audience_of_the_built_in_world_has_a_score():
    assert {form: set(scores) for form, scores in classifier.BUILTIN.items()} == {
        form: {audience for _, audience, *_ in plans(form)} for form in FORMATS}


def test_builtin_scored_is_the_world_and_another_crawl_without_its_copies(monkeypatch):
    """Each world and each crawl is written once."""
    crawl_once = functools.cache(crawl)
    monkeypatch.setattr(classifier, "world", world_once)
    monkeypatch.setattr(classifier, "crawl", crawl_once)
    found = list(classifier.builtin_scored(0))
    assert len(set(found)) > 17_000 and len(dict(found)) == len(set(found))  # no text has two scores
    pages = [(text, SCORES[kind]) for kind, text in crawl_once(1) if kind != "copy"]
    assert found[sum(FORMATS.values()):] == pages
    assert not {text for _, text in crawl(0, 200_000)} & set(dict(pages))


def test_a_row_is_a_text_and_a_score_from_0_to_5():
    assert classifier.scored({"text": "a", "score": 3, "dump": "x"}) == ("a", 3)
    assert [classifier.scored({"text": "a", "score": n})[1] for n in (-0.4, 2.5, 5.5)] == [0, 2.5, 5]
    for row in ({"text": "a"}, {"score": 1}, {"text": "", "score": 1}, {"text": "a", "score": "3"},
                {"text": "a", "score": True}, {"text": "a", "score": 10}, {"text": "a", "score": -1},
                {"prompt": "print(1)", "score": 1}):
        with pytest.raises(Bad):
            classifier.scored(row)


def test_only_the_program_in_a_prompt_is_read(tmp_path):
    """The columns of HuggingFaceTB/python-edu-annotations, in a local folder with the same layout."""
    prompts = [f"Rate it. The extract:\nprint({i})\n\nAfter examining the extract: ..." for i in range(6)]
    path = hub_folder(tmp_path, "default", {"max_stars_repo_path": ["a.py"] * 6, "prompt": prompts,
                                            "score": [0, 1, 2, 3, 4, 5]})
    hub = replace(classifier.ANNOTATIONS["python-edu-annotations"], path=path, config="default")
    found = list(Documents(hub, Config(), item=classifier.scored))
    assert [(text.strip(), points) for text, points in found] == [(f"print({i})", i) for i in range(6)]


def test_the_columns_of_another_data_set_of_the_hub_are_text_and_score():
    assert classifier.labeled("someone/scores", Config()).source.columns == ("text", "score")
    assert classifier.labeled("fineweb-edu-annotations", Config()).source.path == (
        "HuggingFaceFW/fineweb-edu-llama3-annotations")


# ---------------------------------------------------------------------------------------------------------
# the commands


def test_training_reports_figures_on_texts_that_it_did_not_learn_from(tmp_path, capsys):
    rows = labeled_file(tmp_path / "labels.jsonl")
    held_out = sum(split_of(row["text"], 0.1) == "val" for row in rows)
    for name in ("one", "two"):
        classifier.main(["train", str(tmp_path / "labels.jsonl"), f"--out={tmp_path / name}.safetensors"])
    printed = capsys.readouterr().out
    assert f"learned from {300 - held_out} texts; on {held_out} others:" in printed and 10 < held_out < 60
    assert "accuracy 1.000   macro F1 1.000" in printed and "keeping 3 and more: F1 1.000" in printed
    one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two and not list(tmp_path.glob("*.tmp"))
    with safe_open(tmp_path / "one.safetensors", "np") as file:
        assert file.metadata() == {"features": "runs of 1 to 2 of the first 500 words in 262144 buckets"}


def test_labels_in_files_of_all_kinds_are_learned_together(tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = labeled_file(tmp_path / "a.jsonl")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({**row, "text": row["text"] + " once"}) + "\n" for row in rows[:200]))
    third = [{**row, "text": row["text"] + " more"} for row in rows[:100]]
    parquet.write_table(pyarrow.Table.from_pylist(third), tmp_path / "c.parquet")
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    classifier.main(["train", *files, f"--out={tmp_path / 'all.safetensors'}"])
    found = re.search(r"learned from (\d+) texts; on (\d+) others", capsys.readouterr().out)
    learned, others = found.groups()
    assert int(learned) + int(others) == 600


def test_a_saved_classifier_scores_texts_like_the_one_that_was_trained(teacher, tmp_path, capsys):
    weight, bias = classifier.load(teacher)
    rng = random.Random(5)
    for school, points in ((True, 4), (False, 1)):
        assert classifier.rounded(classifier.score(page(rng, school), weight, bias)) == points
    texts = tmp_path / "pages.jsonl"
    texts.write_text("".join(json.dumps({"text": page(rng, i == 0)}) + "\n" for i in range(4)))
    classifier.main(["score", str(texts), f"--model={teacher}"])
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert lines == [["1", "3", "75.0%"], ["4", "1", "25.0%"], [str(texts)], ["4", "records", "read"]]


def test_a_file_with_other_features_or_without_weights_is_refused(teacher, tmp_path, monkeypatch):
    (tmp_path / "text.safetensors").write_text("not tensors")
    for path, message in ((tmp_path / "none.safetensors", "there is no classifier .*none.* builtin-scored"),
                          (tmp_path / "text.safetensors", "cannot be read as a classifier")):
        with pytest.raises(UserError, match=message):
            classifier.load(path)
    monkeypatch.setattr(classifier, "SETTINGS", {"features": "letters"})
    with pytest.raises(UserError, match="not a classifier with letters"):
        classifier.load(teacher)


@pytest.mark.parametrize("words, message", [
    (["labels.jsonl", "--out=a.bin"], "a.bin must end in .safetensors"),
    (["labels.jsonl", "--out=nowhere/a.safetensors"], "its folder must exist"),
    (["labels.json", "--out=a.safetensors"], "no file or folder 'labels.json'"),
    (["few.jsonl", "--out=a.safetensors"], "are too few"),
    (["bad.jsonl", "--out=a.safetensors"], "no text and score")])
def test_a_wrong_command_is_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    labeled_file(tmp_path / "labels.jsonl", 4)
    labeled_file(tmp_path / "few.jsonl", 1)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' * 3)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        classifier.main(["train", *words])
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_ends_a_mistake_with_one_sentence_and_code_2(run_here):
    code, out, err = run_here("curate/classifier.py", "score", "builtin-world", "--model=none.safetensors")
    assert code == 2 and out == ""
    assert err.startswith("error: there is no classifier none.safetensors: python -m curate.clas")
    assert len(err.splitlines()) == 1

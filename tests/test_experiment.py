"""experiment.py: the questions, the table by hand, and all runs in small."""

import json
import multiprocessing
import random
from itertools import islice

import children
import pytest

import config
from config import UserError
from corpus.documents import load
from curate import classifier, experiment
from curate.crawl import SCORES, crawl, pages_of

TINY = ["--n_layer=1", "--d_model=32", "--d_ff=64", "--seq_len=64", "--vocab_size=400", "--max_steps=20",
        "--warmup_steps=5", "--save_every=10", "--tokenizer_bytes=100_000"]


def test_every_fact_is_asked_once_with_four_different_choices_the_right_one_first():
    asked = experiment.cloze_items()
    assert len(asked) > 500 and len({(item.contexts[0], item.choices[0]) for item in asked}) == len(asked)
    assert all(len(set(item.choices)) == 4 and item.answer == 0 for item in asked)
    choices = {item.contexts[0]: item.choices[0] for item in asked}
    assert choices["Everyone in Italy knows that its capital is"] == " Rome"
    assert choices["What kind of animal is a frog? It must be"] == " an amphibian"
    for country, _, continent in load("facts.json")["countries"]:
        assert choices[f"Everyone in {country} knows that their country lies in"] == " " + continent


def test_no_question_occurs_in_a_page():
    asked = [item.contexts[0] + item.choices[0] for item in experiment.cloze_items()]
    textbooks = islice(pages_of("textbook", random.Random(0)), 1000)
    everything = "\n".join([*textbooks, *(text for _, text in crawl(0, 1_000_000))])
    assert not [text for text in asked if text in everything]


def result(name, seed, tokens, questions, bits):
    return {"data": name, "seed": seed, "step": tokens, "tokens": tokens, "questions": questions,
            "bits_per_byte": bits}


def test_the_table_has_means_ranges_and_when_raws_end_was_matched():
    """raw ends at 40%. The mean of curated's two seeds is 45% after half of the tokens. It was as high after
    a quarter, but lower after that, so the quarter does not count."""
    results = [result("raw", seed, tokens, tokens / 250, 2.0) for seed in (8, 9) for tokens in (50, 100)]
    results += [result("curated", 8, 25, 0.5, 2.5), result("curated", 9, 25, 0.5, 2.5)]
    results += [result("curated", 8, 40, 0.2, 2.5), result("curated", 9, 40, 0.2, 2.5)]
    results += [result("curated", 8, 50, 0.5, 2.5), result("curated", 9, 50, 0.4, 2.5)]
    results += [result("curated", 8, 100, 0.7, 1.5), result("curated", 9, 100, 0.6, 1.7)]
    results += [result(name, 8, n, n / 1000, 3.0) for name in ("textbooks", "control") for n in (30, 100)]
    lines = list(experiment.table(results))
    assert lines[2].split() == ("curated 65.0% (60.0% to 70.0%) 1.600 (1.500 to 1.700) "
                                "50% and 100%").split()
    assert lines[4].startswith("control, at 30%") and "3.0% (3.0% to 3.0%)" in lines[4]
    assert lines[5].endswith("never and never")


def test_all_runs_are_trained_scored_drawn_and_not_repeated(tmp_path, monkeypatch, capsys):
    """In small: one seed, a crawl of 300 kB, a model of 20,000 parameters."""
    monkeypatch.setattr(experiment, "SEEDS", (8,))
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: children.SERVER)
    monkeypatch.setattr(experiment, "BYTES", {"crawl": 300_000, "textbooks": 50_000, "held out": 5_000})
    texts, points = zip(*((text, SCORES[kind]) for kind, text in crawl(1, 300_000)))
    classifier.save(tmp_path / "classifier.safetensors",
                    *classifier.fit([classifier.features(text) for text in texts], points))
    experiment.main([*TINY, f"--out_dir={tmp_path.as_posix()}", "--jobs=2"])
    printed = capsys.readouterr().out
    assert "clean" in printed and "control, at 50%" in printed
    assert (tmp_path / "experiment.png").stat().st_size > 10_000
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(line["data"], line["seed"], line["step"]) for line in results} == {
        (name, 8, step) for name in experiment.SETS for step in (10, 20)}
    assert len({line["bits_per_byte"] for line in results}) == len(results)  # no two runs are the same
    assert all(0 < line["bits_per_byte"] < 8 and 0.1 < line["questions"] < 0.5 for line in results)

    sets = {name: [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
            for name in (*experiment.SETS, "held_out")}
    assert {text for kind, text in crawl(0, 300_000) if kind == "clean"} == set(sets["control"])
    assert set(sets["control"]) < set(sets["raw"]) and len(sets["curated"]) < len(sets["raw"]) / 2
    known = {line for name in experiment.SETS for text in sets[name] for line in experiment.long_lines(text)}
    assert not known & {line for text in sets["held_out"] for line in experiment.long_lines(text)}

    lost = tmp_path / "raw_8" / "scores.jsonl"  # as if it had been stopped while it was scoring
    first, rest = lost.read_text().split("\n", 1)
    lost.write_text(first + "\n")
    logs = {path: path.read_bytes() for path in tmp_path.glob("*/pretrain/log.jsonl")}
    made = (tmp_path / "raw.jsonl").stat().st_mtime_ns
    experiment.main([*TINY, f"--out_dir={tmp_path.as_posix()}"])
    assert lost.read_text() == first + "\n" + rest
    assert logs == {path: path.read_bytes() for path in logs} and len(logs) == 4
    assert made == (tmp_path / "raw.jsonl").stat().st_mtime_ns


def test_a_seed_decides_the_weights_and_the_order_of_the_data():
    argv = [[experiment.__file__, *experiment.run_argv(experiment.config, "raw", seed)] for seed in (8, 9)]
    one, other = map(config.load, argv)
    assert (one.seed, one.data_seed, other.seed, other.data_seed) == (8, 8, 9, 9)
    assert one.out_dir != other.out_dir and one.data == other.data


@pytest.mark.parametrize("words, message", [
    (["--jobs=0"], "--jobs=0 must be 1 or more"), (["--lrr=1"], "lrr"),
    (["config/demo.py"], "config/demo.py is one preset too many: the settings are in curate/experiment.py")])
def test_a_wrong_flag_is_reported_before_any_work(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        experiment.main([*TINY, f"--out_dir={tmp_path.as_posix()}/new", *words])
    assert not (tmp_path / "new").exists()


def test_the_experiment_is_its_own_preset_and_keeps_every_checkpoint_and_a_constant_rate():
    cfg = config.load([experiment.__file__])
    assert cfg == experiment.config
    assert cfg.keep_checkpoints == 0 and cfg.decay_steps == 0 and 0 < cfg.save_every

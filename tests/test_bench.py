"""python -m bench: the table of two sides on a tiny model; both do the same work; its figures are true."""

import json
import os
import re
import shutil
import statistics
import subprocess
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import children
import pytest
import torch
from conftest import write_preset

import config
from bench import __main__ as bench
from bench import plan, turns
from bench.training import fresh, pairs_batch, shaped, their_model
from config import UserError
from model import IGNORE

PRESET = """
from config import Config
config = Config(vocab_size=2048, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48,
                seq_len=64, batch=4, micro_batch=4, compile=False)
"""
RATIO = r"([\d.]+) \(([\d.]+) to ([\d.]+)\)"


@pytest.fixture
def preset(tmp_path):
    (tmp_path / "tiny.py").write_text(PRESET)
    return str(tmp_path / "tiny.py")


@pytest.fixture(scope="module")
def limit():
    """The limits of this machine, measured once."""
    return turns.limits(Namespace(device="cuda" if torch.cuda.is_available() else "cpu", dtype="float32"))


@pytest.fixture(autouse=True)
def sides_need_not_import_torch(monkeypatch):
    monkeypatch.setattr(turns, "get_context", lambda method: children.SERVER)


@pytest.fixture
def run(run_here, monkeypatch, limit, tmp_path):
    """run("train", ...) -> (exit code, stdout, stderr) of python -m bench."""
    monkeypatch.setattr(plan, "RATE", tmp_path / "rate.json")
    monkeypatch.setattr(turns, "limits", lambda o: limit)
    return lambda *argv: run_here("bench/__main__.py", *argv, "--threads=1")


KINDS = ("prefill", "decode")
CONTESTS = {
    "train": ("transformers", {"step, tokens"}),
    "sample": ("transformers", {f"{kind}, batch {n}, tokens" for kind in KINDS for n in "18"}),
    "tokenizer": ("tokenizers", {"train, MB", "encode, MB"}),
    "sft": ("padded", {"chats, tokens without padding"}),
    "dpo": ("trl", {"pairs, pairs", "pairs, reference included, pairs"}),
}


@pytest.mark.parametrize("what", CONTESTS)
def test_a_contest_prints_both_sides_and_their_ratio_and_both_did_the_same_work(run, preset, what):
    against, rows = CONTESTS[what]
    pytest.importorskip({"padded": "torch"}.get(against, against))
    rounds = 1 if what == "tokenizer" else 2  # learning merges is slow
    code, said, error = run(what, f"--config={preset}", "--T=64", f"--rounds={rounds}", "--new=4",
                            "--megabytes=1")
    assert code == 0, error
    assert set(re.findall(r"^(.+) per second: median", said, re.M)) == rows
    for side in ("ours", against):
        assert len(re.findall(rf"^    {side} +[\d.,]+ \(", said, re.M)) == len(rows)
    for clock in ("", " in CPU time")[: 1 if torch.cuda.is_available() else 2]:
        ratios = re.findall(rf"ours / {against}{clock}: {RATIO}", said)
        assert len(ratios) == len(rows)
        assert all(0 < float(low) <= float(middle) <= float(high) for middle, low, high in ratios)
    assert "matrix products" in said and "reading" in said
    assert plan.RATE.exists() == (what == "train")  # of what this machine does, for bench plan
    # the same weights: the same losses of the first step (in dpo of the second, too), the same ids and merges
    results = re.findall(rf"first result: ours ([\d.e+]+), {against} ([\d.e+]+)", said)
    assert len(results) == (0 if what == "sft" else len(rows))
    assert all(float(ours) == pytest.approx(float(theirs), abs=1e-4) for ours, theirs in results), results
    if what == "dpo":
        assert all(abs(float(ours) - 0.6931) > 1e-3 for ours, _ in results)


def test_a_busy_neighbor_makes_the_same_steps_take_longer_and_ends_with_the_benchmark(run, preset):
    code, said, error = run("neighbor", f"--config={preset}", "--T=64", "--rounds=1")
    assert code == 0, error
    disturbed, alone = re.search(r"first result: disturbed ([\d.]+), alone ([\d.]+)", said).groups()
    assert disturbed == alone and "disturbed / alone in CPU time" in said
    loops = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"while os.getppid()" in read(path)]
    assert loops == []


def read(path):
    try:
        return path.read_bytes()
    except OSError:  # it has just ended
        return b""


def test_bfloat16_is_compared_with_bfloat16(run, preset):
    pytest.importorskip("transformers")
    code, said, error = run("sample", f"--config={preset}", "--dtype=bfloat16", "--T=64", "--rounds=1",
                            "--new=4")
    assert code == 0 and said.count("ours / transformers: ") == 4, error
    assert "GFLOP/s in bfloat16" in said


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "--dtype=int8"], "invalid choice: 'int8'"),
        (["train", "--rounds=0"], "--rounds=0 must be at least 1"),
        (["train", "--config=config/gone.py"], "there is no preset 'config/gone.py'"),
        (["fly"], "invalid choice: 'fly'"),
        (["tokenizer", "--megabytes=9999999"], "--megabytes=9999999 is too much: the installed packages"),
    ],
)
def test_mistakes_end_in_one_sentence_and_exit_code_2(run, argv, says):
    code, _, error = run(*argv)
    assert code == 2 and says in error and "Traceback" not in error


def test_a_side_that_is_not_installed_is_named(run, preset, monkeypatch):
    """A module of that name that cannot be imported hides the installed package."""
    hidden = Path(preset).parent / "transformers.py"
    hidden.write_text("raise ImportError('no such package')")
    monkeypatch.syspath_prepend(hidden.parent)  # of the processes, too
    code, _, error = run("train", f"--config={preset}", "--T=16", "--rounds=1")
    assert code == 2 and "transformers is not installed: no such package" in error
    assert "Traceback" not in error


# ---------------------------------------------------------------------------------------------------------
# clocks and turns


def test_seconds_are_those_of_the_work_and_cpu_seconds_leave_waiting_out():
    wall, cpu = turns.seconds_of(lambda: time.sleep(0.2), "cpu")
    assert 0.2 <= wall < 2 and cpu < 0.1

    def work():
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass

    wall, cpu = turns.seconds_of(work, "cpu")
    assert wall > 0.19 and 0.2 <= cpu < 0.5


def noting(o, name):
    """A side that writes down when it works."""

    def work(row):
        with open(o.diary, "a", encoding="utf-8") as file:
            file.write(f"{row} {name}\n")
        return 7

    return {row: (partial(work, row), 100, "things") for row in ("a", "b")}


def test_both_sides_warm_up_once_and_then_take_turns_row_by_row(tmp_path):
    o = Namespace(diary=tmp_path / "diary.txt", threads=1, rounds=2, device="cpu")
    facts, times = turns.compare({"x": partial(noting, name="x"), "y": partial(noting, name="y")}, o)
    warm_up = ["a x", "b x", "a y", "b y"]
    assert o.diary.read_text().splitlines() == warm_up + 2 * ["a x", "a y", "b x", "b y"]
    assert facts["x"] == facts["y"] == {"a": (100, "things", 7), "b": (100, "things", 7)}
    assert all(len(times[row][side]) == 2 for row in "ab" for side in "xy")


def failing(o):
    os._exit(1)


def test_a_side_whose_process_dies_is_named():
    with pytest.raises(UserError, match="the process of y ended"):
        turns.compare({"y": failing}, Namespace(threads=1, rounds=1, device="cpu"))


def mistaken(o):
    raise UserError("this is too much")


def test_a_mistake_of_a_side_is_one_sentence():
    with pytest.raises(UserError, match="^this is too much$"):
        turns.compare({"ours": mistaken}, Namespace(threads=1, rounds=1, device="cpu"))


# ---------------------------------------------------------------------------------------------------------
# the table


def test_the_table_divides_each_round_and_shows_median_and_range(capsys):
    """Ours does 100 tokens in 1, 2 and 4 seconds, theirs in 2, 2 and 2: ratios of 2, 1 and 0.5."""
    facts = {"ours": {"write": (100, "tokens", 5)}, "theirs": {"write": (100, "tokens", 6)}}
    times = {"write": {"ours": [(1, 0.5), (2, 0.5), (4, 0.5)], "theirs": [(2, 1.5)] * 3}}
    o = Namespace(config="config/demo.py", device="cpu", dtype="float32")
    bench.show(facts, times, o, {})
    assert capsys.readouterr().out.splitlines() == [
        "",
        "write, tokens per second: median (range)",
        "    ours          50.00 (25.00 to 100.00)",
        "    theirs        50.00 (50.00 to 50.00)",
        "    ours / theirs: 1.00 (0.50 to 2.00)",
        "    ours / theirs in CPU time: 3.00 (3.00 to 3.00)",
        "    first result: ours 5, theirs 6",
    ]


def test_the_share_of_the_limit_counts_operations_and_bytes():
    """SmolLM-135M: training does 6 N + 6 L C T operations per token; writing reads 4 bytes of each weight."""
    o = Namespace(config="config/smol_135m.py", T=2048, dtype="float32")
    limit = {"operations": 1e15, "bytes": 134_515_008 * 4 * 10}
    operations = 6 * 134_515_008 + 6 * 30 * 576 * 2048
    assert bench.share("step", o, 350_000, limit) == f"{350_000 * operations / 1e15:.0%} of the limit"
    assert bench.share("decode, batch 8", o, 8 * 5, limit) == "50% of the limit"
    assert bench.share("prefill, batch 8", o, 1, limit) == ""
    o.dtype = "bfloat16"
    assert bench.share("decode, batch 8", o, 8 * 5, limit) == "25% of the limit"


# ---------------------------------------------------------------------------------------------------------
# the same work


def test_their_model_has_our_weights(preset):
    pytest.importorskip("transformers")
    cfg = shaped(Namespace(config=preset, T=64, batch=4, device="cpu", dtype="float32"))
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(their_model(cfg, seed=3)(ids).logits, fresh(cfg, seed=3)(ids))


def test_trl_is_given_the_answers_where_it_looks_for_them(preset):
    """A pair's target at position t is the id at t + 1, wherever that is not padding or the end."""
    o = Namespace(config=preset, T=64, batch=4, device="cpu", dtype="float32")
    ids, targets, _ = pairs_batch(o, shaped(o))
    here = (targets[:, :-1] != IGNORE) & (targets[:, 1:] != IGNORE)
    assert ids.shape[0] == 8 and here.any() and torch.equal(targets[:, :-1][here], ids[:, 1:][here])


# ---------------------------------------------------------------------------------------------------------
# bench/gpu.sh


def test_a_row_of_the_gpu_table_has_the_figures_of_the_last_steps_and_leaves_no_checkpoint(small, tmp_path):
    cfg = replace(small, max_steps=4, warmup_steps=1, decay_steps=0, eval_every=0)
    out = Path(cfg.out_dir) / "pretrain"
    done = children.run("-m", "bench.row", "20", "train", write_preset(tmp_path / "preset.py", cfg))
    assert done.returncode == 0 and [path.name for path in out.glob("*") if path.is_dir()] == [], done.stderr
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rate, memory = 8 * 32 / statistics.median(line["seconds"] for line in log[2:]), log[-1]["peak_gb"]
    assert f"cells: {rate:,.0f} | peak unknown | {memory:.1f}" in done.stdout.splitlines()


def test_a_row_of_fine_tuning_begins_with_random_weights(small, tmp_path):
    cfg = replace(small, fractions=True, data=(("builtin-chats", 0.01),), seq_len=128, max_steps=2,
                  warmup_steps=0, decay_steps=0)
    done = children.run("-m", "bench.row", "20", "sft", write_preset(tmp_path / "preset.py", cfg))
    assert done.returncode == 0 and "cells: " in done.stdout, done.stderr


def test_the_script_for_gpus_is_valid_and_each_of_its_rows_has_a_preset_with_valid_flags():
    script = Path(bench.__file__).with_name("gpu.sh")
    rows = re.findall(r'^row "[^"]+" (\d+) \d+ (?:train|sft) (.+)$', script.read_text(), re.M)
    assert len(rows) == script.read_text().count("\nrow \"") == 12
    for n, words in rows:
        config.load([*words.split(), f"--batch={n}", f"--micro_batch={n}", "--max_steps=16",
                     "--warmup_steps=1", "--decay_steps=0"])
    if bash := shutil.which("bash"):
        assert subprocess.run([bash, "-n", str(script)]).returncode == 0

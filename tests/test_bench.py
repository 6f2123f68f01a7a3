"""bench.py: the table of a contest between two processes, on a tiny model; its figures are what they say."""

import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as bench
from config import UserError
from bench.training import IGNORE, pairs_batch, shaped

ROOT = Path(__file__).parent.parent
PRESET = """
from config import Config
config = Config(vocab_size=2048, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48,
                seq_len=64, batch=4, micro_batch=4, compile=False)
"""


@pytest.fixture
def preset(tmp_path):
    (tmp_path / "tiny.py").write_text(PRESET)
    return str(tmp_path / "tiny.py")


def run(*argv):
    return subprocess.run(
        [sys.executable, "bench.py", *argv, "--threads=1"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


KINDS = ("prefill", "decode")
CONTESTS = {
    "train": ("transformers", {"step, tokens"}),
    "sample": ("transformers", {f"{kind}, batch {n}, tokens" for kind in KINDS for n in "18"}),
    "tokenizer": ("tokenizers", {"train, bytes", "encode, bytes"}),
    "sft": ("padded", {"real tokens, tokens"}),
    "dpo": ("trl", {"pairs, pairs", "pairs, reference included, pairs"}),
}


@pytest.mark.parametrize("what", CONTESTS)
def test_a_contest_prints_both_sides_and_their_ratio(preset, what):
    against, rows = CONTESTS[what]
    pytest.importorskip({"padded": "torch"}.get(against, against))
    done = run(what, f"--config={preset}", "--T=64", "--rounds=2", "--new=4", "--megabytes=1")
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"^(.+) a second: median", done.stdout, re.M)) == rows
    for side in ("ours", against):
        assert len(re.findall(rf"^    {side} +[\d.,]+ (?:[MG] )?\(", done.stdout, re.M)) == len(rows)
    ratios = re.findall(rf"ours / {against}: ([\d.]+) \(([\d.]+) to ([\d.]+)\), memory [\d.]+", done.stdout)
    assert len(ratios) == len(rows)
    assert all(0 < float(low) <= float(middle) <= float(high) for middle, low, high in ratios)
    assert "matrix products" in done.stdout and "reading" in done.stdout
    if what == "dpo":
        ours, theirs = map(float, re.search(r"loss: ours ([\d.]+), trl ([\d.]+)", done.stdout).groups())
        assert ours == pytest.approx(theirs, abs=1e-4) and abs(ours - 0.6931) > 1e-3


def test_int8_stands_against_bfloat16(preset):
    pytest.importorskip("transformers")
    done = run("sample", f"--config={preset}", "--dtype=int8", "--T=64", "--rounds=1", "--new=4")
    assert done.returncode == 0 and done.stdout.count("ours / transformers: ") == 4, done.stderr


def test_the_loop_says_what_a_step_costs_beside_the_model(preset):
    done = run("loop", f"--config={preset}", "--rounds=1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"of a step of [\d.]+ s, [\d.]+% is neither forward, backward, clipping", done.stdout)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "--against=nanoGPT"], "--against=nanoGPT: train is compared with transformers"),
        (["train", "--dtype=int8"], "--dtype=int8 is for bench.py sample"),
        (["train", "--rounds=0"], "--rounds=0 must be at least 1"),
        (["train", "--config=config/gone.py"], "there is no preset 'config/gone.py'"),
        (["fly"], "invalid choice: 'fly'"),
        (["tokenizer", "--megabytes=9999999"], "--megabytes=9999999 is too much: the installed packages"),
    ],
)
def test_mistakes_end_in_one_sentence_and_exit_code_2(argv, says):
    done = run(*argv)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_a_side_that_is_not_installed_is_named(preset):
    """-S hides the installed packages of a child: here a module of that name that cannot be imported."""
    hidden = Path(preset).parent / "transformers.py"
    hidden.write_text("raise ImportError('no such package')")
    done = subprocess.run(
        [sys.executable, "bench.py", "train", f"--config={preset}", "--T=16", "--rounds=1"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        env={"PYTHONPATH": str(hidden.parent), "PATH": ""},
    )
    assert done.returncode == 2 and "transformers is not installed: no such package" in done.stderr
    assert "Traceback" not in done.stderr


def test_memory_is_the_high_water_mark_also_of_what_is_gone_again():
    """In a process of its own: this one may have held more before."""
    code = "import bench, torch; before = bench.high_water('cpu'); torch.ones(50_000_000); " \
           "print(before, bench.high_water('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    before, after = map(int, done.stdout.split())
    if not after:
        pytest.skip("this system does not say how much memory a process held")
    assert 0.15e9 < after - before < 0.3e9


def test_seconds_are_those_of_the_work_and_its_result_comes_back():
    seconds, result = bench.seconds_of(lambda: time.sleep(0.05) or 7, "cpu")
    assert 0.05 <= seconds < 0.5 and result == 7


def test_the_share_of_the_limit_counts_operations_and_bytes():
    """SmolLM-135M: 6 N + 6 L C T operations a token in training; 4 bytes of each weight a position read."""
    o = SimpleNamespace(config="config/smol_135m.py", T=2048, dtype="float32")
    limit = {"operations": 1e15, "bytes": 134_515_008 * 4 * 10}
    operations = 6 * 134_515_008 + 6 * 30 * 576 * 2048
    assert bench.share("step", o, 350_000, limit) == f"{350_000 * operations / 1e15:.0%}"
    assert bench.share("decode, batch 8", o, 8 * 5, limit) == "50%"
    assert bench.share("prefill, batch 8", o, 1, limit) == ""


def test_trl_is_given_the_answers_where_it_looks_for_them(preset):
    """A pair's target at position t is the id at t + 1: so much of the batch is not padding or prompt."""
    o = SimpleNamespace(config=preset, T=64, batch=4, device="cpu", dtype="float32")
    ids, targets, _ = pairs_batch(o, shaped(o))
    here = (targets[:, :-1] != IGNORE) & (targets[:, 1:] != IGNORE)
    assert ids.shape[0] == 8 and here.any() and torch.equal(targets[:, :-1][here], ids[:, 1:][here])


def test_a_mistake_of_a_side_is_one_sentence():
    o = bench.parse(["tokenizer", "--megabytes=9999999", "--rounds=1"])
    with pytest.raises(UserError, match="is too much"):
        bench.compare("tokenizer", ["ours"], o)

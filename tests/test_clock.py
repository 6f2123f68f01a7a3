"""--max_seconds: a run that ends by the clock, and a schedule that follows it; dtype=auto."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_preset

import config
import train
from config import Config, UserError
from plumbing import checkpoint
from plumbing.processes import Run, pick_dtype, start

TRAPEZOID = dict(max_steps=1000, warmup_steps=100, decay_steps=200, lr=1.0)


def lr_after(share, **fields):
    """The learning rate after a share of a run of 60 seconds, however many steps that were."""
    cfg = Config(**TRAPEZOID, max_seconds=60.0, **fields)
    return train.lr_at(train.Clock(cfg, Run("x", Path("x")), used=60 * share).position(7), cfg)


def test_after_a_share_of_the_time_the_schedule_is_where_it_is_after_that_share_of_the_steps():
    cfg = Config(**TRAPEZOID)
    for share in (0, 0.05, 0.1, 0.5, 0.8, 0.9, 1):
        assert lr_after(share) == pytest.approx(train.lr_at(round(1000 * share), cfg))
    assert lr_after(0.05) == pytest.approx(0.5) and lr_after(0.5) == 1.0 and lr_after(1.0) == 0
    assert lr_after(1.3) == 0  # the last step may take longer than planned


def test_without_max_seconds_the_position_is_the_step():
    clock = train.Clock(Config(**TRAPEZOID), Run("x", Path("x")), used=99.0)
    assert clock.position(7) == 7 and not clock.is_over(999) and clock.is_over(1000)


def log_of(cfg):
    return [json.loads(line) for line in Path(cfg.out_dir, "pretrain", "log.jsonl").read_text().splitlines()]


def test_a_run_ends_after_its_seconds_and_a_longer_limit_continues_it(small, tmp_path, capsys, monkeypatch):
    cfg = replace(small, max_seconds=1.5, max_steps=1000, save_every=0, eval_every=0, warmup_steps=0,
                  warmup_ratio=0.1, decay_steps=None)
    preset, ticks = write_preset(tmp_path / "preset.py", cfg), itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(ticks) / 100)  # no machine is too slow
    train.main([preset])
    lines = log_of(cfg)
    times = [line["elapsed"] for line in lines]
    assert times == sorted(times) and times[-2] < 1.5 <= times[-1]
    position = [1000 * time / 1.5 for time in [0, *times[:-1]]]
    for line, at in zip(lines[1:], position[1:]):  # the clock is read once more for the log
        assert line["lr"] == pytest.approx(train.lr_at(at, cfg), abs=0.2 * cfg.lr)
    assert lines[0]["lr"] < 0.1 * cfg.lr and max(line["lr"] for line in lines) == cfg.lr
    assert lines[-1]["lr"] < 0.5 * cfg.lr
    capsys.readouterr()
    train.main([preset])
    assert "nothing is left to do" in capsys.readouterr().out and log_of(cfg) == lines
    train.main([preset, "--max_seconds=2.5"])
    more = log_of(cfg)
    assert more[:len(lines)] == lines and more[-1]["elapsed"] >= 2.5 and len(more) > len(lines)


def test_auto_means_bfloat16_where_the_cpu_has_instructions_for_it(monkeypatch):
    cpu = torch.device("cpu")
    for has, expected in (({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"),
                          ({"bf16": True}, "bfloat16"), ({"avx512_f": True, "avx512_bf16": False}, "float32"),
                          ({}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        assert pick_dtype("auto", cpu) == expected
        assert pick_dtype("float32", cpu) == "float32" and pick_dtype("bfloat16", cpu) == "bfloat16"
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_dtype("auto", cpu) == "float32"
    assert pick_dtype("auto", torch.device("mps")) == "float32"


def test_the_checkpoint_records_the_dtype_that_auto_became(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)
    cfg = replace(small, dtype="auto", max_steps=20, save_every=0, eval_every=0, decay_steps=4)
    with start("x", cfg) as run:
        assert run.dtype == "bfloat16"
    train.main([write_preset(tmp_path / "preset.py", cfg)])
    facts = json.loads((tmp_path / "out" / "pretrain" / "step_0000020" / "train.json").read_text())
    assert facts["config"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("flag", ["--max_seconds=-1", "--max_seconds=soon", "--dtype=float16"])
def test_a_wrong_value_is_reported(flag):
    with pytest.raises(UserError, match=flag.split("=")[0].strip("-")):
        config.load(["config/demo.py", flag])


def test_a_mixture_that_begins_at_a_step_cannot_follow_the_clock():
    with pytest.raises(UserError, match="max_seconds=60 and a mixture that begins at a step"):
        config.load(["config/demo.py", "--max_seconds=60", "--data=builtin-world:1,builtin-code:1@500"])


@pytest.mark.parametrize("last", ["null", '"9"', "[1]"])
def test_a_log_with_a_damaged_time_counts_as_no_time(tmp_path, last):
    run = Run("pretrain", tmp_path)
    lines = '{"step": 1, "elapsed": 3.5}', f'{{"step": 2, "elapsed": {last}}}'
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert checkpoint.Log(run, 2).elapsed == 0
    assert checkpoint.Log(run, 1).elapsed == 3.5  # and the second line is dropped
    assert checkpoint.Log(run, 2).elapsed == 3.5

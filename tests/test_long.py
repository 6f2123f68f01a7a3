"""Short versions of the scripts in tests/long: faults, hostile files and texts, data of real size."""

import importlib
import sys
from dataclasses import replace

import children
import pytest
from children import ROOT

from learn.bug import every_bug

SHORT = ["kill.py --short", "disk.py --short", "text.py --strings=300", "fuzz.py --tries=12", "rows.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="they fork, kill and mount")
@pytest.mark.parametrize("command", SHORT, ids=lambda command: command.split()[0])
def test_a_long_script_finds_no_failure_in_its_short_version(command, tmp_path):
    name, *flags = command.split()
    done = children.run(ROOT / "tests" / "long" / name, *flags, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture
def script(monkeypatch):
    """script("mutants"): a script of tests/long as a module."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "long")
    return importlib.import_module


def test_torchrun_replaces_a_worker_that_is_killed_and_the_result_has_the_same_bits(script, tmp_path):
    cfg = script("stages").presets(tmp_path)["pretrain"]
    assert script("workers").killed(tmp_path, replace(cfg, micro_batch=1), 2, [(1, "step", 5)]) == (1, 0)


def test_a_mutant_is_applied_to_a_copy_and_its_tests_turn_red(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--only=the decay"])
    with pytest.raises(SystemExit) as ended:
        script("mutants").main()
    assert ended.value.code == 0, capsys.readouterr().out


def test_every_mutant_still_has_its_place_in_the_code():
    """Running all of them takes minutes; that their list fits the code is checked here."""
    every = every_bug()
    assert len(every) >= 70
    for bug in every:
        assert (ROOT / bug.file).read_text(encoding="utf-8").count(bug.old) == 1 and bug.old != bug.new, bug
        assert (ROOT / "tests" / bug.tests).exists(), bug

"""Short versions of the scripts in tests/long: faults, hostile files and texts, data of real size."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHORT = ["kill.py --kills=9 --every=50 --flips=1", "disk.py --sizes=2", "workers.py --short",
         "text.py --strings=3000", "fuzz.py --tries=250", "mutants.py --only=ties", "rows.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="they fork, kill and mount")
@pytest.mark.parametrize("command", SHORT, ids=lambda command: command.split()[0])
def test_a_long_script_finds_no_failure_in_its_short_version(command, tmp_path):
    name, *flags = command.split()
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "long" / name), *flags], cwd=tmp_path,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_every_mutant_still_has_its_place_in_the_code():
    """All of mutants.py takes an hour; that its list fits the code is checked here."""
    sys.path.insert(0, str(ROOT / "tests" / "long"))
    from mutants import mutants

    every = mutants()
    assert len(every) >= 70
    for what, file, tests, old, new in every:
        assert (ROOT / file).read_text(encoding="utf-8").count(old) == 1 and old != new, what
        assert (ROOT / "tests" / tests).exists(), what

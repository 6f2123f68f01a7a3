"""
kill.py: pretraining, SFT and DPO, interrupted in every way. The same command ends with the same bits.

    python tests/long/kill.py                       200 kills at random moments, and one at each write in turn
    python tests/long/kill.py --short               a few of each kind, each in one of the stages

    random     SIGKILL at random moments, again and again, until the run reaches its end
    writes     SIGKILL just before each file opened for writing, rename, removal and fsync, one after another
    damage     each file of the newest checkpoint is removed, cut off, or gets one bit flipped: the file is
               reported, and the checkpoint before is used
    clock      the clock runs backwards, and files are dated in the future

The result is compared with that of an undisturbed run: weights, optimizer states, and all log lines except
their times. Prints one line for each, and exits with 1 if anything differs.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from stages import MAINS, STEPS, child, ended, outcome, presets, same, write_preset
from tqdm import tqdm

from plumbing import checkpoint, processes


class Bench:
    """The three stages in a folder. Each can be run, disturbed or not, and compared."""

    def __init__(self, folder):
        self.folder, self.log = folder, open(folder / "output.txt", "ab")
        self.presets, self.expected, self.seconds = presets(folder), {}, {}
        for stage in MAINS:
            began = time.monotonic()
            if code := ended(self.start(stage, "first")):
                said = Path(self.log.name).read_text(encoding="utf-8")[-2000:]
                sys.exit(f"{stage} does not run undisturbed: exit code {code}\n{said}")
            self.seconds[stage] = time.monotonic() - began
            self.expected[stage] = outcome(folder / "first" / stage)

    def start(self, stage, name, before=lambda: None):
        """Start a child that calls before() and runs a stage in the folder `name`; returns its process id."""
        cfg = replace(self.presets[stage], out_dir=str(self.folder / name))

        def work():
            for descriptor in (1, 2):
                os.dup2(self.log.fileno(), descriptor)
            before()
            sys.argv = [f"{stage}.py", write_preset(self.folder / f"{name}_{stage}.py", cfg)]
            processes.command(MAINS[stage])

        return child(work)

    def fresh(self, name):
        """Remove and return the folder `name`."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name

    def is_right(self, stage, name):
        return same(outcome(self.folder / name / stage), self.expected[stage])


def at_random(bench, stage, kills, rng):
    """Kill at random moments until `kills` have hit: (tries, failures). A try is a run to its end."""
    tries = failures = hits = 0
    bar = tqdm(total=kills, desc=f"{stage}: random", leave=False)
    while hits < kills:
        folder, code = bench.fresh("random"), -signal.SIGKILL
        while code == -signal.SIGKILL:
            pid = bench.start(stage, folder.name)
            if hits < kills and rng.random() < 0.9:
                time.sleep(rng.uniform(0, bench.seconds[stage]))
                os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            hits += code == -signal.SIGKILL
            bar.update(code == -signal.SIGKILL)
        tries += 1
        failures += code != 0 or not bench.is_right(stage, folder.name)
    return tries, failures, f"{hits} kills"


def dying(n):
    """A function that makes this process kill itself at its n-th event on the disk."""
    def before():
        seen, fsync = [0], os.fsync

        def event():
            seen[0] += 1
            if seen[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(name, args):
            writes = name == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
                event()

        def counted_fsync(handle):
            event()
            fsync(handle)

        os.fsync = counted_fsync
        sys.addaudithook(hook)
    return before


def at_each_write(bench, stage, every, rng):
    """Kill at one event of a run in a new folder, and run to the end; then at the event `every` later."""
    tries = failures = 0
    n, code = 1 + rng.randrange(every), -signal.SIGKILL
    bar = tqdm(desc=f"{stage}: writes", leave=False)
    while code == -signal.SIGKILL:
        folder = bench.fresh("writes")
        code = ended(bench.start(stage, folder.name, dying(n)))
        if code == -signal.SIGKILL:
            again = ended(bench.start(stage, folder.name))
            tries += 1
            failures += again != 0 or not bench.is_right(stage, folder.name)
        n += every
        bar.update()
    return tries, failures + (code != 0), f"of {n - every} events on the disk"


def damaged(path, how, rng):
    """Do to a file what a bad disk does."""
    content = bytearray(path.read_bytes())
    if how == "removed":
        return path.unlink()
    if how == "cut off":
        content = content[:rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def by_damage(bench, stage, rounds, rng):
    """Damage one file of the newest checkpoint; the one before it is two steps older."""
    tries = failures = 0
    folder = bench.fresh("damage")
    ended(bench.start(stage, folder.name))
    shutil.rmtree(bench.folder / "kept", ignore_errors=True)
    shutil.copytree(folder, bench.folder / "kept")
    names = sorted(path.name for path in checkpoint.find(folder / stage).iterdir()
                   if path.name != "README.md")  # the card, which a finished run writes again
    cases = [(name, how) for name in names for how in ("removed", "cut off", *["flipped"] * rounds)]
    cases = cases if rounds else rng.sample(cases, 3)
    for name, how in tqdm(cases, f"{stage}: damage", leave=False):
        shutil.rmtree(folder)
        shutil.copytree(bench.folder / "kept", folder)
        step = folder / stage / f"step_{STEPS:07}"
        damaged(step / name, how, rng)
        said = bench.log.tell()
        code = ended(bench.start(stage, folder.name))
        text = Path(bench.log.name).read_bytes()[said:].decode()
        tries += 1
        # a flipped bit in a digest puts the blame on another file
        where = step if how == "removed" or name == "B2SUMS" else f"{step / name} "
        named = f"warning: {where}" in text
        if code or not named or not bench.is_right(stage, folder.name):
            failures += 1
            print(f"    {name} {how}: exit code {code}\n{text[-2000:]}")
    return tries, failures, "each file removed, cut off, one bit flipped"


def by_the_clock(bench, stage, kills, rng):
    """The clock goes back one day per second, and what was written is dated in the future."""
    def before():
        now = time.time()
        time.time = lambda: 2 * now - 86400 * time.monotonic()

    folder = bench.fresh("clock")
    for _ in range(2):
        pid = bench.start(stage, folder.name, before)
        time.sleep(bench.seconds[stage] * rng.uniform(0.4, 0.9))
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        for path in folder.glob("**/*"):
            os.utime(path, (4e9, 4e9 - rng.random() * 1e9))
    code = ended(bench.start(stage, folder.name, before))
    return 1, int(code != 0 or not bench.is_right(stage, folder.name)), "clock set back"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at random moments, all stages together")
    parser.add_argument("--every", type=int, default=1, help="kill at each n-th event on the disk")
    parser.add_argument("--flips", type=int, default=5, help="bits flipped in each file (0: three files)")
    parser.add_argument("--short", action="store_true",
                        help="each work in one stage, --kills=1 --every=150 --flips=0")
    parser.add_argument("--seed", type=int, default=0)
    args, bad = parser.parse_args(), 0
    if args.short:
        args.kills, args.every, args.flips = 1, 150, 0
    with tempfile.TemporaryDirectory() as folder:
        bench, rng = Bench(Path(folder)), random.Random(args.seed)
        works = ((at_random, -(-args.kills // len(MAINS))), (at_each_write, args.every),
                 (by_damage, args.flips), (by_the_clock, 1))
        for number, stage in enumerate(MAINS):
            for work, amount in works[number::len(MAINS)] if args.short else works:
                tries, failures, what = work(bench, stage, amount, rng)
                print(f"{stage:<9}{work.__name__:<14}{tries:>5} tries {failures:>4} failures   {what}",
                      flush=True)
                bad += failures
        if bad:
            shutil.copy(bench.log.name, "kill_output.txt")
            print("what the runs said is in kill_output.txt")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()

"""
disk.py: a full disk, a read-only disk, and two runs in one folder.

    python tests/long/disk.py                       40 sizes of the disk for each stage
    python tests/long/disk.py --short               one size, and each fault in one of the stages

    full        the run gets a disk (a tmpfs) that is too small, and stops with one sentence and exit code 2;
                after the disk has grown, the same command ends with the bits of an undisturbed run
    read-only   one sentence and exit code 2; once the disk is writable, the same command resumes
    two         a second run in the folder of the first is refused, and the first ends undisturbed

The first two need `unshare -rm`, the right to mount a disk, and are skipped without it. Prints one line for
each, and exits with 1 if anything differs.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill import Bench
from stages import MAINS, ended


def said_by(bench, stage, name):
    """(exit code, its error or its last line, whether there is a traceback) of a run."""
    start = os.path.getsize(bench.log.name)
    code = ended(bench.start(stage, name))
    text = Path(bench.log.name).read_bytes()[start:].decode()
    errors = re.findall("error: .*", text)  # another run may have written after it
    return code, (errors or text.split("\n"))[-1], "Traceback" in text


def mount(folder, *options):
    subprocess.run(["mount", *options, str(folder)], check=True)


def full(bench, stage, sizes, rng):
    """Disks of random sizes up to what a run needs."""
    tries = failures = 0
    used = sum(path.stat().st_blocks * 512 for path in (bench.folder / "first").glob("**/*"))
    while tries < sizes:
        disk = bench.folder / "disk"
        disk.mkdir(exist_ok=True)
        size = rng.randrange(4096, used // 4096 * 4096)
        mount(disk, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
        code, line, trace = said_by(bench, stage, "disk")
        mount(disk, "-o", "remount,size=100M")
        right = trace is False and (code == 0 or code == 2 and "No space left" in line)
        again = ended(bench.start(stage, "disk"))
        if code == 2 or not right:  # otherwise it was large enough
            tries += 1
            failures += not right or again != 0 or not bench.is_right(stage, "disk")
            if not right:
                print(f"    {size} bytes: exit code {code}: {line}")
        subprocess.run(["umount", str(disk)], check=True)
    return tries, failures


def read_only(bench, stage):
    disk = bench.folder / "disk"
    disk.mkdir(exist_ok=True)
    mount(disk, "-t", "tmpfs", "tmpfs")
    mount(disk, "-o", "remount,ro")
    code, line, trace = said_by(bench, stage, "disk")
    mount(disk, "-o", "remount,rw")
    again = ended(bench.start(stage, "disk"))
    right = code == 2 and "Read-only" in line and not trace and again == 0 and bench.is_right(stage, "disk")
    if not right:
        print(f"    exit code {code}: {line}")
    subprocess.run(["umount", str(disk)], check=True)
    return 1, int(not right)


def two(bench, stage):
    folder = bench.fresh("two")
    first = bench.start(stage, "two")
    while not (folder / stage / "lock").exists():
        time.sleep(0.01)
    code, line, trace = said_by(bench, stage, "two")
    right = code == 2 and "another process is writing" in line and not trace
    if ended(first) or not right or not bench.is_right(stage, "two"):
        print(f"    exit code {code}: {line}")
        return 1, 1
    return 1, 0


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=40, help="sizes of the disk for each stage")
    parser.add_argument("--short", action="store_true", help="--sizes=1, each fault in one stage")
    parser.add_argument("--mounted", action="store_true", help=argparse.SUPPRESS)
    args, bad = parser.parse_args(), 0
    args.sizes = 1 if args.short else args.sizes
    if not args.mounted and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0:
        sys.exit(subprocess.run(["unshare", "-rm", sys.executable, *sys.argv, "--mounted"]).returncode)
    with tempfile.TemporaryDirectory() as folder:
        bench, rng = Bench(Path(folder)), random.Random(0)
        works = {"two": two}
        if args.mounted:
            works |= {"full": lambda *what: full(*what, args.sizes, rng), "read-only": read_only}
        for number, stage in enumerate(MAINS):
            for what, work in list(works.items())[number::len(MAINS)] if args.short else works.items():
                tries, failures = work(bench, stage)
                print(f"{stage:<9}{what:<12}{tries:>5} tries {failures:>4} failures", flush=True)
                bad += failures
        if not args.mounted:
            print("full and read-only disks are skipped: no disk can be mounted here")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()

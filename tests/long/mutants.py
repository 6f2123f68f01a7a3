"""
mutants.py: do our tests notice? Each mutant is a plausible bug of one line; the related tests must turn red.

    python tests/long/mutants.py                    all of them, one after another
    python tests/long/mutants.py --only=dpo         those whose file or name contains a word

mutants.txt lists them, in the form that learn/bug.py describes. Each is applied to a copy of the project.
Prints a Markdown table of what was broken and which test failed first, and exits with 1 if one survived. A
mutant whose old text is no longer in its file is an error, so that the list stays true.
"""

import argparse
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from children import run  # noqa: E402  one folder up


def first_failure(said):
    """The first failing test in pytest's output, or None: a mutant that cannot be imported does not count."""
    found = re.search(r"^(?:FAILED|ERROR) \S*?::(\w+)", said, re.M)
    return found and found[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word of the file's name or of what is broken")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one")
    args, survived = parser.parse_args(), 0
    # not at the top, which every child runs: it would have the project's modules, and not those of the copy
    from learn.bug import every_bug

    for bug in every_bug():
        if (n := (ROOT / bug.file).read_text(encoding="utf-8").count(bug.old)) != 1:
            sys.exit(f"{bug.file} contains {n} times, not once: {bug.old}")
    print("| what is broken | file | first red test | s |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
        for bug in every_bug()[args.first:]:
            if args.only not in f"{bug.file} {bug.what}":
                continue
            path, began = copy / bug.file, time.monotonic()
            right = path.read_text(encoding="utf-8")
            path.write_text(right.replace(bug.old, bug.new), encoding="utf-8")
            done = run("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{bug.tests}", cwd=copy,
                       timeout=1200)
            path.write_text(right, encoding="utf-8")
            red = first_failure(done.stdout)
            survived += not red
            name = f"`{red}`" if red else "**none: it survives**"
            print(f"| {bug.what} | {bug.file} | {name} | {time.monotonic() - began:.0f} |", flush=True)
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()

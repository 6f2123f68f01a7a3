"""
mutants.py: do our tests notice? Each mutant is a plausible bug of one line; the related tests must turn red.

    python tests/long/mutants.py                    all of them, one after another
    python tests/long/mutants.py --only=dpo         those whose file or name contains a word

mutants.txt lists them: what is broken, its file, the tests; old lines begin with -, new lines with +. Each is
applied to a copy of the project. Prints a Markdown table of what was broken and which test failed first, and
exits with 1 if one survived. A mutant whose old text is no longer in its file is an error, so that the list
stays true.
"""

import argparse
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from children import run  # noqa: E402  one folder up

ROOT = Path(__file__).parents[2]


def mutants():
    """[(what is broken, file, tests, old text, new text)] of mutants.txt."""
    found = []
    for block in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split("\n\n"):
        head, *lines = block.rstrip("\n").split("\n")
        old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        found.append((*head.split(" | "), old, new))
    return found


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
    for _, file, _, old, _ in mutants():
        if (n := (ROOT / file).read_text(encoding="utf-8").count(old)) != 1:
            sys.exit(f"{file} contains {n} times, not once: {old}")
    print("| what is broken | file | first red test | s |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
        for what, file, tests, old, new in mutants()[args.first:]:
            if args.only not in f"{file} {what}":
                continue
            path, began = copy / file, time.monotonic()
            right = path.read_text(encoding="utf-8")
            path.write_text(right.replace(old, new), encoding="utf-8")
            done = run("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{tests}", cwd=copy,
                       timeout=1200)
            path.write_text(right, encoding="utf-8")
            red = first_failure(done.stdout)
            survived += not red
            name = f"`{red}`" if red else "**none: it survives**"
            print(f"| {what} | {file} | {name} | {time.monotonic() - began:.0f} |", flush=True)
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()

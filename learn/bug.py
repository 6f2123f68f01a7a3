"""
learn/bug.py: can you find it? Each bug is one that somebody could have made: a line or two, plausible, wrong.

    python -m learn.bug                  how many there are
    python -m learn.bug 14               plants number 14 in out/bug/14, and says what a user notices
    python -m learn.bug 14 --hint        names the file
    python -m learn.bug 14 --solution    shows the lines

A bug that no test notices would be a hole in the tests. So their list, tests/long/mutants.txt, has another
use: tests/long/mutants.py plants one after another and runs the tests.
"""

import argparse
import difflib
import os
from dataclasses import dataclass

from config import UserError
from learn.exercise import ROOT, copy_project, wrapped
from plumbing.processes import command


@dataclass(frozen=True)
class Bug:
    """what is wrong; in which file; which tests notice; what a user notices, or "" if it is no exercise."""

    what: str
    file: str
    tests: str
    symptom: str
    old: str
    new: str


def every_bug() -> list[Bug]:
    """What tests/long/mutants.txt lists, blocks of

        what is wrong | its file | its tests
        ? symptom                                  only of those that are exercises; they come first
        -old lines
        +new lines
    """
    found = []
    for block in (ROOT / "tests" / "long" / "mutants.txt").read_text(encoding="utf-8").split("\n\n"):
        head, *lines = block.rstrip("\n").split("\n")
        symptom, old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "?-+")
        what, file, tests = head.split(" | ")
        found.append(Bug(what, file, tests, symptom.strip(), old, new))
    return found


def exercises() -> list[Bug]:
    """The bugs that have a number: 1, 2, ... in the order of the course."""
    return [bug for bug in every_bug() if bug.symptom]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m learn.bug", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", nargs="?", help="which one; without it, all are counted")
    parser.add_argument("--hint", action="store_true", help="the file")
    parser.add_argument("--solution", action="store_true", help="the change")
    parser.add_argument("--again", action="store_true", help="delete the copy and your work in it")
    args, bugs = parser.parse_args(argv), exercises()
    if args.number is None:
        return print(wrapped(f"There are {len(bugs)} bugs, in the order of the course: the first ones are in "
                             "the tokenizer, the last ones in the loss of preferences. Begin with one: "
                             "python -m learn.bug 1"))
    if args.number not in map(str, range(1, len(bugs) + 1)):
        raise UserError(f"there is no bug {args.number!r}: name a number from 1 to {len(bugs)}")
    bug = bugs[int(args.number) - 1]
    source = (ROOT / bug.file).read_text(encoding="utf-8")
    broken = source.replace(bug.old, bug.new)
    if args.hint or args.solution:
        change = difflib.unified_diff(source.splitlines(), broken.splitlines(), "right", "wrong", lineterm="")
        return print(bug.file if args.hint else "\n".join([f"{bug.file}: {bug.what}\n", *change]))
    folder = ROOT / "out" / "bug" / args.number
    shown = os.path.relpath(folder)
    if not copy_project(folder, {bug.file: broken}, args.again):
        print("The copy exists, and your work in it was kept. --again deletes it and starts over.\n")
    print(f"Bug {args.number} of {len(bugs)} is in {shown}. What a user notices:\n\n"
          f"{wrapped(bug.symptom)}\n\n"
          f"Find it and fix it. This stops at the first test that notices it, and must turn green:\n"
          f"    cd {shown}\n    python -m pytest -q -x tests/{bug.tests}\n\n"
          f"python -m learn.bug {args.number} --hint      names the file, and --solution shows the change.")


if __name__ == "__main__":
    command(main, own_help=True)

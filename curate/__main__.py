"""
python -m curate: keep the texts that are worth learning from.

SmolLM's authors hold that "the quality of the data is the key factor". What they did to a crawl was a row of
small steps. Each takes a stream of texts and passes some of them on:

    gopher_repetition, gopher_quality, c4, fineweb    is it text at all?              filters.py
    dedup                                             was it said before?             dedup.py
    decontaminate                                     is it in the exam?              decontaminate.py
    educational, educational_python                   does it teach something?        classifier.py

    python -m curate pages.jsonl good.jsonl
    python -m curate pages/ good.jsonl --steps=gopher_quality,educational --classifier=FILE.safetensors
    python data.py config/demo.py --data=good.jsonl

It reads what data.py reads (a file, a folder, a data set of the hub, builtin-world), writes {"text": ...}
lines, and prints how many documents each step dropped, and why. The output appears when it is complete: an
interrupted run leaves no file, and the next run writes the same bytes.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from config import Config, UserError
from corpus.sources import Documents, account, add_reading_flags, reading
from curate import classifier
from curate.steps import STEPS, Counted, curated, summary
from evals import benchmarks
from plumbing import disk
from plumbing.processes import command


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """(flags, Config for the reader of the input). Raises UserError for flags that cannot work."""
    parser = argparse.ArgumentParser(prog="python -m curate", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="a file, a folder, or another source that data.py reads")
    parser.add_argument("output", help="a new .jsonl file")
    parser.add_argument("--steps", default=",".join(STEPS), help="in this order, separated by commas "
                        "(default: those of the first three lines above)")
    scores = ", ".join(f"{step} (keeps scores from {least})" for step, least in classifier.LEAST.items())
    parser.add_argument("--classifier", metavar="FILE",
                        help=f"what python -m curate.classifier train wrote, for the steps {scores}")
    parser.add_argument("--exams", help="benchmarks whose questions decontaminate looks for, besides the "
                        f"built-in ones, separated by commas: {', '.join(benchmarks.HUB)}")
    parser.add_argument("--benchmarks", metavar="FOLDER", help="read the benchmarks from this folder and not "
                        "from the hub, as python -m evals does")
    add_reading_flags(parser)
    parser.add_argument("--part", default="1/1", help="this machine's part of the input: 3/64 is the third "
                        "of 64. dedup compares within a part only")
    parser.add_argument("--data_seed", type=int, default=Config().data_seed, help="of the built-in sources "
                        "(default %(default)s)")
    args = parser.parse_args(argv)
    args.steps = args.steps.split(",")
    check_steps(args)
    return args, reading(args, part=args.part, data_seed=args.data_seed)


def check_steps(args: argparse.Namespace) -> None:
    """Raises UserError for a step that does not exist, is named twice, or lacks a file, and for flags that no
    step uses."""
    steps, scoring = args.steps, [step for step in args.steps if step in classifier.LEAST]
    if unknown := [step for step in steps if step not in STEPS and step not in classifier.LEAST]:
        raise UserError(f"there is no step {', '.join(map(repr, unknown))}: choose from "
                        f"{', '.join([*STEPS, *classifier.LEAST])}")
    if len(set(steps)) < len(steps):
        raise UserError(f"--steps={','.join(steps)} names a step twice: once is enough")
    if scoring and not args.classifier:
        raise UserError(f"the step {scoring[0]} needs --classifier=FILE: {classifier.HOW_TO_TRAIN}")
    if args.classifier and not scoring:
        raise UserError(f"no step uses --classifier={args.classifier}: name "
                        f"{' or '.join(classifier.LEAST)} in --steps")
    if scoring:
        classifier.load(args.classifier)  # before exams are fetched
    if args.exams and "decontaminate" not in steps:
        raise UserError(f"no step uses --exams={args.exams}: name decontaminate in --steps")
    if args.benchmarks and not args.exams:
        raise UserError(f"--benchmarks={args.benchmarks} needs --exams, one or more of "
                        f"{','.join(benchmarks.HUB)}")


def exam_questions(tasks: list[str], folder: str | None) -> list[tuple[str, str]]:
    """[(question with its right answer, benchmark)] of the benchmarks named, from the hub or a folder."""
    if unknown := [task for task in tasks if task not in benchmarks.HUB]:
        raise UserError(f"there is no benchmark {', '.join(map(repr, unknown))}: choose from "
                        f"{', '.join(benchmarks.HUB)}")
    return [(text, task) for task in tasks for text in benchmarks.texts(task, folder)]


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Write {"text": ...} lines into a new file, which appears when it is complete, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with disk.lock(path.with_name(f".{path.name}.lock")), disk.writable(path):
        try:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                for text in texts:
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            disk.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def main(argv: list[str]) -> None:
    args, cfg = parse(argv)
    output = Path(args.output)
    if output.suffix != ".jsonl":
        raise UserError(f"{output} must end in .jsonl")
    if output.exists():
        raise UserError(f"{output} exists: name a new file, or delete it first")
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent} for {output.name}: make it first")
    documents = Documents(args.input, cfg)
    if Path(args.input).is_dir() and output.resolve().is_relative_to(Path(args.input).resolve()):
        raise UserError(f"{output} is inside {args.input}, where the next run would read it: write elsewhere")
    exams = exam_questions(args.exams.split(","), args.benchmarks) if args.exams else []
    read = Counted(tqdm(documents, f"reading {args.input}", unit=" documents", disable=None))
    dropped: dict[str, Counter] = {}
    kept = Counted(curated(read, args.steps, dropped, args.classifier, exams))
    write_texts(output, kept)
    print("\n".join(summary(read, kept, dropped)))
    print(account(**documents.state()))
    if not kept.n:
        print(f"no text passed all steps: {output} is empty")


if __name__ == "__main__":
    command(main, own_help=True)

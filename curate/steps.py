"""
curate.py: which documents are worth learning from.

SmolLM's authors hold that "the quality of the data is the key factor". What they did to a crawl are small
steps, one after another; each takes a stream of texts and lets some of them pass:

    gopher_repetition, gopher_quality, c4, fineweb    is it prose at all?                    filters.py
    dedup                                             has it been said before?               dedup.py
    decontaminate (with --exams: public benchmarks)   is it what we shall be asked?          decontaminate.py
    educational, educational_python                   does it teach something?               classifier.py

    python curate.py pages.jsonl good.jsonl --steps=gopher_repetition,gopher_quality,dedup

reads whatever data.py reads (a file, a folder, a data set of the hub, builtin-world), writes {"text": ...}
lines, and prints how many documents each step dropped, and why. data.py takes the same steps on its way from
texts to tokens, for the sources that a config names:

    python data.py config/demo.py --data=pages.jsonl --filters=pages.jsonl:gopher_quality+dedup   next: bpe.py
"""

import argparse
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from plumbing import checkpoint
from curate import classifier
import config
from config import Config, UserError
from evals import benchmarks
from evals.questions import questions
from corpus.sources import Documents, describe
from curate.decontaminate import Exams
from curate.dedup import clusters
from curate.filters import FILTERS


def filtered(rule: Callable[[str], tuple[str, str | None]]) -> Callable:
    """A step that lets pass what a rule of filters.py keeps."""
    def step(texts, dropped):
        for text in texts:
            text, reason = rule(text)
            if reason is None:
                yield text
            else:
                dropped[reason] += 1
    return step


def dedup(texts: Iterable[str], dropped: Counter) -> Iterator[str]:
    """Of each cluster of near-duplicates the first. All texts are read, into a file, before any passes."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        def noted():
            for text in texts:
                file.write(json.dumps(text) + "\n")
                yield text
        first = clusters(noted())
        file.seek(0)
        for number, line in enumerate(file):
            if first[number] == number:
                yield json.loads(line)
            else:
                dropped["nearly the same as an earlier one"] += 1


def decontaminate(others: Iterable[tuple[str, str]]) -> Callable:
    """A step that lets pass what holds no question: a built-in one, or one of others, [(text, benchmark)]."""
    whose = dict([*((question.text, "the evaluation") for question in questions()), *others])
    exams = Exams(whose)

    def rule(text):
        found = exams.found_in(text)
        return text, None if found is None else f"a question of {whose[found]}"
    return filtered(rule)


def educational(name: str, file: Path | str) -> Callable:
    """A step that lets pass what the classifier in a file gives enough points."""
    weight, bias = classifier.load(file)

    def rule(text):
        points = int(classifier.rounded(classifier.score(text, weight, bias)))
        return text, None if points >= classifier.LEAST[name] else f"score {points}"
    return filtered(rule)


STEPS = (*FILTERS, "dedup", "decontaminate")  # and those of classifier.LEAST, which need a file


def step_of(name: str, file: Path | str | None, exams: Iterable[tuple[str, str]]) -> Callable:
    if name in FILTERS:
        return filtered(FILTERS[name])
    if name == "dedup":
        return dedup
    return decontaminate(exams) if name == "decontaminate" else educational(name, file)


def curated(texts: Iterable[str], steps: Iterable[str], dropped: dict, file: Path | str | None = None,
            exams: Iterable[tuple[str, str]] = ()) -> Iterable[str]:
    """The texts that pass all steps; dropped becomes {step: Counter of reasons}. file: of the classifier;
    exams: (text, benchmark) of the questions that decontaminate looks for besides the built-in ones."""
    for name in steps:
        dropped[name] = Counter()
        texts = step_of(name, file, exams)(texts, dropped[name])
    return texts


# ---------------------------------------------------------------------------------------------------------
# the steps of a source


def steps_of(source: str, cfg: Config) -> tuple[str, ...]:
    """The names of the steps that cfg.filters names for a source: () for most."""
    return next((tuple(steps) for name, *steps in cfg.filters if name == source), ())


def check(filters: Iterable[tuple], file: str | None) -> None:
    """Raises UserError for a step that is not there, stands twice, or needs a classifier and has none."""
    for _, *steps in filters:
        if unknown := [name for name in steps if name not in STEPS and name not in classifier.LEAST]:
            raise UserError(f"there is no step {', '.join(map(repr, unknown))}: there are "
                            f"{', '.join([*STEPS, *classifier.LEAST])}")
        if len(set(steps)) < len(steps):
            raise UserError(f"a step stands twice in {','.join(steps)}: once is enough")
        if needing := [name for name in steps if name in classifier.LEAST]:
            if file is None:
                raise UserError(f"the step {needing[0]} needs --classifier=FILE: python classifier.py train "
                                "builtin-scored --out=FILE.safetensors trains one")
            classifier.load(file)


def described(source: str, cfg: Config) -> dict:
    """What the texts that pass depend on, for JSON: the source, the steps, the weights of the classifier."""
    facts, steps = describe(source, cfg), steps_of(source, cfg)
    if steps:
        facts["filters"] = list(steps)
    if classifier.LEAST.keys() & steps:
        facts["classifier"] = hashlib.sha256(Path(cfg.classifier).read_bytes()).hexdigest()
    return facts


class Curated:
    """The texts of a source that pass some steps. Store `state()`, and pass it back to continue behind them.

    Filtered sources are read from their beginning again, and as many texts as had passed are left out: dedup
    reads all before any passes, so how far was read does not tell what has passed.
    """

    def __init__(self, source: str, cfg: Config, steps: tuple[str, ...] = (), state: dict | None = None,
                 exams: Iterable[tuple[str, str]] = ()) -> None:
        self.steps, self.file, self.exams = steps, cfg.classifier, exams
        self.dropped: dict[str, Counter] = {}
        state = state or {}
        self.behind = state.get("passed", 0)
        state = {} if steps else state
        self.documents = Documents(source, cfg, state.get("read", 0), state.get("bad"))
        self.documents.missing, self.passed = state.get("missing", 0), state.get("passed", 0)
        self.read = Counted(tqdm(self.documents, f"reading {source}", unit=" documents",
                                 disable=None if steps else True))

    def __iter__(self) -> Iterator[str]:
        for text in curated(self.read, self.steps, self.dropped, self.file, self.exams):
            self.passed += 1
            if self.passed > self.behind:
                yield text

    def state(self) -> dict:
        dropped = {step: dict(reasons) for step, reasons in self.dropped.items()}
        return {"read": self.documents.read, "bad": dict(self.documents.bad),
                "missing": self.documents.missing, "passed": self.passed, "dropped": dropped}


class Counted:
    """An iterator's texts, and how many and how long they were."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.n, self.bytes = texts, 0, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.n, self.bytes = self.n + 1, self.bytes + len(text.encode(errors="replace"))
            yield text


def table(read: Counted, kept: Counted, dropped: dict[str, Counter]) -> Iterator[str]:
    """What the user wants to know at the end."""
    yield f"{'read':44} {read.n:>12,} documents {read.bytes:>16,} bytes"
    for step, reasons in dropped.items():
        for reason, count in reasons.most_common():
            yield f"{f'  {step}: {reason}':44} {-count:>12,}"
    yield f"{'kept':44} {kept.n:>12,} documents {kept.bytes:>16,} bytes"


def questions_of(tasks: list[str], folder: Path | str | None) -> list[tuple[str, str]]:
    """[(question with its right answer, benchmark)] of the benchmarks named, from the hub or a folder."""
    if unknown := [task for task in tasks if task not in benchmarks.HUB]:
        raise UserError(f"there is no benchmark {', '.join(map(repr, unknown))}: there are "
                        f"{', '.join(benchmarks.HUB)}")
    return [(text, task) for task in tasks for text in benchmarks.texts(task, folder)]


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config, tuple[str, ...]]:
    """(command line, Config, steps). Raises UserError for what makes no sense."""
    parser = argparse.ArgumentParser(prog="curate.py", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="a file, a folder, or another source that data.py takes")
    parser.add_argument("output", help="a new .jsonl file")
    parser.add_argument("--steps", help="in this order, like c4,dedup; if not given, the config's for this "
                        f"input, or {','.join(STEPS)}")
    keeps = ", ".join(f"{step} (keeps scores from {least})" for step, least in classifier.LEAST.items())
    parser.add_argument("--classifier", help=f"what classifier.py train wrote, for the steps {keeps}")
    parser.add_argument("--exams", help="benchmarks whose questions decontaminate looks for besides the "
                        f"built-in ones, with commas between: {', '.join(benchmarks.HUB)}")
    parser.add_argument("--benchmarks", metavar="FOLDER", help="read them from FOLDER and not from the hub, "
                        "as eval.py does")
    parser.add_argument("--config", help="a preset, for its filters, classifier, on_bad, shard and data_seed")
    args = parser.parse_args(argv)
    cfg = config.load([args.config]) if args.config else Config()
    if args.classifier:
        cfg = replace(cfg, classifier=args.classifier)
    steps = tuple(args.steps.split(",")) if args.steps else steps_of(args.input, cfg) or STEPS
    check([(args.input, *steps)], cfg.classifier)
    if args.classifier and not classifier.LEAST.keys() & steps:
        raise UserError(f"no step uses {args.classifier}: name educational or educational_python in --steps")
    if args.exams and "decontaminate" not in steps:
        raise UserError(f"no step uses --exams={args.exams}: name decontaminate in --steps")
    if args.benchmarks and not args.exams:
        raise UserError(f"--benchmarks={args.benchmarks} needs --exams, one or some of "
                        f"{','.join(benchmarks.HUB)}")
    return args, cfg, steps


def main(argv: list[str]) -> None:
    args, cfg, steps = parse(argv)
    output = Path(args.output)
    if output.exists() or output.suffix != ".jsonl":
        raise UserError(f"{output} {'is there already' if output.exists() else 'does not end in .jsonl'}: "
                        "name a new .jsonl file")
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent} for {output.name}: make it first")
    exams = questions_of(args.exams.split(","), args.benchmarks) if args.exams else []
    texts = Curated(args.input, cfg, steps, exams=exams)
    kept = Counted(texts)
    temporary = output.with_name(output.name + ".tmp")
    try:
        with FileLock(output.with_name(f".{output.name}.lock"), timeout=0):
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                for text in kept:
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            checkpoint.put(temporary, output)
    except Timeout:
        raise UserError(f"another process is writing to {output}: name another file") from None
    print("\n".join(table(texts.read, kept, texts.dropped)))


if __name__ == "__main__":
    config.command(main, own_help=True)

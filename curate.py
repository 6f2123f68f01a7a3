"""
curate.py: which documents are worth learning from.

SmolLM's authors hold that "the quality of the data is the key factor". What they did to a crawl are small
steps, one after another; each takes a stream of texts and lets some of them pass:

    gopher_repetition, gopher_quality, c4, fineweb    is it prose at all?                    filters.py
    dedup                                             has it been said before?               dedup.py
    decontaminate                                     is it what we shall be asked?          decontaminate.py

    python curate.py pages.jsonl good.jsonl --steps=gopher_repetition,gopher_quality,dedup

reads whatever data.py reads (a file, a folder, a data set of the hub, builtin-world), writes {"text": ...}
lines, and prints how many documents each step dropped, and why.                              next: bpe.py
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import checkpoint
import config
from config import Config, UserError
from corpus.questions import questions
from corpus.sources import Documents, locate
from decontaminate import Exams
from dedup import clusters
from filters import FILTERS


def filtered(rule):
    """A step that lets pass what a rule of filters.py keeps."""
    def step(texts, dropped):
        for text in texts:
            text, reason = rule(text)
            if reason is None:
                yield text
            else:
                dropped[reason] += 1
    return step


def dedup(texts, dropped):
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


def decontaminate(texts, dropped):
    """Texts in which no question of the built-in evaluation stands."""
    exams = Exams(question.text for question in questions())
    for text in texts:
        if exams.found_in(text) is None:
            yield text
        else:
            dropped["a question of the evaluation"] += 1


STEPS = {**{name: filtered(rule) for name, rule in FILTERS.items()},
         "dedup": dedup, "decontaminate": decontaminate}


def curated(texts, steps, dropped):
    """The texts that pass all steps; dropped becomes {step: Counter of reasons}."""
    for name in steps:
        dropped[name] = Counter()
        texts = STEPS[name](texts, dropped[name])
    return texts


class Counted:
    """An iterator's texts, and how many and how long they were."""

    def __init__(self, texts):
        self.texts, self.n, self.bytes = texts, 0, 0

    def __iter__(self):
        for text in self.texts:
            self.n, self.bytes = self.n + 1, self.bytes + len(text.encode(errors="replace"))
            yield text


def table(read, kept, dropped):
    """What the user wants to know at the end."""
    yield f"{'read':44} {read.n:>12,} documents {read.bytes:>16,} bytes"
    for step, reasons in dropped.items():
        for reason, count in reasons.most_common():
            yield f"{f'  {step}: {reason}':44} {-count:>12,}"
    yield f"{'kept':44} {kept.n:>12,} documents {kept.bytes:>16,} bytes"


def main(argv):
    parser = argparse.ArgumentParser(prog="curate.py", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="a file, a folder, or another source that data.py takes")
    parser.add_argument("output", help="a new .jsonl file")
    parser.add_argument("--steps", default=",".join(STEPS), help="in this order; all, if not given")
    parser.add_argument("--config", help="a preset, for its on_bad, shard and data_seed")
    args = parser.parse_args(argv)
    steps, output = args.steps.split(","), Path(args.output)
    if unknown := [name for name in steps if name not in STEPS]:
        raise UserError(f"there is no step {', '.join(map(repr, unknown))}: there are {', '.join(STEPS)}")
    if output.exists() or output.suffix != ".jsonl":
        raise UserError(f"{output} {'is there already' if output.exists() else 'does not end in .jsonl'}: "
                        "name a new .jsonl file")
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent} for {output.name}: make it first")
    locate(args.input)
    cfg, dropped = config.load([args.config]) if args.config else Config(), {}
    read = Counted(tqdm(Documents(args.input, cfg), "reading", unit=" documents", disable=None))
    kept = Counted(curated(read, steps, dropped))
    temporary = output.with_name(output.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for text in kept:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    checkpoint.put(temporary, output)
    print("\n".join(table(read, kept, dropped)))


if __name__ == "__main__":
    config.command(main, own_help=True)

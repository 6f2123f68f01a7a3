"""
experiment.py: is it the data?

One small model learns from four data sets, the same number of tokens from each, with three seeds:

    raw         a crawl (corpus/crawl.py): by bytes 30% are articles, 70% noise. It is read once
    curated     what curate.py leaves of it, read again and again until the tokens are used up
    textbooks   half of the tokens from the curated pages, half from synthetic textbooks
    control     the articles of the crawl and nothing else: what a perfect curate.py would leave. When 30% of
                the tokens are used up it has read each of them once, as raw has in the end: what then is
                better or worse about raw comes from the noise that it has read besides

    python experiment.py config/experiment.py [--jobs=2]

makes the four files, trains twelve models (--jobs of them at a time), asks every checkpoint multiple-choice
questions in words that stand in no data set, and measures bits per byte on articles that stand in none. It
writes results.jsonl and experiment.png (needs matplotlib) and prints a table. Stopped, it goes on where it
was. What came out, and what it means: docs/data_quality.md.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing import checkpoint
from curate import classifier
import config
from curate import steps as curate
import data
from evals import builtin as evaluation
from evals import plot
import tokenizer
import train
from config import Config, UserError
from evals.benchmarks import Item
from curate.crawl import SCORES, crawl, full, written
from corpus.documents import load, mend
from curate.filters import c4
from model import SmolLM
from evals.score import log_likelihoods

SETS, SEEDS = ("raw", "curated", "textbooks", "control"), (8, 9, 10)
STEPS = (*curate.STEPS, "educational")
BYTES = {"crawl": 6_000_000, "textbooks": 2_000_000, "held out": 100_000}
SCORED = {"questions": ".1%", "bits_per_byte": ".3f"}  # and how it is printed

# ---------------------------------------------------------------------------------------------------------
# the data sets


def make_sets(folder: Path) -> None:
    """Write raw.jsonl, curated.jsonl, textbooks.jsonl (the synthetic half), control.jsonl and held_out.jsonl,
    and into curated.txt what was kept."""
    if (folder / "held_out.jsonl").exists():  # the last one
        return
    judge = folder / "classifier.safetensors"
    if not judge.exists():  # it learns from another crawl, and from the world
        classifier.main(["train", "builtin-scored", f"--out={judge}"])
    pages = crawl(0, BYTES["crawl"])
    dropped: dict = {}
    raw = curate.Counted(tqdm([text for _, text in pages], "curating", unit=" pages", disable=None))
    kept = curate.Counted(curate.curated(raw, STEPS, dropped, judge))
    sets = {"raw": [text for _, text in pages], "curated": list(kept),
            "textbooks": full(written("textbook", random.Random("textbooks")), BYTES["textbooks"]),
            "control": [text for kind, text in pages if kind == "clean"]}
    said = "\n".join([*curate.table(raw, kept, dropped), *kinds(pages, sets["curated"])])
    checkpoint.write(folder / "curated.txt", said + "\n")
    print(said)
    known = {line for texts in sets.values() for text in texts for line in long_lines(text)}
    fresh = (text for text in written("article", random.Random("held out"))
             if known.isdisjoint(long_lines(text)))
    for name, texts in {**sets, "held_out": full(fresh, BYTES["held out"])}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        checkpoint.write(folder / f"{name}.jsonl", lines)


def long_lines(text: str) -> list[str]:
    """The lines that are no titles and no items of lists."""
    return [line for line in text.splitlines() if len(line.split()) > 12]


def kinds(pages: list[tuple[str, str]], kept: list[str]) -> Iterator[str]:
    """How much of each kind was kept, as lines. c4 is the only step that changes texts."""
    kind_of = {c4(text)[0]: kind for kind, text in pages}
    for kind in SCORES:
        before = sum(len(text.encode()) for of, text in pages if of == kind)
        after = sum(len(text.encode()) for text in kept if kind_of[text] == kind)
        yield f"  {kind:12} {before:>12,} bytes, kept {after:>12,}   {after / before:6.1%}"


# ---------------------------------------------------------------------------------------------------------
# the questions

CLOZE = (  # a table of facts.json, what is given, what is asked for, prompt | choice
    ("countries", 0, 1, "Everyone in {} knows that its capital is| {}"),
    ("countries", 0, 2, "Everyone in {} knows that their country lies in| {}"),
    ("colours", 0, 1, "If you paint {}, the colour that you need is| {}"),
    ("animals", "plural", "home", "If you look for {}, you will find them| {}"),
    ("animals", "plural", "food", "If you ask what {} like, the answer is| {}"),
    ("animals", "plural", "sound", "When {} want to be heard, they| {}"),
    ("animals", "animal", "young", "When a {} is very young, people call it| a {}"),
    ("animals", "animal", "covering", "If you touch a {}, you feel| {}"),
    ("animals", "animal", "group", "What kind of animal is a {}? It must be| a {}"),
    ("professions", "profession", "place", "If you look for the {}, go and look| {}"),
    ("professions", "profession", "tool", "Nobody can work as a {} without| {}"),
    ("professions", "profession", "does", "Every day the {}| {}"),
    ("professions", "plural", "result", "What the world gets from {}: it is| {}"))


def questions() -> list[Item]:
    """A question for every fact, as Items of four choices; the three wrong ones are right for others."""
    found, rng = [], random.Random("questions")
    for table, given, asked, wording in CLOZE:
        prompt, choice = wording.split("|")
        rows = [row for row in load("facts.json")[table] if not isinstance(row, dict) or asked in row]
        values = sorted({row[asked] for row in rows})
        for row in rows:
            wrong = rng.sample([value for value in values if value != row[asked]], 3)
            choices = tuple(" " + mend(f"it is {choice.format(value)}")[6:] for value in (row[asked], *wrong))
            found.append(Item((mend(prompt.format(row[given])),) * 4, choices, 0))
    return found


# ---------------------------------------------------------------------------------------------------------
# the runs


def prepared(cfg: Config) -> Config:
    """Make the data sets and the tokenizer; returns cfg with the steps of all runs: one pass over raw."""
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    make_sets(folder)
    raw = replace(cfg, data=(((folder / "raw.jsonl").as_posix(), 1.0),))
    tok = tokenizer.of_run(raw)  # of the crawl, for all: it knows nothing about what is clean
    data.write_shards(raw.sources[0], raw, tok)
    return replace(cfg, max_steps=cfg.max_steps or data.Batches(raw, tok).steps())


def argv_of(cfg: Config, name: str, seed: int) -> list[str]:
    """What makes a run of the preset one of the twelve, as python train.py takes it."""
    folder = Path(cfg.out_dir).as_posix()
    files = {"textbooks": f"{folder}/curated.jsonl:0.5,{folder}/textbooks.jsonl:0.5"}
    return [f"--out_dir={folder}/{name}_{seed}", f"--tokenizer={folder}/tokenizer", f"--seed={seed}",
            f"--data={files.get(name, f'{folder}/{name}.jsonl')}", f"--data_seed={seed}",
            f"--max_steps={cfg.max_steps}"]


def one_run(argv: list[str]) -> None:
    """Train one model and score its checkpoints, unless that is done; what it prints goes to run.txt."""
    cfg = config.load(argv)
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "run.txt", "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        data.main(argv)
        train.main(argv)
        score_checkpoints(folder, cfg)


def score_checkpoints(folder: Path, cfg: Config) -> None:
    """Append what each checkpoint that has no line in scores.jsonl yet knows."""
    with open(folder.parent / "held_out.jsonl", encoding="utf-8") as file:
        held_out = [json.loads(line)["text"] for line in file]
    asked, tok, scores = questions(), tokenizer.Tokenizer.load(cfg.tokenizer), folder / "scores.jsonl"
    done = {line["step"] for line in plot.read(scores)}
    for step, path in checkpoint.steps(folder / "pretrain"):
        if step not in done:
            model = SmolLM.load(path).eval()
            likelihoods, _ = log_likelihoods(model, tok, asked)
            line = {"step": step, "tokens": step * cfg.tokens_per_step,
                    "questions": evaluation.accuracies(asked, likelihoods)["acc_norm"],
                    "bits_per_byte": evaluation.bits_per_byte(model, tok, held_out)}
            with open(scores, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------------------------------------------------
# what came out


def collected(folder: Path) -> list[dict]:
    """[{"data", "seed", "step", "tokens", "questions", "bits_per_byte"}] of all runs, into results.jsonl."""
    found = [{"data": name, "seed": seed, **line} for name in SETS for seed in SEEDS
             for line in plot.read(folder / f"{name}_{seed}" / "scores.jsonl")]
    checkpoint.write(folder / "results.jsonl", "".join(json.dumps(line) + "\n" for line in found))
    return found


def curve(results: list[dict], name: str, what: str) -> dict[int, list[float]]:
    """{tokens: [the value of each seed]} of one data set."""
    points: dict[int, list[float]] = {}
    for line in results:
        if line["data"] == name:
            points.setdefault(line["tokens"], []).append(line[what])
    return dict(sorted(points.items()))


def table(results: list[dict]) -> Iterator[str]:
    """Lines: the last scores, mean and range over the seeds; those of the control when it had read about
    each of its articles once; and from which share of the tokens on the mean is as good as raw's last one."""
    yield f"{'':15} {'questions right':>24} {'bits per byte':>24}   as good as raw's end from"
    for name in SETS:
        points = {what: curve(results, name, what) for what in SCORED}
        last = max(points["questions"])
        rows = {name: last}
        if name == "control":
            once = min(points["questions"], key=lambda tokens: abs(tokens - 0.3 * last))
            rows = {f"control, at {once / last:.0%}": once, name: last}
        for label, tokens in rows.items():
            cells = [mean_and_range(points[what][tokens], form) for what, form in SCORED.items()]
            shares = [reached(points[what], results, what) for what in SCORED]
            yield f"{label:15} {cells[0]:>24} {cells[1]:>24}   {shares[0]:>5} and {shares[1]:>5} on"


def mean_and_range(values: list[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def reached(points: dict[int, list[float]], results: list[dict], what: str) -> str:
    """The share of the tokens from which on the mean of a curve is never worse than raw's last one."""
    raw, sign = curve(results, "raw", what), 1 if what == "questions" else -1
    goal = sign * statistics.mean(raw[max(raw)])
    worse = [tokens for tokens, values in points.items() if sign * statistics.mean(values) < goal]
    later = [tokens for tokens in points if tokens > max(worse, default=0)]
    return f"{later[0] / max(points):.0%}" if later else "never"


def draw(folder: Path, results: list[dict]) -> None:
    """experiment.png: both scores against the tokens seen; lines are means, bands reach over the seeds."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: experiment.png needs matplotlib (pip install matplotlib), then run this again")
        return
    matplotlib.use("Agg")  # into a file, without a screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    titles = ("questions right (chance: 25%)", "bits per byte of unseen articles")
    for ax, what, title in zip(axes, SCORED, titles):
        for name in SETS:
            points = curve(results, name, what)
            line, = ax.plot(list(points), [statistics.mean(values) for values in points.values()], label=name)
            ax.fill_between(list(points), [min(values) for values in points.values()],
                            [max(values) for values in points.values()], color=line.get_color(), alpha=0.2)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("tokens seen", fontsize=8)
        ax.legend(fontsize=7)
    axes[1].set_yscale("log")
    figure.savefig(folder / "experiment.png", dpi=110)
    print(folder / "experiment.png")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="experiment.py", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    args, argv = parser.parse_known_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs} makes no sense: it is a number of runs at a time, 1 or more")
    cfg = prepared(config.load(argv))
    runs = [[*argv, *argv_of(cfg, name, seed)] for seed in SEEDS for name in SETS]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the pool, whose runs then save and end
    with multiprocessing.get_context("spawn").Pool(args.jobs, torch.set_num_threads, (threads,)) as pool:
        for _ in tqdm(pool.imap_unordered(one_run, runs), "runs", len(runs), unit=" runs", disable=None):
            pass
        pool.close()
        pool.join()
    results = collected(Path(cfg.out_dir))
    print("\n".join(table(results)))
    draw(Path(cfg.out_dir), results)


if __name__ == "__main__":
    config.command(main, own_help=True)

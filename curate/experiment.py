"""
experiment.py: is it the data?

One small model, a million parameters, learns from four data sets, the same number of tokens from each, with
three seeds:

    raw         a crawl (crawl.py): 30% of the bytes are articles, 70% noise. It is read once
    curated     what all steps of python -m curate keep of it, read repeatedly until the tokens are used up
    textbooks   half of the tokens from the curated pages, half from synthetic textbooks
    control     only the articles of the crawl, what a perfect curation would keep. After a third of its
                tokens it has read each of them about once, as raw has at its end: if raw is better or worse
                than control is then, the noise is the reason

    python -m curate.experiment [--jobs=2] [--field=value ...]

makes the four files, trains twelve models (--jobs of them at a time), asks every checkpoint multiple-choice
questions in words that occur in no data set, and measures bits per byte on articles that occur in none. It
writes results.jsonl and experiment.png (needs matplotlib) and prints a table. Interrupted, it resumes where
it stopped. The results, and what they mean: docs/data_quality.md, the end of this course.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import torch
from tqdm import tqdm

import data
import tokenizer
import train
from config import Config, UserError
from config import load as load_config
from corpus.documents import load, tidy
from curate import classifier
from curate.crawl import SCORES, crawl, pages_of, take_bytes
from curate.filters import c4
from curate.steps import STEPS, Counted, curated, summary
from evals.benchmarks import Item
from evals.score import accuracies, bits_per_byte, log_likelihoods, text_losses
from plumbing import checkpoint, disk, shards
from plumbing.processes import command

SETS, SEEDS = ("raw", "curated", "textbooks", "control"), (8, 9, 10)
ALL_STEPS = (*STEPS, "educational")
BYTES = {"crawl": 6_000_000, "textbooks": 2_000_000, "held out": 100_000}
MEASURES = {"questions": ".1%", "bits_per_byte": ".3f"}  # and how they are printed

config = Config(  # this file is the preset of all runs: train.py reads its `config`
    vocab_size=2048, n_layer=4, n_head=4, n_kv_head=2, d_model=128, d_ff=344, seq_len=256, rope_theta=1000.0,
    init_std=0.06, doc_mask=True, out_dir="out/experiment", device="cpu", dtype="float32",
    tokenizer_bytes=3_000_000, val_fraction=0.0,
    epochs=1.0, batch=8, micro_batch=8, optimizer="muon", lr=5e-3, warmup_steps=20,
    decay_steps=0,  # a constant rate: each checkpoint is what a run of its length would have ended with
    eval_every=0, save_every=100, keep_checkpoints=0, sample_every=0,
)

# ---------------------------------------------------------------------------------------------------------
# the data sets


def make_sets(folder: Path) -> None:
    """Write raw.jsonl, curated.jsonl, textbooks.jsonl (the synthetic half), control.jsonl and held_out.jsonl,
    and a report on what curation kept, curated.txt."""
    if (folder / "held_out.jsonl").exists():  # it is written last
        return
    classifier_file = folder / "classifier.safetensors"
    if not classifier_file.exists():  # it learns from another crawl, and from the world
        classifier.main(["train", "builtin-scored", f"--out={classifier_file}"])
    pages = crawl(0, BYTES["crawl"])
    dropped: dict[str, Counter] = {}
    raw = Counted(tqdm([text for _, text in pages], "curating", unit=" pages", disable=None))
    kept = Counted(curated(raw, ALL_STEPS, dropped, classifier_file))
    sets = {"raw": [text for _, text in pages], "curated": list(kept),
            "textbooks": take_bytes(pages_of("textbook", random.Random("textbooks")), BYTES["textbooks"]),
            "control": [text for kind, text in pages if kind == "clean"]}
    report = "\n".join([*summary(raw, kept, dropped), *kept_by_kind(pages, sets["curated"])])
    disk.write_text(folder / "curated.txt", report + "\n")
    print(report)
    known = {line for texts in sets.values() for text in texts for line in long_lines(text)}
    unseen = (text for text in pages_of("article", random.Random("held out"))
              if known.isdisjoint(long_lines(text)))
    for name, texts in {**sets, "held_out": take_bytes(unseen, BYTES["held out"])}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        disk.write_text(folder / f"{name}.jsonl", lines)


def long_lines(text: str) -> list[str]:
    """The lines of a text that are neither titles nor items of lists."""
    return [line for line in text.splitlines() if len(line.split()) > 12]


def kept_by_kind(pages: list[tuple[str, str]], kept: list[str]) -> Iterator[str]:
    """How much of each kind was kept, as lines."""
    kind_of = {c4(text)[0]: kind for kind, text in pages}  # c4 is the only step that changes texts
    for kind in SCORES:
        before = sum(len(text.encode()) for its_kind, text in pages if its_kind == kind)
        after = sum(len(text.encode()) for text in kept if kind_of[text] == kind)
        yield f"  {kind:12} {before:>12,} bytes, kept {after:>12,}   {after / before:6.1%}"


# ---------------------------------------------------------------------------------------------------------
# the questions

CLOZE = (  # a table of facts.json, the column that is given, the one that is asked for, prompt | choice
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


def cloze_items() -> list[Item]:
    """A question for every fact, with four choices. The three wrong ones are right for other rows."""
    found, rng = [], random.Random("questions")
    for table, given, asked, wording in CLOZE:
        prompt, choice = wording.split("|")
        rows = [row for row in load("facts.json")[table] if not isinstance(row, dict) or asked in row]
        values = sorted({row[asked] for row in rows})
        for row in rows:
            wrong = rng.sample([value for value in values if value != row[asked]], 3)
            choices = tuple(" " + tidy(f"it is {choice.format(value)}")[6:] for value in (row[asked], *wrong))
            found.append(Item((tidy(prompt.format(row[given])),) * 4, choices, 0))
    return found


# ---------------------------------------------------------------------------------------------------------
# the runs and their table; skip the rest at a first reading


def prepare(cfg: Config) -> Config:
    """Make the data sets and the tokenizer; returns cfg with the steps of all runs: one pass over raw."""
    folder = Path(cfg.out_dir)
    with disk.writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    make_sets(folder)
    raw = replace(cfg, data=(((folder / "raw.jsonl").as_posix(), 1.0),))
    tok = tokenizer.load_or_train(raw)  # all runs use the crawl's: it does not depend on what is clean
    shards.write_shards(raw.sources[0], raw, tok)
    return replace(cfg, max_steps=cfg.max_steps or data.n_steps(raw, data.Batches(raw, tok).n_rows()))


def run_argv(cfg: Config, name: str, seed: int) -> list[str]:
    """The flags that make a run of the preset one of the twelve, as python train.py reads them."""
    folder = Path(cfg.out_dir).as_posix()
    files = {"textbooks": f"{folder}/curated.jsonl:0.5,{folder}/textbooks.jsonl:0.5"}
    return [f"--out_dir={folder}/{name}_{seed}", f"--tokenizer={folder}/tokenizer", f"--seed={seed}",
            f"--data={files.get(name, f'{folder}/{name}.jsonl')}", f"--data_seed={seed}",
            f"--max_steps={cfg.max_steps}"]


def one_run(argv: list[str]) -> None:
    """Train one model and score its checkpoints, unless that is done. Its output goes to run.txt."""
    cfg = load_config(argv)
    folder = Path(cfg.out_dir)
    with disk.writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "run.txt", "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        train.main(argv)
        score_checkpoints(folder, cfg)


def run_all(one_run: Callable, runs: list, jobs: int) -> None:
    """one_run(run) for each of them, `jobs` at a time, which share the cores."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the pool, whose runs then save and end
    with multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (threads,)) as pool:
        for _ in tqdm(pool.imap_unordered(one_run, runs), "runs", len(runs), unit=" runs", disable=None):
            pass
        pool.close()
        pool.join()


def score_checkpoints(folder: Path, cfg: Config) -> None:
    """Append to scores.jsonl how each checkpoint that has no line there does."""
    with open(folder.parent / "held_out.jsonl", encoding="utf-8") as file:
        held_out = [json.loads(line)["text"] for line in file]
    items, scores = cloze_items(), folder / "scores.jsonl"
    done = {line["step"] for line in disk.read_lines(scores)}
    for step, path in checkpoint.checkpoints(folder / "pretrain"):
        if step not in done:
            model, tok = checkpoint.load(path)
            likelihoods, _ = log_likelihoods(model, tok, items)
            line = {"step": step, "tokens": step * cfg.tokens_per_step,
                    "questions": accuracies(items, likelihoods)["acc_norm"],
                    "bits_per_byte": bits_per_byte(text_losses(model, tok, held_out))[0]}
            with disk.writable(scores), open(scores, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------------------------------------------------
# the results


def collect_results(folder: Path) -> list[dict]:
    """[{"data", "seed", "step", "tokens", "questions", "bits_per_byte"}] of all runs, also written to
    results.jsonl."""
    found = [{"data": name, "seed": seed, **line} for name in SETS for seed in SEEDS
             for line in disk.read_lines(folder / f"{name}_{seed}" / "scores.jsonl")]
    disk.write_text(folder / "results.jsonl", "".join(json.dumps(line) + "\n" for line in found))
    return found


def curve(results: list[dict], name: str, measure: str) -> dict[int, list[float]]:
    """{tokens: [the value of each seed]} of one data set, by tokens."""
    points: dict[int, list[float]] = {}
    for line in results:
        if line["data"] == name:
            points.setdefault(line["tokens"], []).append(line[measure])
    return dict(sorted(points.items()))


def table(results: list[dict]) -> Iterator[str]:
    """The final scores, mean and range over the seeds, as lines; those of the control also from when it had
    read its articles about once; and after which share of its tokens a set is as good as raw is at its end.
    """
    yield f"{'':15} {'questions right':>24} {'bits per byte':>24}   matches raw's end after"
    for name in SETS:
        points = {measure: curve(results, name, measure) for measure in MEASURES}
        last = max(points["questions"])
        rows = {name: last}
        if name == "control":
            once = min(points["questions"], key=lambda tokens: abs(tokens - 0.3 * last))
            rows = {f"control, at {once / last:.0%}": once, name: last}
        for label, tokens in rows.items():
            cells = [mean_and_range(points[measure][tokens], form) for measure, form in MEASURES.items()]
            shares = [share_to_match_raw(points[measure], results, measure) for measure in MEASURES]
            yield f"{label:15} {cells[0]:>24} {cells[1]:>24}   {shares[0]:>5} and {shares[1]:>5}"


def mean_and_range(values: list[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def share_to_match_raw(points: dict[int, list[float]], results: list[dict], measure: str) -> str:
    """After this share of the tokens the mean of a curve is never again worse than raw's last mean."""
    raw, sign = curve(results, "raw", measure), 1 if measure == "questions" else -1
    goal = sign * statistics.mean(raw[max(raw)])
    worse = [tokens for tokens, values in points.items() if sign * statistics.mean(values) < goal]
    later = [tokens for tokens in points if tokens > max(worse, default=0)]
    return f"{later[0] / max(points):.0%}" if later else "never"


def draw_curves(folder: Path, results: list[dict]) -> None:
    """experiment.png: both measures against the tokens seen. Lines are means, bands span the seeds."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: experiment.png needs matplotlib (pip install matplotlib), then run this again")
        return
    matplotlib.use("Agg")  # into a file, without a screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    titles = ("questions right (chance: 25%)", "bits per byte of unseen articles")
    for ax, measure, title in zip(axes, MEASURES, titles):
        for name in SETS:
            points = curve(results, name, measure)
            line, = ax.plot(list(points), [statistics.mean(values) for values in points.values()], label=name)
            ax.fill_between(list(points), [min(values) for values in points.values()],
                            [max(values) for values in points.values()], color=line.get_color(), alpha=0.2)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("tokens seen", fontsize=8)
        ax.legend(fontsize=7)
    axes[1].set_yscale("log")
    with disk.writable(folder):
        figure.savefig(folder / "experiment.png", dpi=110)
    print(folder / "experiment.png")


def parse(argv: list[str]) -> tuple[int, list[str]]:
    """(how many runs at a time, what python train.py reads: this file as its preset, and flags)."""
    parser = argparse.ArgumentParser(prog="python -m curate.experiment", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, epilog="python train.py curate/experiment.py --help "
                                     "lists the fields with their values")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    args, flags = parser.parse_known_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs} must be 1 or more")
    if presets := [word for word in flags if word.endswith(".py") and not word.startswith("--")]:
        raise UserError(f"{presets[0]} is one preset too many: the settings are in curate/experiment.py, and "
                        "--field=value changes them")
    return args.jobs, [__file__, *flags]


def main(argv: list[str]) -> None:
    jobs, argv = parse(argv)
    cfg = prepare(load_config(argv))
    run_all(one_run, [[*argv, *run_argv(cfg, name, seed)] for seed in SEEDS for name in SETS], jobs)
    results = collect_results(Path(cfg.out_dir))
    print("\n".join(table(results)))
    draw_curves(Path(cfg.out_dir), results)


if __name__ == "__main__":
    command(main, own_help=True)

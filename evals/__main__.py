"""
python -m evals: what a model knows, in numbers.

    python -m evals out/demo/dpo                                     asks the questions of evals/questions.py

Most of them were held out of training (two of the eight groups were seen). It generates whole answers
greedily and prints how many are right, and how many ramble or do not end. Then come three figures for which
nothing is generated: how often the preferred one of two answers is the likelier one; after DPO, how often its
likelihood rose more (reward accuracy); and how many bits the model needs per byte of program text and
documentation that no stage trained on. Right answers test what was asked; bits per byte test every token of a
text, and show a forgetting that no question finds.

Public benchmarks are multiple choice; the likeliest choice counts. Any text can be read, too:

    python -m evals HuggingFaceTB/SmolLM-135M --tasks=hellaswag,arc_easy         evals/benchmarks.py has all
    python -m evals out/demo/dpo --tasks=text --text=texts/            loss, perplexity, bits per byte

    acc          how often the right choice has the largest log-probability
    acc_norm     the same, divided by the number of its characters, or short answers would be favored
    loss         the mean of -ln p(next token), in nats; 1 nat = 1.44 bits
    perplexity   exp(loss): as uncertain as a choice among so many equally likely tokens
    +-           the standard error: how much the result would vary with another sample of the same size

The table goes to the screen, and one line per task to eval.jsonl in the stage folder, which evals/plot.py
draws, and into the model card of a model that was trained here.
                                                                                     next: curate/filters.py
"""

import argparse
import json
import math
import time
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from config import UserError
from corpus.sources import Documents, account, add_reading_flags, locate, reading
from evals import benchmarks, score
from evals.answers import ask_all
from evals.benchmarks import Item
from model import SmolLM
from plumbing import card, checkpoint, disk
from plumbing.processes import command, pick_device
from tokenizer import Tokenizer

HELD_OUT = 0.02  # of released models, which do not say what they held out
UNSEEN = {"builtin-code": "standard library, unseen files", "builtin-docs": "documentation, unseen"}


def print_row(name: str, value: float, form: str, of: str, error: float | None = None) -> None:
    figure = f"{value:6{form}}" + ("" if error is None else f" +- {error:{form}}")
    print(f"{name:42}  {figure:16}  {of}")


def builtin(folder: Path, model: SmolLM, tok: Tokenizer, args: argparse.Namespace) -> dict[str, float]:
    """The built-in evaluation: {name: share or number}. Prints each row as soon as it is known."""
    results, reference = {}, reference_of(folder)  # opened first: it may be gone

    def report(name: str, value: float, of: str) -> None:
        results[name] = value
        print_row(name, value, ".1%", of)

    for group, (count, n) in ask_all(model, tok, not args.no_generation_prompt, args.show).items():
        report(group, count / n, f"{count} of {n}")
    log_pi, of = score.score_pairs(model, tok), f"of {score.PAIRS} held-out pairs"
    report("preferred answer is the likelier one", score.share_of_chosen(log_pi), of)
    if reference:
        log_ref = score.score_pairs(reference.to(model.head.device), tok)
        report("reward accuracy", score.share_of_chosen(log_pi - log_ref), of)
    held_out = checkpoint.held_out(folder)
    for source, what in UNSEEN.items():
        texts = score.unseen_texts(source, HELD_OUT if held_out is None else held_out)
        if not texts:
            print(f"no text of {source} is unseen: val_fraction was {held_out} in one of the stages")
            continue
        bits, error = score.bits_per_byte(score.text_losses(model, tok, texts))
        name = f"bits per byte, {what}"
        results |= {name: bits, f"{name} stderr": error}
        print_row(name, bits, ".3f", f"{len(texts)} texts, {sum(map(len, texts)):,} characters", error)
    return results


def reference_of(folder: Path) -> SmolLM | None:
    """The model that DPO started from, or None for other stages."""
    if folder.parent.name != "dpo" or not (folder / "train.json").exists():
        return None
    facts = disk.read_json(folder / "train.json", {"config": {}})
    start = facts.get("started_from") or facts["config"].get("init_from")
    return checkpoint.load(start)[0] if start else None


def choose(items: list[Item], model: SmolLM, tok: Tokenizer) -> dict[str, float]:
    """Multiple choice: {name: number}, printed."""
    likelihoods, n_cut = score.log_likelihoods(model, tok, items)
    results = score.accuracies(items, likelihoods)
    for name in ("acc", "acc_norm"):
        print_row(name, results[name], ".1%", f"of {len(items):,} questions", results[f"{name}_stderr"])
    if n_cut:
        print(f"only the end was read of {n_cut:,} questions, longer than {model.cfg.seq_len} tokens")
    return {**results, "questions": len(items), "cut": n_cut}


def read_text(documents: Documents, model: SmolLM, tok: Tokenizer, limit: int | None) -> dict:
    """Loss, perplexity and bits per byte of a source's texts: {name: number}, printed."""
    source, texts = documents.source, islice(documents, limit)
    losses = score.text_losses(model, tok, tqdm(texts, "reading", unit=" texts", disable=None, leave=False))
    if not len(losses):
        raise UserError(f"there is no text to read:\n{account(**documents.state())}")
    nats, tokens, n_bytes = losses.sum(dim=0).tolist()
    loss, (bits, error) = nats / tokens, score.bits_per_byte(losses)
    perplexity = math.exp(min(loss, 700))
    print_row("loss", loss, ".3f", "nats per token")
    print_row("perplexity", perplexity, ".3f", f"of {tokens:,.0f} tokens")
    print_row("bits per byte", bits, ".3f", f"{len(losses):,} texts, {n_bytes:,.0f} bytes", error)
    print(account(**documents.state()))
    return {"loss": loss, "perplexity": perplexity, "bits per byte": bits, "bits per byte stderr": error,
            "source": source, "texts": len(losses), "tokens": int(tokens), "bytes": int(n_bytes)}


# ---------------------------------------------------------------------------------------------------------
# the command; skip the rest at a first reading

TASKS = ("builtin", "text", *benchmarks.HUB)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for values that cannot work."""
    parser = argparse.ArgumentParser(prog="python -m evals", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a step folder, a stage folder (its newest step), or a hub name")
    parser.add_argument("--tasks", default="builtin", help=f"one or more of {', '.join(TASKS)}, with commas "
                        "between (default builtin)")
    parser.add_argument("--benchmarks", metavar="FOLDER", help="read FOLDER/hellaswag.jsonl or .parquet ..., "
                        "with the columns of the hub, instead of the hub")
    parser.add_argument("--style", choices=benchmarks.STYLES, default="smollm",
                        help="the prompts of SmolLM's authors (default) or of lm-evaluation-harness")
    parser.add_argument("--text", metavar="SOURCE", help="for the task text: a file, a folder, or another "
                        "source that data.py reads")
    add_reading_flags(parser)
    parser.add_argument("--limit", type=int, help="only the first LIMIT questions or texts")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--show", action="store_true", help="print the answers that are not good (builtin)")
    parser.add_argument("--no_generation_prompt", action="store_true", help="leave out the sign that it is "
                        "the model's turn, as the example on SmolLM-Instruct v0.1's card did (builtin)")
    args = parser.parse_args(argv)
    args.tasks = args.tasks.split(",")
    unknown = [task for task in args.tasks if task not in TASKS]
    for is_wrong, message in (
            (unknown, f"there is no task {', '.join(unknown)}: there are {', '.join(TASKS)}"),
            ("text" in args.tasks and not args.text, "--tasks=text needs --text=SOURCE, what is to be read"),
            (args.text and "text" not in args.tasks, f"--text={args.text} needs --tasks=text"),
            (args.benchmarks and not {*args.tasks} & {*benchmarks.HUB},
             f"--benchmarks={args.benchmarks} needs --tasks with one or more of {', '.join(benchmarks.HUB)}"),
            (args.limit and args.tasks == ["builtin"], f"--limit={args.limit} needs a benchmark or text"),
            (args.show and "builtin" not in args.tasks, "--show needs the task builtin"),
            (args.no_generation_prompt and "builtin" not in args.tasks,
             "--no_generation_prompt needs the task builtin"),
            (args.limit is not None and args.limit < 1, f"--limit={args.limit} must be 1 or more")):
        if is_wrong:
            raise UserError(message)
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    device, folder = pick_device(args.device), checkpoint.find(args.checkpoint)
    if args.text:
        locate(args.text)
    items = {task: benchmarks.items(task, args.style, args.benchmarks, args.limit)
             for task in args.tasks if task in benchmarks.HUB}  # a broken file is reported before any work
    model, tok = checkpoint.load(folder)
    model.to(device)
    for task in args.tasks:
        print(f"{folder}: {task}" + (f", prompts of {args.style}" if task in items else ""))
        prompted = task == "builtin" and not args.no_generation_prompt
        line = {"checkpoint": folder.name, "task": task, "generation_prompt": prompted}
        began = time.perf_counter()
        if task == "builtin":
            results = builtin(folder, model, tok, args)
        elif task == "text":
            results = read_text(Documents(args.text, reading(args)), model, tok, args.limit)
        else:
            line["style"], results = args.style, choose(items[task], model, tok)
        line |= {"seconds": time.perf_counter() - began, **results}
        path = folder.parent / "eval.jsonl"
        with disk.writable(path), open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")
        if (folder / "README.md").exists():  # that of a finished run
            card.write(folder, model, tok)


if __name__ == "__main__":
    command(main, own_help=True)

"""
python -m bench: how fast is this project, next to another one, on this machine, now?

    python -m bench train        pretraining steps                                    against transformers
    python -m bench sample       reading a prompt (prefill), writing on (decode)      against transformers
    python -m bench sft          packed rows, against rows padded to the longest chat
    python -m bench dpo          steps on preference pairs                            against trl
    python -m bench tokenizer    learning merges, and encoding                        against tokenizers
    python -m bench neighbor     pretraining steps beside a busy process per core     against steps alone
    python -m bench shakespeare  what a small text teaches in two minutes of one core     against nanoGPT
    python -m bench plan config/day.py      what a run will cost: operations, memory, disk, hours; computed

A machine is never quiet, and two numbers from two different minutes say little. Six rules make it fair:

    same work          both sides get the same shape, weights, ids and dtype. The first result of each, a loss
                       or a count, is printed: if the results differ, so did the work
    own processes      nothing that one library sets or holds reaches the other
    warm-up            each work runs once before it is timed: memory is allocated, kernels are chosen
    turns              ours, theirs, ours, theirs: a slow minute hits both
    ratios             each round gives one, and the table shows their median and range. CPU time counts only
                       the time in which a process ran, wall-clock time also that in which it had to wait
    limits             how fast this machine multiplies matrices and reads memory: what is left to gain

To train on a token takes 6 N + 6 L C T operations (N parameters, L layers, rows of T ids, width C). To write
one, all N weights are read from memory. "Of the limit" compares a side with that. What came out is in
docs/performance.md.
"""

import argparse
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import torch

import config
from bench import plan, shakespeare
from bench.sampling import sample_ours, sample_transformers
from bench.tokenizing import tokenizer_ours, tokenizer_tokenizers
from bench.training import dpo_ours, dpo_trl, sft, steps_beside, train_ours, train_transformers
from bench.turns import compare, limits
from config import UserError
from plumbing.processes import command

# A side is a function: options -> {row of the table: (work, amount, unit)}. Calling work() does it once, and
# amount says how much that is: 2048 tokens, 4 pairs. What work() returns must be the same on both sides.
SIDES: dict[str, dict[str, Callable]] = {
    "train": {"ours": train_ours, "transformers": train_transformers},
    "sample": {"ours": sample_ours, "transformers": sample_transformers},
    "sft": {"ours": partial(sft, packed=True), "padded": partial(sft, packed=False)},
    "dpo": {"ours": dpo_ours, "trl": dpo_trl},
    "tokenizer": {"ours": tokenizer_ours, "tokenizers": tokenizer_tokenizers},
    "neighbor": {"disturbed": partial(steps_beside, busy=True), "alone": partial(steps_beside, busy=False)},
}

# ---------------------------------------------------------------------------------------------------------
# the table


def spread(values: list[float]) -> str:
    """[3, 1, 2] -> "2.00 (1.00 to 3.00)": median and range."""
    return f"{statistics.median(values):,.2f} ({min(values):,.2f} to {max(values):,.2f})"


def share(row: str, o: Namespace, rate: float, limit: dict[str, float]) -> str:
    """How much of the machine's limit so many tokens per second reach, or ""."""
    cfg = config.load_preset(o.config)
    if row == "step":
        operations = rate * replace(cfg, seq_len=o.T).flops_per_token
        return f"{operations / limit['operations']:.0%} of the limit"
    if row.startswith("decode"):
        size = cfg.n_params * getattr(torch, o.dtype).itemsize  # read once for all rows of the batch
        return f"{rate / int(row.split()[-1]) * size / limit['bytes']:.0%} of the limit"
    return ""


def show(facts: dict, times: dict, o: Namespace, limit: dict[str, float]) -> None:
    """Print the table of what compare() returned."""
    for row, rounds in times.items():
        names, units = list(facts), {fact[row][1] for fact in facts.values()}
        rates = {name: [[facts[name][row][0] / seconds for seconds in clocks] for clocks in rounds[name]]
                 for name in names}                           # {side: [[per second, per CPU second], ...]}
        print(f"\n{row}, {units.pop()} per second: median (range)")
        for name in names:
            by_wall = [rate for rate, _ in rates[name]]
            reached = share(row, o, statistics.median(by_wall), limit)
            print(f"    {name:<14}{spread(by_wall):<34}{reached}".rstrip())
        for clock, title in enumerate(["", " in CPU time"][:1 if o.device == "cuda" else 2]):
            ratios = [a[clock] / b[clock] for a, b in zip(*rates.values())]
            print(f"    {' / '.join(names)}{title}: {spread(ratios)}")
        results = {name: facts[name][row][2] for name in names}
        if None not in results.values():
            print("    first result: " + ", ".join(f"{name} {results[name]:.8g}" for name in names))


# ---------------------------------------------------------------------------------------------------------
# the command line


def parse_args(argv: list[str]) -> Namespace:
    """The command line. Raises UserError for a number that is too small."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SIDES)
    parser.add_argument("--config", default="config/smol_135m.py", help="a preset, for its shape")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both sides")
    numbers = {"batch": (4, "rows per step"), "T": (512, "positions in a row, or in a prompt"),
               "new": (48, "sample: ids to write"), "megabytes": (20, "tokenizer: how much text"),
               "rounds": (5, "how often each side is timed"),
               "threads": (torch.get_num_threads(), "CPU threads of each process")}
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    o = parser.parse_args(argv)
    for name in numbers:
        if getattr(o, name) < 1:
            raise UserError(f"--{name}={getattr(o, name)} must be at least 1")
    config.load_preset(o.config)
    o.device = "cuda" if torch.cuda.is_available() else "cpu"
    return o


def main(argv: list[str]) -> None:
    others = {"shakespeare": shakespeare.main, "plan": plan.main}  # they have no two sides that take turns
    if argv and argv[0] in others:
        return others[argv[0]](argv[1:])
    o = parse_args(argv)
    torch.set_num_threads(o.threads)
    limit = limits(o)
    print(f"{o.device}, {o.threads} threads: matrix products {limit['operations'] / 1e9:,.0f} GFLOP/s in "
          f"{o.dtype}, reading {limit['bytes'] / 1e9:,.0f} GB/s; torch {torch.__version__}, Python "
          f"{sys.version.split()[0]}", flush=True)
    facts, times = compare(SIDES[o.what], o)
    show(facts, times, o, limit)
    if o.what == "train":  # for python -m bench plan
        amount, seconds = facts["ours"]["step"][0], [wall for wall, _ in times["step"]["ours"]]
        plan.remember(o, amount / statistics.median(seconds))


if __name__ == "__main__":
    command(main, own_help=True)

"""
scaling.py: a bigger model, or more text?

Training costs about 6 operations (FLOP) per parameter and token. So the same compute buys a large model that
reads little or a small one that reads much. In between is the best use of it:

    loss |  .                     .
         |    .                .             each dot is one training run, all of the same compute:
         |       .         .                 an IsoFLOP curve (Hoffmann et al. 2022, "Chinchilla")
         |           .  .
         +---------------------------- log of the parameters
          small, reads much    large, reads little

Repeat it with more compute, and see where the lowest point moves:

    python -m learn.scaling --jobs=2                                     an hour on two quiet cores
    python -m learn.scaling --budgets 2e12 4e12 --seeds 8                a part of it
    python -m learn.scaling --data=my.jsonl --out_dir=out/mine           --field=value changes all runs

Each run is the demo in another size (config.sized), with a schedule of its own that ends when the compute is
used up: a loss from before the decay says little (lr_at in train.py). The command prints a table and the law,
and writes scaling_law.png (needs matplotlib) to out/scaling. Interrupted, it resumes. What came out:
docs/scaling_law.md.
"""

import argparse
import math
import random
import shutil
import statistics
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import numpy as np

import data
import train
from config import Config, UserError, sized
from config import load as load_config
from config.demo import config as demo
from curate.experiment import mean_and_range, run_all
from evals.plot import import_pyplot, save
from plumbing import disk, shards
from plumbing.processes import command
from tokenizer import load_or_train

LAYERS, BUDGETS, SEEDS = [1, 2, 3, 4, 6], [1.5e12, 3e12, 6e12, 1.2e13], [8, 9, 10]
MOST_EPOCHS = 5  # of a source; read four times, text is nearly as good as new (Muennighoff et al. 2023)
FEWEST_STEPS = 80  # a shorter run measures its own beginning
VAL_ROWS = 256  # of held-out text
DRAWS = 1000  # of four fifths of the runs, for the ranges

# the preset of all runs
config = replace(demo, out_dir="out/scaling", eval_every=0, save_every=0, sample_every=0)

# ---------------------------------------------------------------------------------------------------------
# the law: what follows from the scores


def lowest(sizes: list[float], losses: list[float]) -> float:
    """Where the parabola through (log size, loss) is lowest; nan unless that is between two of the sizes."""
    if len(sizes) < 3:
        return math.nan
    x = np.log(sizes)
    a, b, _ = np.polyfit(x, losses, 2)
    return math.exp(-b / (2 * a)) if a > 0 and min(x) < -b / (2 * a) < max(x) else math.nan


def exponent(budgets: list[float], best: list[float]) -> float:
    """e of best ~ budget^e, the slope of a line through the logarithms: [1, 100], [3, 30] -> 0.5"""
    known = ~np.isnan(best)
    if known.sum() < 2:
        return math.nan
    return float(np.polyfit(np.log(budgets)[known], np.log(best)[known], 1)[0])


# What a run is placed by. N counts the embedding: it is tied, so it is also the output head, a matrix that
# every token is multiplied by. Kaplan et al. (2020) left it out, which changes the exponent of small models.
SIZES = {"N": "parameters", "N without embedding": "parameters in blocks", "D": "tokens"}


def isoflop(scores: list[dict], budget: float, size: str) -> tuple[list[float], list[list[float]]]:
    """The curve of one budget: (its sizes, the losses of each one's seeds)."""
    points: dict[float, list[float]] = {}
    for score in scores:
        if score["budget"] == budget:
            points.setdefault(score[size], []).append(score["bits per byte"])
    return list(points), list(points.values())


def law(scores: list[dict]) -> dict[str, float]:
    """{what: value}: the best N and D of each budget, tokens per parameter, and the exponents."""
    budgets = sorted({score["budget"] for score in scores})
    found: dict[str, float] = {}
    for name, size in SIZES.items():
        curves = [isoflop(scores, budget, size) for budget in budgets]
        best = [lowest(sizes, list(map(statistics.mean, losses))) for sizes, losses in curves]
        found |= {f"{name} at {budget:.1e}": value for budget, value in zip(budgets, best)}
        found[f"{name} ~ C^"] = exponent(budgets, best)
    return found | {f"D/N at {budget:.1e}": found[f"D at {budget:.1e}"] / found[f"N at {budget:.1e}"]
                    for budget in budgets}


def ranges(scores: list[dict]) -> dict[str, tuple[float, float, float]]:
    """{what: (from, to, in which share of the draws it exists)}: the 10th and 90th percentile of what law
    gives for four fifths of the runs, drawn at random again and again, as in Hoffmann et al.: how much hangs
    on single runs, on their seeds as well as on their sizes."""
    rng, found = random.Random(0), {}
    draws = [law(rng.sample(scores, k=round(0.8 * len(scores)))) for _ in range(DRAWS)]
    for what in law(scores):
        values = [draw[what] for draw in draws if not math.isnan(draw.get(what, math.nan))]
        low, high = np.quantile(values or [math.nan], (0.1, 0.9))
        found[what] = float(low), float(high), len(values) / DRAWS
    return found


# ---------------------------------------------------------------------------------------------------------
# the runs


def batch_of(budget: float) -> int:
    """Rows per step, in all sizes: the demo's, times the cube root of compute (config.sized says why)."""
    usual = demo.flops_per_token * demo.tokens_per_step * demo.max_steps
    return max(1, round(demo.batch * (budget / usual) ** (1 / 3)))


def plan(cfg: Config, n_layer: int, budget: float, seed: int) -> dict:
    """The fields of one run that differ from cfg."""
    size = sized(n_layer)
    shape = ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "lr")
    fields = {name: getattr(size, name) for name in shape}
    batch = batch_of(budget)
    steps = round(budget / (replace(cfg, **fields).flops_per_token * cfg.seq_len * batch))
    folder = Path(cfg.out_dir).as_posix()
    return {**fields, "batch": batch, "micro_batch": batch, "max_steps": steps, "seed": seed,
            "eval_batches": math.ceil(VAL_ROWS / batch), "tokenizer": f"{folder}/tokenizer",
            "out_dir": f"{folder}/runs/{budget:.2e}_{n_layer}_{seed}"}


def plans(argv: list[str], args: argparse.Namespace) -> Iterator[tuple[list[str], dict]]:
    """(what python train.py reads, what is known of the run before it), seed by seed. Makes the tokenizer and
    the tokens, which all runs share. Says which runs are left out."""
    cfg = replace(load_config(argv), max_steps=0)  # so that all of each source is prepared
    tok = load_or_train(cfg)
    for source in cfg.sources:
        shards.write_shards(source, cfg, tok)
    rows = data.Batches(cfg, tok).rows
    for seed in args.seeds:
        for budget in args.budgets:
            for n_layer in args.layers:
                fields = plan(cfg, n_layer, budget, seed)
                run = replace(cfg, **fields)
                tokens = run.max_steps * run.tokens_per_step
                epochs = max(weight * tokens / rows["train", source].tokens
                             for source, weight in run.mixtures[0][1].items())
                if run.max_steps < FEWEST_STEPS or epochs > MOST_EPOCHS:
                    if seed == args.seeds[0]:
                        print(f"left out: {n_layer} layers at {budget:.1e} FLOP would take {run.max_steps:,} "
                              f"steps and read a source {epochs:.1f} times")
                    continue
                yield ([*argv, *(f"--{name}={value}" for name, value in fields.items())],
                       {"flags": argv[1:], "n_layer": n_layer, "budget": budget, "seed": seed,
                        "parameters": run.n_params, "tokens": tokens, "epochs": epochs,
                        "parameters in blocks": run.n_params - run.vocab_size * run.d_model,
                        "FLOP": run.flops_per_token * tokens, "steps": run.max_steps})


def one_run(work: tuple[list[str], dict]) -> None:
    """Train one model and write its score.json, unless there is one. What it prints goes to run.txt."""
    argv, known = work
    cfg = load_config(argv)
    out = Path(cfg.out_dir)
    if (out / "score.json").exists():
        return
    shutil.copytree(out.parents[1] / "data", out / "data", dirs_exist_ok=True)
    with open(out / "run.txt", "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        train.main(argv)
    line = disk.read_lines(out / "pretrain" / "log.jsonl")[-1]
    disk.write_json(out / "score.json", {**known, "bits per byte": line["val_bits_per_byte"]})
    shutil.rmtree(out / "data")


# ---------------------------------------------------------------------------------------------------------
# the table and the picture


def table(scores: list[dict]) -> Iterator[str]:
    """The runs, mean and range over their seeds, as lines of a Markdown table."""
    yield "| FLOP | layers | parameters | in blocks | tokens | steps | epochs | runs | bits per byte |"
    yield "|" + "---|" * 9
    for budget, n_layer in dict.fromkeys((score["budget"], score["n_layer"]) for score in scores):
        runs = [score for score in scores if (score["budget"], score["n_layer"]) == (budget, n_layer)]
        first, bits = runs[0], mean_and_range([run["bits per byte"] for run in runs], ".3f")
        yield (f"| {first['FLOP']:.2e} | {n_layer} | {first['parameters']:,} | "
               f"{first['parameters in blocks']:,} | {first['tokens']:,} | {first['steps']:,} | "
               f"{first['epochs']:.1f} | {len(runs)} | {bits} |")


def law_lines(scores: list[dict]) -> Iterator[str]:
    """What law found, with its ranges: a Markdown table of the lowest points, and the exponents."""
    found, drawn = law(scores), ranges(scores)

    def cell(what: str, form: str, unit: float = 1) -> str:
        value, low, high = (each / unit for each in (found[what], *drawn[what][:2]))
        return f"{value:{form}} ({low:{form}} to {high:{form}})"

    yield "| FLOP | N, millions | N without embedding | D, millions | D/N | of the draws |"
    yield "|" + "---|" * 6
    for budget in sorted({score["budget"] for score in scores}):
        cells = [cell(f"{name} at {budget:.1e}", ".3f", 1e6) for name in SIZES]
        share = drawn[f"N at {budget:.1e}"][2]
        yield f"| {budget:.1e} | {' | '.join(cells)} | {cell(f'D/N at {budget:.1e}', '.1f')} | {share:.0%} |"
    yield ""
    for name in SIZES:
        yield f"{name} ~ C^{cell(f'{name} ~ C^', '.2f')}, in {drawn[f'{name} ~ C^'][2]:.0%} of the draws"


def draw(scores: list[dict], path: Path) -> Path:
    """The IsoFLOP curves, and the best size and tokens against compute."""
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.6), width_ratios=(3, 2))
    budgets, found = sorted({score["budget"] for score in scores}), law(scores)
    colors = pyplot.get_cmap("viridis")(np.linspace(0.85, 0.1, len(budgets)))
    for budget, color in zip(budgets, colors):
        sizes, losses = isoflop(scores, budget, "parameters")
        means, lowest_at = list(map(statistics.mean, losses)), found[f"N at {budget:.1e}"]
        left.plot(sizes, means, "o", color=color, markersize=4, label=f"{budget:.1e} FLOP")
        left.vlines(sizes, list(map(min, losses)), list(map(max, losses)), color=color, linewidth=1)
        if len(sizes) > 2:
            fit, x = np.polyfit(np.log(sizes), means, 2), np.geomspace(min(sizes), max(sizes))
            left.plot(x, np.polyval(fit, np.log(x)), color=color, linewidth=1)
            left.plot(lowest_at, np.polyval(fit, np.log(lowest_at)), "*", color=color, markersize=11)
    left.set(xscale="log", xlabel="parameters", ylabel="bits per byte of held-out text")
    left.legend(fontsize=8)
    left.set_xticks(*zip(*{(N, f"{N / 1e6:.2g}M") for N in (score["parameters"] for score in scores)}))
    for name, marker in (("N", "*"), ("D", "s")):
        best = [found[f"{name} at {budget:.1e}"] for budget in budgets]
        right.plot(budgets, best, marker + "-", label=f"{SIZES[name]} ~ C^{found[f'{name} ~ C^']:.2f}")
    right.set(xscale="log", xlabel="compute C (FLOP)", title="the best use of compute")
    right.set_xticks(budgets, [f"{budget:.1e}" for budget in budgets])
    for axis in (left.xaxis, right.xaxis):
        axis.set_minor_locator(pyplot.NullLocator())
    if not all(math.isnan(found[f"N at {budget:.1e}"]) for budget in budgets):
        right.set_yscale("log")
    right.legend(fontsize=8)
    return save(figure, path)


# ---------------------------------------------------------------------------------------------------------
# the command


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(sizes, budgets, seeds, jobs; what python train.py reads: this file as its preset, and flags)."""
    parser = argparse.ArgumentParser(prog="python -m learn.scaling", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, help=f"default {LAYERS}")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help=f"FLOP, default {BUDGETS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help=f"default {SEEDS}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    args, flags = parser.parse_known_args(words)
    for name, least in (("layers", 1), ("budgets", 1), ("seeds", 0), ("jobs", 1)):
        for value in np.atleast_1d(getattr(args, name)):
            if not least <= value < math.inf:
                raise UserError(f"--{name}={value:g} must be a number, {least} or more")
    set_here = plan(config, 1, 1, 0).keys() - {"out_dir", "tokenizer"}
    if taken := [flag for flag in flags if flag.partition("=")[0].removeprefix("--") in set_here]:
        raise UserError(f"{taken[0]} cannot be the same in all runs: --layers, --budgets and --seeds set it")
    return args, [__file__, *flags]


def main(words: list[str]) -> None:
    args, argv = parse(words)
    folder = Path(load_config(argv).out_dir)
    with disk.writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    work = list(plans(argv, args))
    if not work:
        raise UserError("no run is left: choose other --layers and --budgets")
    files = [Path(load_config(flags).out_dir) / "score.json" for flags, _ in work]
    for file, (_, known) in zip(files, work):
        if file.exists() and {**disk.read_json(file), **known} != disk.read_json(file):
            raise UserError(f"{file} is from a run with other flags: choose another --out_dir")
    run_all(one_run, work, args.jobs)
    scores = [disk.read_json(file) for file in files]
    print("\n".join([*table(scores), "", *law_lines(scores)]))
    try:
        print(draw(scores, folder / "scaling_law.png"))
    except UserError as error:
        print(f"no picture: {error}")


if __name__ == "__main__":
    command(main, own_help=True)

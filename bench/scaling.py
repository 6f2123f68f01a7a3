"""
scaling.py: two questions about one's own speed, for bench.py.

    loop     how much of a step is not forward, backward or optimizer: reading rows, logging, the bar
    scale    how tokens a second change as rows grow longer, batches and models larger, processes more
                                                                                             next: ../bench.py
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from evals import plot
import train
from config import UserError


def loop(o: SimpleNamespace) -> None:
    """Train o.config for some steps, with clocks around forward, backward and optimizer; print the rest."""
    spent, steps = {"work": 0.0}, []

    def clocked(function):
        def work(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent["work"] += time.perf_counter() - began
        return work

    def noted(*args):
        before, began = spent["work"], time.perf_counter()
        line = train_step(*args)
        steps.append((began, spent["work"] - before))
        return line

    places = [(torch.Tensor, "backward"), (torch.optim.AdamW, "step"), (torch.optim.Muon, "step"),
              (train, "loss_fn"), (train, "clip_grad_norm_")]
    kept = [(place, name, getattr(place, name)) for place, name in places]
    train_step = train.train_step
    try:
        for place, name, function in kept:
            setattr(place, name, clocked(function))
        train.train_step = noted
        with tempfile.TemporaryDirectory() as folder:
            train.main([o.config, f"--out_dir={folder}", "--data=builtin-docs",
                        f"--max_steps={40 * o.rounds}", "--eval_every=0", "--save_every=0",
                        "--sample_every=0", "--val_fraction=0.0"])
    finally:
        train.train_step = train_step
        for place, name, function in kept:
            setattr(place, name, function)
    whole = [(after - began, work) for (began, work), (after, _) in zip(steps[3:], steps[4:])]
    rest = [(seconds - work) / seconds for seconds, work in whole]
    print(f"of a step of {statistics.median(seconds for seconds, _ in whole):.3f} s, "
          f"{statistics.median(rest):.2%} is neither forward, backward, clipping nor optimizer (median of "
          f"{len(rest)} steps; nine of ten below {sorted(rest)[len(rest) * 9 // 10]:.2%})")


# ---------------------------------------------------------------------------------------------------------
# growth

LENGTHS, BATCHES = (512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16)
MODELS = ("config/demo.py", "config/smol_135m.py", "config/smol_360m.py")


def scale(o: SimpleNamespace, compare: Callable) -> None:
    """Print tokens/s and memory for each length, batch, model and number of processes, and draw them."""
    rows = []

    def measure(title, **change):
        options = SimpleNamespace(**(vars(o) | change))
        results, _, _ = compare("train", ["ours"], options)
        rates, memory = zip(*results["step"]["ours"])
        rows.append((title, next(iter(change.values())), statistics.median(rates), max(memory)))
        print(f"{title:<12}{str(rows[-1][1]):<24}{rows[-1][2]:>12,.0f} tokens/s{rows[-1][3] / 1e9:>8.2f} GB",
              flush=True)

    for T in LENGTHS:
        measure("length", T=T, batch=1)
    for batch in BATCHES:
        measure("batch", batch=batch)
    for name in MODELS:
        measure("model", config=name)
    for world in (1, 2):
        rows.append(("processes", world, processes(o, world), 0))
        print(f"{'processes':<12}{world:<24}{rows[-1][2]:>12,.0f} tokens/s", flush=True)
    draw(rows, o.out)


def processes(o: SimpleNamespace, world: int) -> float:
    """Tokens/s of `world` processes of train.py under torchrun, one thread each, with the demo's model."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
                   "train.py", "config/demo.py", f"--out_dir={folder}", "--max_steps=40", "--eval_every=0",
                   "--save_every=0", "--sample_every=0", "--micro_batch=4", "--data=builtin-docs",
                   "--val_fraction=0.0"]
        done = subprocess.run(command, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        log = Path(folder) / "pretrain" / "log.jsonl"
        if done.returncode or not log.exists():
            raise UserError(f"{world} processes failed: {done.stderr[-500:]}")
        lines = plot.read(log)
    return statistics.median(line["tokens_per_second"] for line in lines[5:])


def draw(rows: list[tuple], path: str) -> None:
    """Tokens a second against each of what grew."""
    try:
        import matplotlib
    except ImportError:
        return print("no picture: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    titles = list(dict.fromkeys(title for title, *_ in rows))
    _, panels = plt.subplots(1, len(titles), figsize=(3.4 * len(titles), 3), layout="constrained")
    for panel, title in zip(panels, titles):
        names, rates = zip(*[(Path(str(x)).stem, rate) for kind, x, rate, _ in rows if kind == title])
        panel.plot(names, rates, "o-")
        panel.set(xlabel=title)
        panel.set(yscale="log") if title == "model" else panel.set(ylim=(0, None))
    panels[0].set_ylabel("tokens a second")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=120)
    print(path)

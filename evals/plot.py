"""
plot.py: one picture of all stages, from their log.jsonl and eval.jsonl.

    python plot.py out/demo                     writes out/demo/stages.png

The stages stand side by side, each from its first step to its last: the loss, the learning rate, the norm of
the gradient, the margin between chosen and rejected answers (DPO only), and below them what the answers to
the held-out questions were worth after each stage. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import config
from config import UserError

STAGES = ("pretrain", "sft", "dpo")
ROWS = {"loss": ("loss", "val_loss"), "learning rate": ("lr",), "gradient norm": ("grad_norm",),
        "DPO margin": ("margin", "val_margin")}


def read(path: Path) -> list[dict]:
    """The objects of a .jsonl file, [] if there is none. A last line that is being written is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            break
    return found


def curves(ax: Any, log: list[dict], names: tuple[str, ...]) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in log if name in line]
        if points:
            ax.plot(*zip(*points), marker="." if name.startswith("val") else None, linewidth=1, label=name)
            ax.legend(fontsize=7)


def newest(evals: dict[str, list[dict]]) -> dict[str, dict]:
    """The newest line of each stage's eval.jsonl, but for experiments without the generation prompt."""
    return {stage: line for stage, found in evals.items() for line in found if line.get("generation_prompt")}


def accuracies(ax: Any, evals: dict[str, list[dict]]) -> None:
    """The newest evaluation of each stage as bars: one group of bars for each question group."""
    last = newest(evals)
    names = [name for name in next(iter(last.values()), {}) if all(
        isinstance(line.get(name), float) and 0 <= line[name] <= 1 for line in last.values())]
    for i, (stage, line) in enumerate(last.items()):
        ax.barh([n + i * 0.25 for n in range(len(names))], [line[name] for name in names], 0.25, label=stage)
    ax.set_yticks([n + 0.25 for n in range(len(names))], names, fontsize=7)
    ax.invert_yaxis()
    ax.set_title("held-out questions, share of the answers", fontsize=9)
    if last:
        ax.legend(fontsize=7)


def draw(folder: Path) -> Path:
    """Write stages.png into a run's folder; returns its path. Raises UserError without logs or matplotlib."""
    logs = {stage: read(folder / stage / "log.jsonl") for stage in STAGES}
    logs = {stage: log for stage, log in logs.items() if log}
    if not logs:
        raise UserError(f"there is no log.jsonl below {folder}: name the folder of a run, like out/demo")
    try:
        import matplotlib
    except ImportError:
        raise UserError("plot.py needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # into a file, without a screen
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(4 * len(logs) + 2, 12), layout="constrained")
    grid = figure.add_gridspec(len(ROWS) + 2, len(logs))
    for column, (stage, log) in enumerate(logs.items()):
        for row, (title, names) in enumerate(ROWS.items()):
            if not any(name in line for line in log for name in names):
                continue  # a margin is known to DPO only
            ax = figure.add_subplot(grid[row, column])
            ax.set_title(f"{stage}: {title}", fontsize=9)
            curves(ax, log, names)
    accuracies(figure.add_subplot(grid[len(ROWS):, :]), {s: read(folder / s / "eval.jsonl") for s in STAGES})
    path = folder / "stages.png"
    figure.savefig(path, dpi=110)
    return path


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="plot.py", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the out_dir of a run, like out/demo")
    print(draw(Path(parser.parse_args(argv).folder)))


if __name__ == "__main__":
    config.command(main, own_help=True)

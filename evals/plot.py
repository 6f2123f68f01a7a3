"""
evals/plot.py: one picture of all stages, from their log.jsonl and eval.jsonl.

    python -m evals.plot out/demo                     writes out/demo/stages.png; needs matplotlib

Above, a column for each stage, from its first step to its last: the loss, the learning rate, the norm of the
gradient. Below, what the newest evaluation of each stage found: the shares of answers that should be high,
apart from the one that should be low; bits per byte; and DPO's margin between chosen and rejected answers.
"""

import argparse
from pathlib import Path
from typing import Any

from config import UserError
from plumbing.disk import read_lines
from plumbing.processes import command

STAGES = ("pretrain", "sft", "dpo")
CURVES = {"loss": ("loss", "val_loss"), "learning rate": ("lr",), "gradient norm": ("grad_norm",)}
MARGIN = ("margin", "val_margin")
LOW = "rambling or unfinished answers"  # the share that should be low


def newest(evals: dict[str, list[dict]]) -> dict[str, dict]:
    """The newest built-in evaluation of each stage; those without the generation prompt are experiments."""
    return {stage: line for stage, found in evals.items() for line in found if line.get("generation_prompt")}


def panels_of(last: dict[str, dict]) -> dict[str, list[str]]:
    """{title: names of the figures in that panel}, of figures that every stage has and that are not empty."""
    first = next(iter(last.values()), {})
    names = [name for name in first if name != "seconds" and not name.endswith(" stderr")
             and all(isinstance(line.get(name), float) for line in last.values())]
    bits = [name for name in names if name.startswith("bits per byte")]
    shares = [name for name in names if not name.startswith("bits")
              and all(0 <= line[name] <= 1 for line in last.values())]
    panels = {"right answers: should be high": [name for name in shares if name != LOW],
              "should be low": [name for name in shares if name == LOW], "bits per byte: should be low": bits}
    return {title: names for title, names in panels.items() if names}


def curves(ax: Any, log: list[dict], names: tuple[str, ...], title: str) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in log if name in line]
        if points:
            ax.plot(*zip(*points), marker="." if name.startswith("val") else None, linewidth=1, label=name)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("step", fontsize=8)
    ax.legend(fontsize=7)


def bars(ax: Any, last: dict[str, dict], names: list[str], title: str) -> None:
    """A group of bars for each name, a bar for each stage, with its standard error if there is one."""
    for i, (stage, line) in enumerate(last.items()):
        places = [n + i * 0.25 for n in range(len(names))]
        errors = [line.get(f"{name} stderr", 0.0) for name in names]
        ax.barh(places, [line[name] for name in names], 0.25, xerr=errors if any(errors) else None,
                label=stage)
    labels = [name.removeprefix("bits per byte, ") for name in names]
    ax.set_yticks([n + 0.25 for n in range(len(names))], labels, fontsize=7)
    ax.invert_yaxis()
    ax.set_title(title, fontsize=9)
    if "bits" not in title:
        ax.set_xlim(0, 1)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def draw(folder: Path) -> Path:
    """Write stages.png into a run's folder; returns its path. Raises UserError without logs or matplotlib."""
    logs = {stage: read_lines(folder / stage / "log.jsonl") for stage in STAGES}
    logs = {stage: log for stage, log in logs.items() if log}
    if not logs:
        raise UserError(f"there is no log.jsonl below {folder}: name the folder of a run, like out/demo")
    try:
        import matplotlib
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # into a file, without a screen
    from matplotlib import pyplot

    last = newest({stage: read_lines(folder / stage / "eval.jsonl") for stage in STAGES})
    panels, dpo = panels_of(last), logs.get("dpo", [])
    has_margin = any(name in line for line in dpo for name in MARGIN)
    sizes = [len(names) for names in panels.values()] + [4] * has_margin  # one below the other
    heights = [2 * len(CURVES)] + [0.6 * sum(sizes) + len(sizes)] * bool(sizes)
    figure = pyplot.figure(figsize=(4 * len(logs) + 2, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = parts[0].subplots(len(CURVES), len(logs), squeeze=False)
    for row, (title, names) in enumerate(CURVES.items()):
        for column, (stage, log) in enumerate(logs.items()):
            curves(axes[row, column], log, names, f"{stage}: {title}")
    if sizes:
        below = parts[1].subplots(len(sizes), 1, squeeze=False, height_ratios=[n + 1 for n in sizes])[:, 0]
        for ax, (title, shares) in zip(below, panels.items()):
            bars(ax, last, shares, title)
        if has_margin:
            curves(below[-1], dpo, MARGIN, "dpo: margin between chosen and rejected answers")
    path = folder / "stages.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.plot", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the out_dir of a run, like out/demo")
    print(draw(Path(parser.parse_args(argv).folder)))


if __name__ == "__main__":
    command(main, own_help=True)

"""
evals/plot.py: one picture of all stages, from their log.jsonl and eval.jsonl.

    python -m evals.plot out/demo                     writes out/demo/stages.png; needs matplotlib

Above, a column for each stage: the loss, the learning rate, the norm of the gradient. Pale lines are single
steps, dark ones their running mean, rings validations. Below, what each stage changed: a dot per stage for
every group of questions, bits per byte, and what DPO did to chosen and rejected answers.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError
from plumbing.disk import read_lines
from plumbing.processes import command

STAGES = {"pretrain": "pretraining", "sft": "fine-tuning", "dpo": "preferences"}
# Okabe and Ito's colors, which color-blind readers can tell apart
BLUE, ORANGE, GREEN, RED, SKY, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#999999"
COLORS = {"pretrain": GRAY, "sft": SKY, "dpo": RED}
CURVES = {"loss": "loss", "learning rate": "lr", "gradient norm": "grad_norm"}
RAMBLING = "rambling or unfinished answers"  # the share that should be low: its complement is drawn
SHARES, BITS = "right answers (%): higher is better", "bits per byte: lower is better"

# ---------------------------------------------------------------------------------------------------------
# what is drawn


def newest(evals: dict[str, list[dict]]) -> dict[str, dict]:
    """The newest built-in evaluation of each stage; those without the generation prompt are experiments."""
    return {stage: line for stage, found in evals.items() for line in found if line.get("generation_prompt")}


def panels_of(last: dict[str, dict]) -> dict[str, dict[str, list[float]]]:
    """{title: {label: a value per stage}}, of figures that every stage has. No panel is empty."""
    first = next(iter(last.values()), {})
    names = [name for name in first if name != "seconds" and not name.endswith(" stderr")
             and all(isinstance(line.get(name), float) for line in last.values())]
    panels: dict[str, dict[str, list[float]]] = {SHARES: {}, BITS: {}}
    for name in names:
        values = [line[name] for line in last.values()]
        if name.startswith("bits per byte"):
            panels[BITS][name.removeprefix("bits per byte, ")] = values
        elif name == RAMBLING:
            panels[SHARES]["answers that end in time"] = [100 * (1 - value) for value in values]
        elif all(0 <= value <= 1 for value in values):
            panels[SHARES][name] = [100 * value for value in values]
    return {title: rows for title, rows in panels.items() if rows}


def smooth(values: Sequence[float]) -> list[float]:
    """The running mean over a twentieth of a curve: [0, 3, 0, 3, 3] -> [0, 1, 2, 2, 3].

    A window reaches equally far to both sides, less far at the beginning, so that a steep start stays where
    it is; at the end it only looks back.
    """
    half, last = max(1, len(values) // 40), len(values) - 1
    return [float(np.mean(values[i - min(i, half):i + min(i, half, last - i) + 1]))
            for i in range(len(values))]


# ---------------------------------------------------------------------------------------------------------
# drawing


def import_pyplot() -> Any:
    """matplotlib.pyplot with this project's style; UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # into a file, without a screen
    from matplotlib import pyplot
    pyplot.rcParams.update({
        "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "figure.constrained_layout.use": True})
    return pyplot


def save(figure: Any, path: Path, colors: int = 128) -> Path:
    """Write a figure as a PNG with a small palette, which takes a third of the bytes; returns the path."""
    from PIL import Image  # matplotlib needs it, too
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, facecolor="white")
    figure.clear()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").quantize(colors, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def curve(ax: Any, log: list[dict], name: str, color: str, label: str | None = None,
          scale: float = 1) -> None:
    """A figure of a log over its steps: pale, its running mean dark, its validation as rings."""
    steps, values = zip(*[(line["step"], scale * line[name]) for line in log if name in line])
    ax.plot(steps, values, color=color, linewidth=0.6, alpha=0.35)
    smoothed = values if name == "lr" else smooth(values)  # a mean would round the corners of a schedule
    ax.plot(steps, smoothed, color=color, linewidth=1.6, label=label)
    if points := [(line["step"], scale * line["val_" + name]) for line in log if "val_" + name in line]:
        ax.plot(*zip(*points), "o", color=color, markersize=4.5, markerfacecolor="white", zorder=3)


def dots(ax: Any, rows: dict[str, list[float]], stages: list[str], digits: int) -> None:
    """A line for each row with a dot per stage, which shows the way it went, and the values in words."""
    for place, values in enumerate(rows.values()):
        ax.plot([min(values), max(values)], [place] * 2, color="#cccccc", linewidth=4, zorder=1)
        for i, (stage, value) in enumerate(zip(stages, values)):  # the later, the smaller: none hides another
            ax.scatter(value, place, s=110 - 38 * i, color=COLORS[stage], zorder=2 + i, clip_on=False,
                       edgecolor="white", linewidth=0.6, label=None if place else STAGES[stage])
        ax.text(1.03, place, " → ".join(f"{value:.{digits}f}" for value in values), va="center",
                transform=ax.get_yaxis_transform())
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#eeeeee")
    ax.spines["left"].set_visible(False)


def stages(axes: Any, logs: dict[str, list[dict]]) -> None:
    """A column for each stage, a row for each of CURVES."""
    for column, (stage, log) in enumerate(logs.items()):
        for row, (title, name) in enumerate(CURVES.items()):
            ax = axes[row, column]
            if any(name in line for line in log):
                curve(ax, log, name, BLUE)
            if row == 0:
                ax.set_title(STAGES[stage], fontweight="bold")
            if column == 0:
                ax.set_ylabel(title)
            if name == "loss":  # in powers, or the first steps would hide all others
                ax.set_yscale("log", subs=())
                low, high = ax.get_ylim()
                ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10) if low <= tick <= high]
                ax.set_yticks(ticks, map(str, ticks))
            else:
                ax.set_ylim(bottom=0)
                ax.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes[-1, column].set_xlabel("step")


def rewards(ax: Any, pairs: list[dict]) -> None:
    """DPO's rewards of chosen and rejected answers over the steps; the gap between them is the margin."""
    for name, color in (("chosen", GREEN), ("rejected", RED)):
        curve(ax, pairs, f"{name}_reward", color, name)
    steps, chosen, rejected = zip(*[(line["step"], line["chosen_reward"], line["rejected_reward"])
                                    for line in pairs])
    ax.fill_between(steps, smooth(rejected), smooth(chosen), color=GREEN, alpha=0.1, linewidth=0)
    ax.text(steps[len(steps) * 2 // 3], (min(rejected) + max(chosen)) / 3, "margin")
    ax.set_xlabel("step")
    ax.legend(loc="lower left")


def draw(folder: Path) -> Path:
    """Write stages.png into a run's folder; returns its path. Raises UserError without logs or matplotlib."""
    logs = {stage: read_lines(folder / stage / "log.jsonl") for stage in STAGES}
    logs = {stage: log for stage, log in logs.items() if log}
    if not logs:
        raise UserError(f"there is no log.jsonl below {folder}: name the folder of a run, like out/demo")
    pyplot = import_pyplot()
    last = newest({stage: read_lines(folder / stage / "eval.jsonl") for stage in STAGES})
    panels, pairs = panels_of(last), [line for line in logs.get("dpo", []) if "margin" in line]
    heights = [4.2] + [0.9 + 0.26 * len(rows) for rows in panels.values()] + [2.0] * bool(pairs)
    figure = pyplot.figure(figsize=(8, sum(heights)))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    stages(parts[0].subplots(len(CURVES), len(logs), squeeze=False, sharex="col"), logs)
    for part, (title, rows) in zip(parts[1:], panels.items()):
        ax = part.subplots()
        dots(ax, rows, list(last), 0 if title == SHARES else 2)
        part.suptitle(title, fontweight="bold", fontsize=10, x=0.01, ha="left")
        if title == next(iter(panels)):
            ax.legend(ncols=len(last), loc="lower right", bbox_to_anchor=(1.3, 0.99), handletextpad=0.1)
    if pairs:
        ax = parts[-1].subplots()
        rewards(ax, pairs)
        parts[-1].suptitle("preferences: rewards of chosen and rejected answers", fontweight="bold",
                           fontsize=10, x=0.01, ha="left")
    return save(figure, folder / "stages.png")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.plot", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the out_dir of a run, like out/demo")
    print(draw(Path(parser.parse_args(argv).folder)))


if __name__ == "__main__":
    command(main, own_help=True)

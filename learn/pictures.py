"""
learn/pictures.py: the pictures of the course, drawn from a run of the demo.

    python -m learn.pictures out/demo                 writes docs/pictures/tokens.png, ...; needs matplotlib
    python -m learn.pictures out/demo rope next       only these two

progress.png needs checkpoints on the way, and chat.png, attention.png and dpo.png the later stages:

    python train.py config/demo.py --save_every=100 --keep_checkpoints=0
    python sft.py config/demo_sft.py
    python dpo.py config/demo_dpo.py

schedule.png compares two more runs, which --schedules names: one with wsd, one with --schedule=cosine.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import torch
from torch import Tensor

from config import Config, UserError
from evals.plot import BLUE, GREEN, ORANGE, RED, curve, import_pyplot, save, smooth
from learn import diagrams
from learn.diagrams import PALE_BLUE, log_of, visible
from learn.look import look_inside
from model import rope_tables
from plumbing import checkpoint, disk
from plumbing.processes import command
from sample import probabilities

QUESTION, COUNTRY = "What is the capital of France?", " France"
ANSWER = "You ask about France. Its capital is"
OPEN = "One day in"  # the model knows many continuations
MONO = "DejaVu Sans Mono"


def clearest_head(weights: Tensor, queries: list[int], keys: list[int]) -> tuple[int, int]:
    """(layer, head) that looks at the keys most, measured at that of the queries where it does so least."""
    least = weights[:, :, queries][..., keys].sum(dim=3).amin(dim=2)
    return divmod(int(least.argmax()), weights.shape[1])


def draw_attention(run: Path, pyplot: Any) -> Any:
    model, tok = checkpoint.load(run / "dpo")
    asked = tok.chat([{"role": "user", "content": QUESTION}], add_generation_prompt=True)[0]
    ids, first = asked + tok.encode(ANSWER), len(asked)
    country, weights = tok.encode(COUNTRY), look_inside(model, ids).weights
    starts = [place for place in range(len(ids)) if ids[place:place + len(country)] == country]
    keys = [start + i for start in starts for i in range(len(country))]
    layer, head = clearest_head(weights, [starts[-1] - 1, len(ids) - 1], keys)  # before France, before Paris
    names = [visible(tok.decode([i])) for i in ids]
    figure = pyplot.figure(figsize=(8, 4.4))
    ax = figure.subplots()
    image = ax.imshow(weights[layer, head, first:].tolist(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, label="weight", shrink=0.8, pad=0.01)
    font = {"family": MONO, "fontsize": 10}
    ax.set_xticks(range(len(names)), names, rotation=90, **font)
    ax.set_yticks(range(len(names) - first), names[first:], **font)
    for place in keys:
        ax.get_xticklabels()[place].set(color=RED, fontweight="bold")
    ax.set(xlabel="looks at ...", ylabel="after reading ...")
    ax.set_title(f"layer {layer}, head {head}, both counted from 0", fontweight="bold", loc="left")
    return figure


def hands(cfg: Config, pairs: list[int], positions: list[int]) -> Tensor:
    """The angle of each pair at each position, in radians from 0 on."""
    cos, sin = rope_tables(torch.tensor(positions), cfg.head_dim, cfg.rope_theta)
    return torch.atan2(sin, cos)[:, pairs].T % (2 * torch.pi)


def draw_rope(run: Path, pyplot: Any) -> Any:
    cfg, positions = checkpoint.read_config(disk.find(run / "pretrain")), [0, 1, 2, 50]
    half = cfg.head_dim // 2
    pairs = [0, half // 6, half // 2, half - 1]
    figure = pyplot.figure(figsize=(8, 6))
    axes = figure.subplots(len(pairs), len(positions), subplot_kw={"projection": "polar"})
    for pair, angles, line in zip(pairs, hands(cfg, pairs, positions).tolist(), axes):
        degrees = 180 / torch.pi * cfg.rope_theta ** (-2 * pair / cfg.head_dim)
        line[0].set_ylabel(f"pair {pair}:\n{degrees:.2g}° per\nposition", rotation=0, labelpad=40,
                           fontsize=11, va="center")
        for ax, position, angle in zip(line, positions, angles):
            ax.set(theta_zero_location="N", theta_direction=-1, ylim=(0, 1), facecolor=PALE_BLUE)
            ax.set_xticks([hour * torch.pi / 6 for hour in range(12)], [])
            ax.set_yticks([])
            ax.grid(color="white")
            ax.annotate("", (angle, 0.95), (0, 0), arrowprops={"arrowstyle": "->", "color": RED, "lw": 2.2,
                                                                "shrinkA": 0, "shrinkB": 0})
            if pair == 0:
                ax.set_title(f"position {position}", fontweight="bold")
    return figure


# ---------------------------------------------------------------------------------------------------------
# training


def draw_schedule(run: Path, pyplot: Any, schedules: tuple[Path, ...] = ()) -> Any:
    if len(schedules) != 2:
        raise UserError("it needs --schedules WSD COSINE, the stage folders of two runs")
    figure = pyplot.figure(figsize=(8, 5))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    for folder, name, color in zip(schedules, ("wsd", "cosine"), (BLUE, RED)):
        log = log_of(folder)
        curve(above, log, "lr", color, name)
        curve(below, log, "loss", color)
    above.set(ylabel="learning rate", ylim=(0, None))
    losses = smooth([line["loss"] for line in log])
    below.set(ylabel="loss", xlabel="step", ylim=(0.9 * min(losses), losses[len(losses) // 20]))
    above.legend()
    return figure


def draw_dpo(run: Path, pyplot: Any) -> Any:
    log, figure = log_of(run / "dpo"), pyplot.figure(figsize=(8, 3.4))
    beta = disk.read_json(disk.find(run / "dpo") / "train.json")["config"]["dpo_beta"]
    left, right = figure.subplots(1, 2)
    curve(left, log, "margin", BLUE)
    left.set_title("margin", fontweight="bold")
    for name, color in (("chosen", GREEN), ("rejected", RED)):  # reward = beta * (log pi - log pi_ref)
        curve(right, log, f"{name}_reward", color, name, scale=1 / beta)
    right.set_title("log p(answer): change since the start", fontweight="bold")
    right.legend()
    for ax in (left, right):
        ax.set_xlabel("step")
    return figure


# ---------------------------------------------------------------------------------------------------------
# sampling

SETTINGS = {"the model": (1.0, 0, 1.0), "temperature 0.6": (0.6, 0, 1.0), "top_k 4": (1.0, 4, 1.0),
            "top_p 0.8": (1.0, 0, 0.8)}  # (temperature, top_k, top_p), as in sample.py


@torch.no_grad()
def draw_next(run: Path, pyplot: Any) -> Any:
    model, tok = checkpoint.load(run / "pretrain")
    logits = model(torch.tensor([tok.encode(OPEN)]))[:, -1]
    best = logits[0].topk(8).indices.tolist()
    names = [*(visible(tok.decode([i])) for i in best), "others"]
    figure = pyplot.figure(figsize=(8, 3.6))
    axes = figure.subplots(1, len(SETTINGS), sharex=True, sharey=True)
    for ax, (title, setting), color in zip(axes, SETTINGS.items(), (BLUE, ORANGE, GREEN, RED)):
        p = probabilities(logits, *setting)[0, best].tolist()
        for y, share in enumerate([*p, 1 - sum(p)]):
            ax.barh(y, share, color=color)
            text = "–" if share < 1e-6 else "<1%" if share < 0.005 else f"{share:.0%}"
            ax.text(share + 0.02, y, text, va="center")
        ax.set_title(title, fontweight="bold")
        ax.set(xticks=[], xlim=(0, 1.05), ylim=(len(names) - 0.4, -0.6))
        ax.spines["bottom"].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(names)), names, family=MONO, fontsize=10)
    figure.suptitle(f"{OPEN} ...", x=0.01, ha="left")
    return figure


# ---------------------------------------------------------------------------------------------------------
# the command

PICTURES: dict[str, Callable] = {
    "tokens": diagrams.draw_tokens, "rows": diagrams.draw_rows, "parameters": diagrams.draw_parameters,
    "block": diagrams.draw_block, "attention": draw_attention, "rope": draw_rope, "schedule": draw_schedule,
    "progress": diagrams.draw_progress, "next": draw_next, "chat": diagrams.draw_chat, "dpo": draw_dpo}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m learn.pictures", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the out_dir of a run, like out/demo")
    parser.add_argument("names", nargs="*", metavar="name", help=f"which ones: {', '.join(PICTURES)}")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="where to write them")
    parser.add_argument("--schedules", type=Path, nargs=2, metavar=("WSD", "COSINE"), default=(),
                        help="stage folders of two runs, for schedule.png")
    args = parser.parse_intermixed_args(argv)
    if unknown := [name for name in args.names if name not in PICTURES]:
        raise UserError(f"there is no picture {unknown[0]!r}: choose from {', '.join(PICTURES)}")
    pyplot = import_pyplot()
    for name in args.names or PICTURES:
        more = (args.schedules,) if name == "schedule" else ()
        try:
            print(save(PICTURES[name](args.run, pyplot, *more), args.out / f"{name}.png"))
        except UserError as error:
            if args.names:
                raise
            print(f"no {name}.png: {error}")


if __name__ == "__main__":
    command(main, own_help=True)

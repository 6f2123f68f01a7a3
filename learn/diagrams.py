"""
learn/diagrams.py: pictures of letters and boxes.

A sheet is a grid of letters, so that a box is as wide as its text. What a picture shows is computed by one
function, which a test can check, and drawn by the next; python -m learn.pictures writes them all.
"""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from config import Config, UserError
from data import inputs_and_targets
from evals.plot import BLUE, GREEN, ORANGE, SKY
from model import IGNORE, SmolLM
from plumbing import checkpoint, disk
from sample import generate
from sft import encode_chat
from tokenizer import FIRST_MERGE, Tokenizer, encode_bpe

PALE_BLUE, PALE_YELLOW, PALE_GREEN, PALE_RED = PALE = "#CFE3F0", "#FBE6B8", "#C4E8DC", "#F6D3BD"
PALE_GRAY, DARK = "#EEEEEE", "#444444"
SENTENCE = "Once upon a time, 27 bees lived in an old garden."
DOCUMENTS = ("The cat ran.", "It was cold.", "A fox came.")
CHAT = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "1 + 1 = 2."}]
START = "Once upon a time"
STEPS = (0, 100, 400)  # of pretraining, and its last one


class Sheet:
    """White paper with a grid: `columns` letters of a monospaced font wide, `lines` high, line 0 on top."""

    def __init__(self, pyplot: Any, columns: float, lines: float) -> None:
        self.figure = pyplot.figure(figsize=(8, 8 * 1.9 * lines / columns), layout="none")
        self.ax = self.figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(lines, 0))
        self.ax.axis("off")
        self.font = 8 * 72 / columns / 0.602 * 0.92  # a letter of DejaVu Sans Mono is 0.602 of its size wide

    def write(self, x: float, y: float, text: str, size: float = 1, mono: bool = False, **style: Any) -> None:
        self.ax.text(x, y, text, fontsize=self.font * size, family="DejaVu Sans Mono" if mono else None,
                     **{"va": "center", **style})

    def head(self, x: float, y: float, text: str) -> None:
        self.write(x, y, text, size=1.25, fontweight="bold")

    def box(self, x: float, y: float, width: float, text: str, color: str, height: float = 1.6,
            **style: Any) -> None:
        """A colored box: x is its left edge, y its middle."""
        self.ax.bar(x + width / 2, height, width - 0.25, y - height / 2, color=color)
        self.write(x + width / 2, y, text, ha="center", **{"mono": True, **style})

    def arrow(self, x: float, y: float, x_end: float, y_end: float) -> None:
        self.ax.annotate("", (x_end, y_end), (x, y), arrowprops={"arrowstyle": "->", "color": DARK})


def visible(text: str) -> str:
    """Text as it is drawn: spaces and line breaks can be seen, what no font has becomes a question mark."""
    shown = text.replace(" ", "·").replace("\n", "⏎")
    return "".join(letter if letter.isprintable() and letter != "\ufffd" else "?" for letter in shown)


# ---------------------------------------------------------------------------------------------------------
# text to tokens


def cuts(tok: Tokenizer, text: str, sizes: tuple[int, ...]) -> dict[int, list[str]]:
    """{vocabulary size: the tokens of a text}. Merges are stored in the order in which they were learned, so
    a smaller tokenizer is the beginning of a larger one."""
    merges = [tuple(pair) for pair in json.loads(tok.rust.to_str())["model"]["merges"]]
    found = {}
    for size in sizes:
        ranks = {pair: rank for rank, pair in enumerate(merges[:size - FIRST_MERGE])}
        found[size] = [tok.decode([tok.rust.token_to_id(token)]) for token in encode_bpe(text, ranks)]
    return found


def draw_tokens(run: Path, pyplot: Any) -> Any:
    tok = Tokenizer.load(disk.find(run / "pretrain"))
    wide = 1.4  # of a letter
    sheet = Sheet(pyplot, wide * len(SENTENCE) + 2, 9.6)
    for n, (size, tokens) in enumerate(cuts(tok, SENTENCE, (FIRST_MERGE, 512, tok.vocab_size)).items()):
        x, y = 1.0, 3.2 * n + 0.9
        note = " (bytes only)" if size == FIRST_MERGE else ""
        sheet.head(x, y, f"{size:,} ids{note}: {len(tokens)} tokens")
        for i, token in enumerate(tokens):
            sheet.box(x, y + 1.4, wide * len(token), "", PALE[i % 4], height=1.3)
            for letter in visible(token):
                sheet.write(x + wide / 2, y + 1.4, letter, size=1.25, mono=True, ha="center")
                x += wide
    return sheet.figure


# ---------------------------------------------------------------------------------------------------------
# rows and targets; chats and targets


def rows_of(tok: Tokenizer, documents: tuple[str, ...], n_rows: int) -> tuple[list[int], list[Tensor]]:
    """(all ids, [ids, targets and doc (3, T) of each row]): documents one after another, cut into rows."""
    ids = [i for text in documents for i in [*tok.encode(text), tok.eos_id]]
    T = (len(ids) - 1) // n_rows
    cut = torch.tensor([ids[r * T:(r + 1) * T + 1] for r in range(n_rows)])
    return ids, list(torch.stack(inputs_and_targets(cut, tok.eos_id), dim=1))


def draw_rows(run: Path, pyplot: Any) -> Any:
    tok = Tokenizer.load(disk.find(run / "pretrain"))
    ids, rows = rows_of(tok, DOCUMENTS, 2)
    wide, wider = 6.3, 11.8
    sheet = Sheet(pyplot, wide * len(ids) + 2, 16.4)

    def token(x: float, y: float, width: float, i: int, doc: int) -> None:
        end = i == tok.eos_id
        sheet.box(x, y, width, "END" if end else visible(tok.decode([i])), PALE[doc], size=1.15,
                  fontweight="bold" if end else "normal")

    sheet.head(1, 1, "all documents, one after another")
    for place, i in enumerate(ids):
        token(1 + wide * place, 2.7, wide, i, ids[:place].count(tok.eos_id))
    for r, row in enumerate(rows):
        y, before = 5.6 + 5.8 * r, ids[:r * len(rows[0][0])].count(tok.eos_id)
        sheet.head(1, y, f"row {r + 1}")
        sheet.write(1, y + 1.6, "input", size=1.25)
        sheet.write(1, y + 4.0, "target", size=1.25)
        for t, (i, target, doc) in enumerate(row.T.tolist()):
            x = 13 + wider * t
            token(x, y + 1.6, wider, i, before + doc)
            token(x, y + 4.0, wider, target, before + doc + (i == tok.eos_id))
            sheet.arrow(x + wider / 2, y + 2.4, x + wider / 2, y + 3.2)
    return sheet.figure


def chat_columns(tok: Tokenizer, messages: list[dict]) -> list[tuple[str, str | None]]:
    """[(input, target)] of a chat as texts, as sft.py makes them; None where nothing is learned."""
    (ids, targets), = encode_chat(messages, tok, T=256)[0]
    return [(visible(tok.decode([i])), None if target == IGNORE else visible(tok.decode([target])))
            for i, target in zip(ids, targets)]


def draw_chat(run: Path, pyplot: Any) -> Any:
    sheet, x, y = Sheet(pyplot, 84, 11.4), 9.0, 1.4
    for name, target in chat_columns(Tokenizer.load(disk.find(run / "sft")), CHAT):
        width = max(len(name), len(target or "")) + 1.4
        if x + width > 84:
            x, y = 9.0, y + 6
        if x == 9:
            sheet.write(1, y, "input", size=1.2)
            sheet.write(1, y + 2.4, "target", size=1.2)
        sheet.box(x, y, width, name, PALE_BLUE)
        sheet.box(x, y + 2.4, width, target or "–", PALE_YELLOW if target else PALE_GRAY,
                  fontweight="bold" if target else "normal")
        x += width
    return sheet.figure


# ---------------------------------------------------------------------------------------------------------
# parameters, and the block


def parameters_of(cfg: Config) -> dict[str, int]:
    """{part: its parameters}; together they are cfg.n_params."""
    C, F, kv = cfg.d_model, cfg.d_ff, cfg.n_kv_head * cfg.head_dim
    block = {"q": C * C, "k": C * kv, "v": C * kv, "o": C * C, "feed-forward": 3 * C * F}
    return {"embedding": cfg.vocab_size * C * (1 if cfg.tie_embeddings else 2),
            **{part: cfg.n_layer * size for part, size in block.items()}, "norms": (2 * cfg.n_layer + 1) * C}


def draw_parameters(run: Path, pyplot: Any) -> Any:
    sheet = Sheet(pyplot, 84, 15)
    small = checkpoint.read_config(disk.find(run / "pretrain"))
    colors = {"embedding": SKY, "feed-forward": ORANGE, "norms": DARK}
    for n, (title, cfg) in enumerate({"SmolLM-135M": Config(), "the demo": small}.items()):
        x, y, edge = 1.0, 3.7 + 7.7 * n, {}
        share = {part: size / cfg.n_params for part, size in parameters_of(cfg).items()}
        sheet.head(x, y - 2.4, f"{title}: {cfg.n_params:,} parameters")
        for part, size in share.items():
            text = "" if part == "norms" else part if len(part) == 1 else f"{part} {size:.0%}"
            sheet.box(x, y, 82 * size, text, colors.get(part, GREEN), height=2.4, mono=False, size=1.2)
            edge[part] = x
            x += 82 * size
        left, right = edge["q"], edge["feed-forward"]
        sheet.box(left, y + 1.6, right - left, "", GREEN, height=0.25)
        sheet.write((left + right) / 2, y + 2.5, f"attention {sum(share[part] for part in 'qkvo'):.0%}",
                    size=1.2, ha="center")
        sheet.write(83, y + 2.5, f"norms {share['norms']:.2%}", size=1.2, ha="right")
    return sheet.figure


def draw_block(run: Path, pyplot: Any) -> Any:
    cfg = checkpoint.read_config(disk.find(run / "pretrain"))
    V, C, F, H, K, D = cfg.vocab_size, cfg.d_model, cfg.d_ff, cfg.n_head, cfg.n_kv_head, cfg.head_dim
    sheet, stream = Sheet(pyplot, 80, 31.5), 15
    sheet.ax.plot([stream] * 2, [2.9, 28.4], color=BLUE, linewidth=9, zorder=0)
    sheet.ax.plot([3, 79, 79, 3, 3], [6.6, 6.6, 26, 26, 6.6], color="#999999", linestyle="--", linewidth=1)
    sheet.head(64, 7.7, f"{cfg.n_layer} such blocks")
    sheet.write(stream, 0.8, "ids (B, T)", ha="center", size=1.15)
    sheet.write(17.5, 5.3, f"residual stream (B, T, {C})", size=1.15, color=BLUE, fontweight="bold")
    sheet.write(62, 12.3, "RoPE turns q and k", size=0.95, color=DARK)
    sheet.write(71, 28.4, f"logits\n(B, T, {V:,})", ha="center", size=1.15)
    same, wide = f"(B, T, {C})", f"(B, T, {F})"
    for x, y, width, text, color, shape in (  # x is the middle
            (stream, 2.9, 24, f"embedding {V:,} × {C}", PALE_RED, ""),
            (30, 9.6, 12, "norm", PALE_GRAY, same), (50, 9.6, 8, "q", PALE_GREEN, f"(B, {H}, T, {D})"),
            (60, 9.6, 8, "k", PALE_GREEN, f"(B, {K}, T, {D})"),
            (70, 9.6, 8, "v", PALE_GREEN, f"(B, {K}, T, {D})"),
            (60, 14, 28, "attention", PALE_GREEN, f"{H} query heads, {K} key/value heads"),
            (30, 14, 12, "o", PALE_GREEN, same), (30, 18.7, 12, "norm", PALE_GRAY, same),
            (53, 18.7, 14, "gate", PALE_YELLOW, wide), (67, 18.7, 14, "up", PALE_YELLOW, wide),
            (60, 23.1, 28, "silu(gate) × up", PALE_YELLOW, wide), (30, 23.1, 12, "down", PALE_YELLOW, same),
            (stream, 28.4, 12, "norm", PALE_GRAY, same),
            (46, 28.4, 24, f"head {C} × {V:,}", PALE_RED, "the embedding again")):
        sheet.box(x - width / 2, y, width, text, color, height=1.9, mono=False, size=1.15)
        sheet.write(x, y + 1.5, shape, ha="center", size=0.95, color=DARK)
    for line in ((stream, 1.2, stream, 1.9), (stream, 9.6, 24, 9.6), (36, 9.6, 46, 9.6), (60, 11.7, 60, 13),
                 (46, 14, 36, 14), (24, 14, 17, 14), (stream, 18.7, 24, 18.7), (36, 18.7, 46, 18.7),
                 (60, 20.8, 60, 22.1), (46, 23.1, 36, 23.1), (24, 23.1, 17, 23.1), (21, 28.4, 34, 28.4),
                 (58, 28.4, 64, 28.4)):
        sheet.arrow(*line)
    for y in (14, 23.1):
        sheet.ax.plot(stream, y, "o", color="white", markeredgecolor=BLUE, markersize=19, markeredgewidth=2)
        sheet.write(stream, y, "+", size=1.7, ha="center", fontweight="bold")
    return sheet.figure


# ---------------------------------------------------------------------------------------------------------
# one prompt, at several steps of pretraining


def log_of(stage: Path) -> list[dict]:
    if log := disk.read_lines(stage / "log.jsonl"):
        return log
    raise UserError(f"there is no log.jsonl in {stage}: train this run first")


def progress(run: Path, prompt: str, steps: tuple[int, ...]) -> Iterator[tuple[int, float, str]]:
    """(step, mean loss of the 50 steps before, continuation) at some steps, 0 being fresh weights, and at the
    last one."""
    folders = dict(disk.checkpoints(run / "pretrain"))
    last, tok = checkpoint.load(run / "pretrain")
    losses = [line["loss"] for line in log_of(run / "pretrain")]
    for step in (*steps, max(folders)):
        if step and step not in folders:
            raise UserError(f"{run / 'pretrain'} has no step {step}: train it again with --save_every=100 "
                            "--keep_checkpoints=0")
        torch.manual_seed(last.cfg.seed)
        model = checkpoint.load(folders[step])[0] if step else SmolLM(last.cfg)
        ids = generate(model, tok.encode(prompt), 40, 0.6, top_p=0.92, stop_ids=tok.stop_ids)
        yield step, mean(losses[max(0, step - 50):max(1, step)]), tok.decode(ids)


def draw_progress(run: Path, pyplot: Any) -> Any:
    sheet = Sheet(pyplot, 76, 17)
    for n, (step, loss, text) in enumerate(progress(run, START, STEPS)):
        y = 1.2 + 4.3 * n
        sheet.head(1, y, f"step {step}")
        sheet.write(1, y + 1.3, f"loss {loss:.1f}")
        for i, line in enumerate(textwrap.wrap(START + visible(text).replace("·", " "), 66)[:3]):
            sheet.write(14, y + 1.2 * i, line, mono=True)
        sheet.write(14, y, START, mono=True, color=BLUE)
    return sheet.figure

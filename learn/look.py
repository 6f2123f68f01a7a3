"""
look.py: what does the model see, and what does it make of it?

    tokens "text"                          the text cut into tokens, with their ids
    rows config/demo.py --step=100         the rows that this step of a run saw (needs the run's data)
    next CHECKPOINT "text"                 the likeliest next tokens: of the model, and after the sampling
                                           settings
    surprise CHECKPOINT "text"             each token by its surprise: -log2 p(token), in bits
    attention CHECKPOINT "text"            where each head looks; one head's map with --layer=2 --head=2
    layers CHECKPOINT "text"               the likeliest next token after each layer

    python -m learn.look attention pretrained/demo "What is the capital of France?" --chat \\
        --answer="You ask about"
    python -m learn.look surprise pretrained/demo "Once upon a time there was a dog." --html=look.html

The model's own code computes everything here. Hooks, functions that torch calls when a module runs, watch a
forward pass: they copy what the attention of each layer reads, and the residual stream after each layer.
--html writes a page to explore: all of it for one text, in a single file that works without a network.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor

import config
import sample
import sft
from config import UserError
from corpus.files import clean
from learn import page
from learn.rows import Document, rows_of_step
from model import Attention, SmolLM, attend_slowly, rotate
from plumbing import checkpoint, disk
from plumbing.processes import command, escape_controls
from tokenizer import Tokenizer

# T positions, L layers, H query heads, K key/value heads, D = C / H, C = d_model, V vocabulary

# ---------------------------------------------------------------------------------------------------------
# inside the model


@dataclass(frozen=True)
class Inside:
    """What one forward pass over ids computed."""

    ids: list[int]
    logits: Tensor                                       # (T, V)
    weights: Tensor                                      # (L, H, T, T)   each row adds up to 1
    streams: Tensor                                      # (L + 1, T, C)  the embedding, then after each layer


@torch.inference_mode()
def look_inside(model: SmolLM, ids: list[int]) -> Inside:
    """Run the model on one text, and keep what it computes on the way."""
    read, streams, layers = [], [], model.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda block, args: streams.append(args[0][0]))]
    for layer in layers:
        hooks += [layer.register_forward_hook(lambda block, args, x: streams.append(x[0])),
                  layer.get_submodule("self_attn").register_forward_pre_hook(
                      lambda module, args: read.append((module, *args[:2])))]
    logits = model(torch.tensor([ids]))[0]
    for hook in hooks:
        hook.remove()
    weights = torch.stack([attention_weights(*each) for each in read])
    return Inside(ids, logits, weights, torch.stack(streams))


def attention_weights(attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """softmax(q k^T / sqrt(D)) of what an attention reads, x (1, T, C) -> (H, T, T).

    attend_slowly returns weights @ values. With the rows of the identity matrix as values, that is the
    weights themselves.
    """
    T, H, K, D = x.shape[1], attention.cfg.n_head, attention.cfg.n_kv_head, attention.cfg.head_dim
    q = rotate(attention.q_proj(x).view(1, T, H, D).transpose(1, 2), rope)                # (1, H, T, D)
    k = rotate(attention.k_proj(x).view(1, T, K, D).transpose(1, 2), rope)                # (1, K, T, D)
    return attend_slowly(q, k, torch.eye(T).expand(1, K, T, T), torch.ones(T, T).tril().bool())[0]


@torch.inference_mode()
def lens(model: SmolLM, stream: Tensor) -> Tensor:
    """p(next token) if the layers after this one added nothing: stream (T, C) -> (T, V).

    The last norm and the head were trained for the last layer only. That they can often read earlier ones
    shows that all layers write into one stream, in one language (the "logit lens", nostalgebraist 2020).
    """
    return F.linear(model.model.norm(stream), model.head).softmax(dim=-1)


def surprises(inside: Inside) -> list[float]:
    """-log2 p(token) of every token but the first, in bits: 0 if it was certain, 1 for a coin flip."""
    log_p = inside.logits[:-1].log_softmax(dim=-1)
    return (-log_p.gather(1, torch.tensor(inside.ids[1:])[:, None])[:, 0] / math.log(2)).tolist()


# ---------------------------------------------------------------------------------------------------------
# in the terminal

EVEN, ODD, TARGET = 153, 223, 151  # backgrounds among a terminal's 256 colors: blue, orange, green
HEAT = (231, 230, 229, 222, 215, 209, 203)  # from white to red
SHADES = "·░▒▓█"


class Pen:
    """Text with a background color, if the terminal has colors."""

    def __init__(self, color: str) -> None:
        self.has_color = color == "always" or color == "auto" and sys.stdout.isatty()

    def paint(self, text: str, background: int) -> str:
        return f"\x1b[38;5;16;48;5;{background}m{text}\x1b[0m" if self.has_color else text

    def strip(self, pieces: list[str], backgrounds: list[int]) -> str:
        """Tokens side by side, each with its color. Lines end where those of the text do."""
        painted = (self.paint(piece, background) for piece, background in zip(pieces, backgrounds))
        return "".join(text + "\n" * piece.endswith("⏎") for text, piece in zip(painted, pieces))


def visible(tok: Tokenizer, i: int) -> str:
    """A token as characters that can be printed: "⏎" for a line break, "\\xe2" for a lone byte."""
    if not 0 <= i < tok.vocab_size:
        return f"[{i}]"
    text = tok.token_bytes[i].decode("utf-8", "backslashreplace")
    return escape_controls(text.replace("\n", "⏎").replace("\t", "⇥"))


def bar(share: float, width: int = 16) -> str:
    return ("█" * round(share * width)).ljust(width)


def print_tokens(tok: Tokenizer, ids: list[int], pen: Pen) -> None:
    pieces = [visible(tok, i) for i in ids]
    in_turn = [ODD if n % 2 else EVEN for n in range(len(ids))]
    print(pen.strip(pieces, in_turn) if pen.has_color else "|".join(pieces))
    # in tokenizer.json, each of the 256 bytes has a visible character: a space is written as Ġ
    print("\n   id  in tokenizer.json            bytes")
    for i in ids:
        print(f"{i:5}  {escape_controls(tok.tokens[i]):26}   {tok.token_bytes[i].hex(' ')}")
    n_bytes = sum(len(tok.token_bytes[i]) for i in ids)
    print(f"{len(ids)} tokens, {n_bytes} bytes: {n_bytes / len(ids):.2f} bytes per token")


def print_rows(tok: Tokenizer, rows: list[tuple[str, list[Document]]], full: bool, pen: Pen) -> None:
    """Each row with one line per document; where only a part is learned, the targets are marked."""
    all_learned = all(is_target for _, row in rows for document in row for _, is_target in document)
    for name, row in rows:
        print(name)
        for document in row:
            cut = len(document) > 40 and not full
            parts = [document[:28], document[-12:]] if cut else [document]
            print("    " + " ... ".join(marked(tok, part, pen, all_learned) for part in parts))
    if not all_learned:
        print("Targets are " + ("colored." if pen.has_color else "between « and »."))


def marked(tok: Tokenizer, part: Document, pen: Pen, all_learned: bool) -> str:
    """The text of a part of a document, with its targets in color or between « and »."""
    written = []
    for is_target, group in groupby(part, key=lambda pair: pair[1]):
        text = escape_controls(tok.decode([i for i, _ in group]).replace("\n", "⏎"))
        if is_target and not all_learned:
            text = pen.paint(text, TARGET) if pen.has_color else f"«{text}»"
        written.append(text)
    return "".join(written)


def print_next(tok: Tokenizer, logits: Tensor, settings: dict, n: int = 10) -> None:
    """The likeliest next tokens, and what sample.py would draw from: logits (V)."""
    print("{:25}  temperature={temperature:g} top_k={top_k} top_p={top_p:g}".format("the model", **settings))
    best = logits.topk(min(n, len(logits))).indices.tolist()
    before, after = logits.softmax(dim=0).tolist(), drawn_from(logits, settings).tolist()
    lines = [(before[i], after[i], visible(tok, i)) for i in best]
    others = [1 - sum(column[i] for i in best) for column in (before, after)]
    for p, drawn, name in [*lines, (*others, f"(the other {len(before) - len(best):,})")]:
        print(f"{p:6.1%} {bar(p)}    {drawn:6.1%} {bar(drawn)}   {name}")


def drawn_from(logits: Tensor, settings: dict) -> Tensor:
    """The probabilities from which sample.py draws: logits (V) -> (V)."""
    if settings["temperature"] == 0:
        return F.one_hot(logits.argmax(), len(logits)).float()
    names = ("temperature", "top_k", "top_p")
    return sample.probabilities(logits[None], *(settings[name] for name in names))[0]


def print_surprise(tok: Tokenizer, inside: Inside, is_chat: bool, pen: Pen) -> None:
    bits, pieces = surprises(inside), [visible(tok, i) for i in inside.ids]
    if not bits:
        return print(f"{pieces[0]} is the only token, and nothing predicts the first one")
    if pen.has_color:
        print(pen.strip(pieces, [HEAT[min(int(value / 2), len(HEAT) - 1)] for value in [0, *bits]]))
        steps = (pen.paint(f" {2 * n} ", color) for n, color in enumerate(HEAT))
        print(f"\nbits of surprise: {''.join(steps)} or more; nothing predicts the first token")
    else:
        print("   bits")
        for value, piece in zip(bits, pieces[1:]):
            print(f"{value:7.2f} {bar(min(1, value / 16))}  {piece}")
    mean, n_bytes = sum(bits) / len(bits), sum(len(tok.token_bytes[i]) for i in inside.ids[1:])
    per_byte = "" if is_chat else f"; {sum(bits) / n_bytes:.2f} bits per byte"
    print(f"mean of {len(bits)} tokens: {mean:.2f} bits = {mean * math.log(2):.2f} nats, perplexity "
          f"{2 ** mean:.1f}{per_byte}")


def print_heads(tok: Tokenizer, inside: Inside, layers: Iterable[int], position: int) -> None:
    """Where each head looks from one position, so that one can choose a head."""
    names = [visible(tok, i) for i in inside.ids]
    print(f"from position {position}, {names[position]!r}, each head looks at")
    for layer in layers:
        for head, weights in enumerate(inside.weights[layer, :, position]):
            best = weights.topk(min(3, position + 1))
            found = [f"{w:4.0%} {names[k]!r} ({k})" for w, k in zip(*map(Tensor.tolist, best))]
            print(f"layer {layer} head {head}   " + "   ".join(f"{text:24}" for text in found).rstrip())


def print_map(tok: Tokenizer, ids: list[int], weights: Tensor) -> None:
    """One head (T, T): a row for each position that looks, a column for each that it looks at."""
    width = 2 if len(ids) <= 45 else 1
    print(" " * 18 + "".join(f"{k % 10}".ljust(width) for k in range(len(ids))))
    for q, i in enumerate(ids):
        cells = (SHADES[min(int(w * 5), 4)] * width for w in weights[q, :q + 1].tolist())
        print(f"{q:3} {visible(tok, i)[:12]:13} {''.join(cells)}")
    print("weights   " + "   ".join(f"{shade} from {n / 5:.1f}" for n, shade in enumerate(SHADES)))


def print_layers(tok: Tokenizer, model: SmolLM, inside: Inside) -> None:
    """The likeliest next tokens after the last position, if the model ended after each layer."""
    for n, stream in enumerate(inside.streams):
        best = lens(model, stream[-1:])[0].topk(3)
        found = [f"{p:4.0%} {visible(tok, i)!r}" for p, i in zip(*map(Tensor.tolist, best))]
        name = f"layer {n - 1}" if n else "embedding"
        print(f"{name:10}   " + "   ".join(f"{text:18}" for text in found).rstrip())


# ---------------------------------------------------------------------------------------------------------
# the page


def numbers_of(model: SmolLM, tok: Tokenizer, inside: Inside, start: tuple[int, int]) -> dict:
    """All that the page shows. start: (layer, head) of the map that it opens with."""
    def likeliest(p: Tensor, n: int) -> list:
        best = p.topk(n)
        return [[[visible(tok, i), round(p, 4)] for i, p in zip(ids, ps)]
                for ids, ps in zip(best.indices.tolist(), best.values.tolist())]

    return {"ids": inside.ids, "tokens": [visible(tok, i) for i in inside.ids], "start": start,
            "bits": [None, *(round(bits, 3) for bits in surprises(inside))], "heads": inside.weights.shape[1],
            "next": likeliest(inside.logits.softmax(dim=-1), 8), "weights": page.packed(inside.weights),
            "layers": [[best for best, in likeliest(lens(model, stream), 1)] for stream in inside.streams]}


# ---------------------------------------------------------------------------------------------------------
# the command


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a value that is out of range."""
    parser = argparse.ArgumentParser(prog="python -m learn.look", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    whats = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for what in ("tokens", "rows", "next", "surprise", "attention", "layers"):
        sub = whats.add_parser(what, allow_abbrev=False)
        sub.add_argument("--color", default="auto", choices=("auto", "always", "never"))
        if what == "rows":
            sub.add_argument("--step", type=int, required=True, help="as in the log, from 1")
            sub.add_argument("--full", action="store_true", help="do not shorten the documents")
            continue
        if what == "tokens":
            sub.add_argument("--tokenizer", default="pretrained/demo", help="a folder, or a hub name")
        else:
            sub.add_argument("checkpoint", help="a step folder, a stage folder, or a hub name")
            sub.add_argument("--chat", action="store_true", help="the text is a question to a chat model")
            sub.add_argument("--answer", default="", help="the beginning of the answer, with --chat")
            sub.add_argument("--html", metavar="FILE", help="write a page to explore")
        sub.add_argument("prompt", nargs="?", metavar="TEXT", help="without it and --file, standard input")
        sub.add_argument("--file", help="read the text from this file")
        if what == "next":
            for name in ("temperature", "top_k", "top_p"):
                sub.add_argument(f"--{name}", type=type(sample.DEFAULTS[name]), help=sample.RANGES[name][1])
        if what == "attention":
            sub.add_argument("--layer", type=int, help="only this layer, from 0")
            sub.add_argument("--head", type=int, help="draw the map of this head of --layer, from 0")
            sub.add_argument("--position", type=int, help="which token looks, from 0 (default: the last)")
    args, rest = parser.parse_known_args(argv)
    if rest and args.what != "rows":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.config = rest
    for name in ("temperature", "top_k", "top_p"):
        value, (fits, wanted) = getattr(args, name, None), sample.RANGES[name]
        if value is not None and not fits(value):
            raise UserError(f"--{name}={value} must be {wanted}")
    if getattr(args, "answer", "") and not args.chat:
        raise UserError(f"--answer={args.answer!r} needs --chat")
    if getattr(args, "head", None) is not None and args.layer is None:
        raise UserError(f"--head={args.head} needs --layer: every layer has such a head")
    return args


def ids_of(args: argparse.Namespace, tok: Tokenizer, T: int) -> list[int]:
    """The ids of the text of a command line, in the chat template with --chat; at most the last T."""
    text = sample.read_prompt(args)
    if not text:
        raise UserError("the text is empty: there is nothing to look at")
    in_chat = args.what != "tokens" and args.chat
    ids = sft.ask(tok, text) + tok.encode(clean(args.answer)) if in_chat else tok.encode(text)
    sample.warn_of_marks(text)
    sample.warn_if_long(ids, T)
    return ids[-T:]


def check_range(name: str, value: int | None, n: int) -> None:
    if value is not None and not 0 <= value < n:
        raise UserError(f"--{name}={value} must be from 0 to {n - 1}")


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    pen = Pen(args.color)
    if args.what == "rows":
        return print_rows(*rows_of_step(config.load(args.config), args.step), args.full, pen)
    if args.what == "tokens":
        tok = Tokenizer.load(disk.find(args.tokenizer))
        return print_tokens(tok, ids_of(args, tok, 10**9), pen)
    folder = checkpoint.find(args.checkpoint)
    model, tok = checkpoint.load(folder)
    if args.chat and not tok.is_chat:
        raise UserError(f"{folder} is a base model, which only continues text: leave out --chat")
    ids = ids_of(args, tok, model.cfg.seq_len)
    if args.what == "attention":
        for name, n in (("layer", model.cfg.n_layer), ("head", model.cfg.n_head), ("position", len(ids))):
            check_range(name, getattr(args, name), n)
    inside = look_inside(model, ids)
    if args.html:
        start = getattr(args, "layer", None) or 0, getattr(args, "head", None) or 0
        page.write(args.html, args.checkpoint, numbers_of(model, tok, inside, start))
        print(f"{args.html}: open it in a browser")
    elif args.what == "next":
        args.seed = args.max_new_tokens = None
        print_next(tok, inside.logits[-1], sample.settings_of(args, folder))
    elif args.what == "surprise":
        print_surprise(tok, inside, args.chat, pen)
    elif args.what == "layers":
        print_layers(tok, model, inside)
    elif args.head is not None:
        print_map(tok, ids, inside.weights[args.layer, args.head])
    else:
        layers = range(model.cfg.n_layer) if args.layer is None else [args.layer]
        print_heads(tok, inside, layers, len(ids) - 1 if args.position is None else args.position)


if __name__ == "__main__":
    command(main, own_help=True)

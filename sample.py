"""
sample.py: let a model write.

The model gives every id of the vocabulary a score. Sampling turns the scores into one choice:

    divide by the temperature      below 1 the likely becomes likelier; 0 always takes the best (greedy)
    top_k                          only the k best may be chosen
    top_p                          only the best that together have probability p may be chosen

The chosen id is appended, and the model is asked again; a cache keeps the keys and values of what it has
read, so that each step reads one id. When the context of seq_len ids is full, its older half is forgotten and
the newer half is read again.

    python sample.py out/demo/pretrain --prompt "Once upon a time"                           next: train.py
"""

import argparse
import codecs
import itertools
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plumbing import checkpoint
import config
from config import UserError
from fast import DTYPES, FastLM
from model import KVCache, SmolLM
from plumbing.processes import pick_device
from tokenizer import Tokenizer

# B samples, T positions, V vocabulary

DEFAULTS = {"max_new_tokens": 100, "temperature": 0.6, "top_k": 0, "top_p": 0.92}  # SmolLM-Instruct's card's


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """One id for each row of logits (B, V) -> (B,). top_k=0 and top_p=1 leave everything in."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        worst = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # the first id that reaches top_p stays in
        logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -torch.inf)
    probabilities = logits.softmax(dim=-1).cpu()  # drawn on the CPU: one seed, one text on every device
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)


@torch.inference_mode()
def generate_many(model: SmolLM | FastLM, prompts: list[list[int]], max_new_tokens: int,
                  temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                  seed: int = 0) -> Iterator[list[int]]:
    """Continue prompts of equal length (lists of int) at once; yields their next ids max_new_tokens times."""
    T, device = model.cfg.seq_len, model.device
    generator = torch.Generator().manual_seed(seed)
    read = torch.tensor(prompts, device=device)                                  # (B, T)
    unread = cache = None
    for _ in range(max_new_tokens):
        if cache is None or cache.length + unread.shape[1] > T:
            unread = read[:, -T:] if cache is None else read[:, -(T // 2):]
            cache = KVCache(model.cfg, len(prompts), T, device, model.cache_dtype)
        logits = model.next_logits(unread, cache)                                # (B, V)
        unread = pick(logits, temperature, top_k, top_p, generator)[:, None]     # (B, 1)
        read = torch.cat((read, unread), dim=1)
        yield unread[:, 0].tolist()


def generate(model: SmolLM | FastLM, ids: list[int], max_new_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             stop_ids: Collection[int] = ()) -> Iterator[int]:
    """Continue a prompt (list of int); yields ids one by one, and ends before one of stop_ids."""
    for (new,) in generate_many(model, [ids], max_new_tokens, temperature, top_k, top_p, seed):
        if new in stop_ids:
            return
        yield new


def stops(model: SmolLM | FastLM, tok: Tokenizer) -> set[int]:
    """The ids that end a text, whichever comes first."""
    return {tok.eos_id, model.stop_id, *model.other_stop_ids}


def pieces(tok: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """ids as they come -> text as it is whole: bytes of a character wait until its last byte is there."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        if 0 <= i < tok.vocab_size and (piece := decoder.decode(tok.token_bytes[i])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


# what a model writes may steer a terminal: escape sequences, a bell, text that runs backwards
HARMLESS: dict[int, str | int] = {code: "\N{REPLACEMENT CHARACTER}" for code in (
    *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
HARMLESS |= {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}  # their pictures


def shown(text: str) -> str:
    """Text as it may go to a terminal, control characters as pictures: "\\x1b[2J" -> "␛[2J"."""
    return text.translate(HARMLESS)


def samples(model: SmolLM | FastLM, tok: Tokenizer, ids: list[int], n: int, settings: dict) -> list[str]:
    """n continuations of one prompt as texts, generated together, each up to where it ends itself."""
    ends = stops(model, tok)
    columns = zip(*generate_many(model, [ids] * n, **settings), strict=True)
    return [tok.decode(itertools.takewhile(lambda i: i not in ends, column)) for column in columns]


# ---------------------------------------------------------------------------------------------------------
# chat


def fitted(tok: Tokenizer, messages: list[dict], room: int) -> tuple[list[int], int]:
    """(ids of the conversation up to the assistant's turn, messages dropped): the oldest turns go first."""
    system, dropped = messages[:messages[0]["role"] == "system"], 0
    turns = messages[len(system):]
    while len(ids := tok.chat(system + turns, add_generation_prompt=True)[0]) > room and len(turns) > 2:
        turns, dropped = turns[2:], dropped + 2
    return ids, dropped


def tell_cut(ids: list[int], model: SmolLM | FastLM) -> None:
    if len(ids) > model.cfg.seq_len:
        print(f"(of {len(ids)} ids the model reads the last {model.cfg.seq_len})", file=sys.stderr)


def reply(model: SmolLM | FastLM, tok: Tokenizer, messages: list[dict], settings: dict) -> str:
    """Print the answer to a conversation as it is generated, and return it. Ctrl-C ends it early."""
    T = model.cfg.seq_len
    ids, dropped = fitted(tok, messages, max(T - settings["max_new_tokens"], T // 2))
    tell_cut(ids, model)
    if dropped:
        print(f"(the conversation is too long for the model: its first {dropped} messages were left out)",
              file=sys.stderr)
    said = []
    try:
        for piece in pieces(tok, generate(model, ids, **settings, stop_ids=stops(model, tok))):
            said.append(piece)
            print(shown(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print()
    return "".join(said).strip()


def converse(model: SmolLM | FastLM, tok: Tokenizer, settings: dict) -> None:
    """A conversation in the terminal, until /quit or Ctrl-D."""
    try:
        import readline  # noqa: F401  arrow keys in input(), where the system has it
    except ImportError:
        pass
    print("/reset begins anew, /system TEXT sets a system message, /quit ends; Ctrl-C stops an answer")
    messages = []
    while True:
        try:
            text = input("> ").strip()
        except KeyboardInterrupt:
            print("\n(/quit ends)")
            continue
        except EOFError:
            return print()
        command, _, rest = text.partition(" ")
        if command == "/quit":
            return None
        elif command in ("/reset", "/system"):
            messages = [{"role": "system", "content": rest.strip()}] if command == "/system" else []
            print("(a new conversation)")
        elif command.startswith("/"):
            print(f"there is no command {command}: there are /reset, /system TEXT and /quit")
        elif text:
            messages.append({"role": "user", "content": text})
            said = reply(model, tok, messages, settings)
            messages = [*messages, {"role": "assistant", "content": said}] if said else messages[:-1]


# ---------------------------------------------------------------------------------------------------------
# the command line


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    try:
        if args.file:
            with open(args.file, encoding="utf-8") as file:
                return file.read()
        if sys.stdin.isatty():
            print("type a prompt, and end it with Ctrl-D (Windows: Ctrl-Z, Enter)", file=sys.stderr)
        return sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompt cannot be read: {error}") from None


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for values that make no sense."""
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a step folder, a stage folder (its newest step), or a hub name")
    parser.add_argument("--prompt", help="text to continue; without it and --file, standard input is read")
    parser.add_argument("--chat", nargs="?", const="", metavar="TEXT",
                        help="talk with a chat model; with a text, print the answer to it and end")
    parser.add_argument("--file", help="read the prompt from this file")
    for name, hint in (("max_new_tokens", ""), ("temperature", "0 is greedy; "), ("top_k", "0: off; "),
                       ("top_p", "1: off; ")):
        parser.add_argument(f"--{name}", type=type(DEFAULTS[name]), help=hint + "default: what "
                            f"generation_config.json of the checkpoint says, or {DEFAULTS[name]}")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    parser.add_argument("--num_samples", type=int, default=1, help="several continuations, made together")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES,
                        help="of weights and products; int8 is for processors, the fastest there, and "
                             "changes the text a little (default float32)")
    parser.add_argument("--speed", action="store_true", help="print tokens per second at the end")
    args = parser.parse_args(argv)
    fits = {"num_samples": args.num_samples > 0, "seed": 0 <= args.seed < 2**63,
            "device": args.device in ("auto", "cpu", "cuda", "mps"),
            **{name: getattr(args, name) is None or sensible(name, getattr(args, name)) for name in DEFAULTS}}
    for name in fits:
        if not fits[name]:
            raise UserError(f"--{name}={getattr(args, name)} makes no sense: see python sample.py --help")
    return args


def sensible(name: str, value: Any) -> bool:
    """Whether a setting can be: ("top_p", 0.92) -> True."""
    return type(value) in (int, type(DEFAULTS[name])) and {
        "max_new_tokens": value > 0, "temperature": value >= 0, "top_k": value >= 0,
        "top_p": 0 < value <= 1}[name]


def settings_of(args: argparse.Namespace, folder: Path) -> dict:
    """{name: value} of DEFAULTS and the seed: flags have the first word, then generation_config.json."""
    path = folder / "generation_config.json"
    theirs = checkpoint.read_json(path) if path.exists() else {}
    if theirs.get("do_sample") is False:
        theirs["temperature"] = 0
    settings = {"seed": args.seed}
    for name, default in DEFAULTS.items():
        value = theirs.get(name)
        if value is not None and not sensible(name, value):
            raise UserError(f"{path}: {name}={value!r} makes no sense")
        flag = getattr(args, name)
        settings[name] = flag if flag is not None else default if value is None else value
    for name in ("repetition_penalty", "no_repeat_ngram_size", "min_p", "num_beams"):
        if theirs.get(name) not in (None, 0, 1):
            print(f"({path.name} asks for {name}={theirs[name]}, which is not implemented here)",
                  file=sys.stderr)
    return settings


def main(argv: list[str]) -> Any:
    args = parse(argv)
    device, folder = pick_device(args.device), checkpoint.find(args.checkpoint)
    settings = settings_of(args, folder)
    if device.type == "cpu":
        model: SmolLM | FastLM = FastLM(SmolLM.load(folder), args.dtype)
    elif args.dtype == "int8":
        raise UserError(f"--dtype=int8 is for processors: use bfloat16 on {device.type}, or --device=cpu")
    else:
        model = SmolLM.load(folder).to(device, getattr(torch, args.dtype))
    tok = Tokenizer.load(folder)
    if args.chat is not None:
        if not model.stop_id:
            raise UserError(f"{folder} is a base model, which only continues text: use --prompt, or make a "
                            "chat model of it with sft.py")
        if args.chat:
            return reply(model, tok, [{"role": "user", "content": args.chat}], settings)
        return converse(model, tok, settings)
    prompt = read_prompt(args)
    ids = tok.encode(prompt) or [tok.eos_id]  # without a prompt: what may follow the end of a document
    tell_cut(ids, model)
    began = time.perf_counter()
    made: Any = []  # its length is asked for
    if args.num_samples == 1:
        new = generate(model, ids, **settings, stop_ids=stops(model, tok))
        print(shown(prompt), end="", flush=True)
        for piece in pieces(tok, (made.append(i) or i for i in new)):
            print(shown(piece), end="", flush=True)
        print()
    else:
        for number, text in enumerate(samples(model, tok, ids, args.num_samples, settings), 1):
            print(f"--- {number}\n{shown(prompt + text)}")
        made = range(args.num_samples * settings["max_new_tokens"])
    if args.speed:
        print(f"{len(made) / (time.perf_counter() - began):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    config.command(main, own_help=True)

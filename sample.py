"""
sample.py: generate text.

The model gives every token of the vocabulary a score. Sampling turns the scores into one choice:

    divide by the temperature      below 1 likely tokens become likelier; 0 always takes the best (greedy)
    top_k                          only the k most likely tokens stay (and ties with the k-th)
    top_p                          only the fewest most likely tokens that add up to probability p stay

The chosen id is appended, and the model is asked again. A cache keeps the keys and values of what it has
read, so that each step reads one id. When the context of seq_len ids is full, its older half is dropped. The
newer half is read again, since its keys and values were computed with a look at what is gone.

    python sample.py out/demo/pretrain --prompt "Once upon a time"
    python sample.py out/demo/dpo --chat                                             next: corpus/documents.py
"""

import argparse
import codecs
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import torch
from torch import Tensor

from config import UserError
from corpus.files import clean, encoding_of, has_nul
from model import KVCache, SmolLM
from plumbing import checkpoint, disk
from plumbing.processes import command, escape_controls, pick_device
from tokenizer import SPECIAL, Tokenizer

# B samples, T positions, V vocabulary

DEFAULTS = {"max_new_tokens": 100, "temperature": 0.6, "top_k": 0, "top_p": 0.92}  # SmolLM-Instruct's


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What an id is drawn from: logits (B, V) -> (B, V), 0 for an id that is cut; temperature above 0.

    top_k=0 and top_p=1 cut nothing.
    """
    logits = logits.float() / temperature
    if top_k:
        worst = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    if top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # of all better ids; 0 for the best one
        dropped = (before >= top_p).scatter(1, order, before >= top_p)  # from sorted order back to id order
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits.softmax(dim=-1)


def sample_token(logits: Tensor, temperature: float, top_k: int, top_p: float,
                 generator: torch.Generator) -> Tensor:
    """One id for each row of logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = probabilities(logits, temperature, top_k, top_p).cpu()  # one seed, the same random numbers anywhere
    return torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)


@torch.inference_mode()
def generate_batch(model: SmolLM, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
                   top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> Iterator[list[int]]:
    """Continue prompts of equal length (lists of ids) together; each step yields the next id of each."""
    T, device, generator = model.cfg.seq_len, model.head.device, torch.Generator().manual_seed(seed)
    text = torch.tensor(prompts, device=device)                                  # (B, all positions so far)
    unread = text[:, -T:]
    cache = KVCache(model.cfg, len(text), min(T, text.shape[1] + max_new_tokens), device, model.head.dtype)
    for _ in range(max_new_tokens):
        if cache.length + unread.shape[1] > T:  # the context is full: read its newer half again
            unread, cache.length = text[:, -max(1, T // 2):], 0
        # oneDNN multiplies a single bfloat16 row at half the speed of PyTorch's own kernel
        # (docs/performance.md)
        with torch.backends.mkldnn.flags(enabled=unread.numel() > 1, allow_tf32=None):
            logits = model.next_logits(unread, cache)                            # (B, V)
        unread = sample_token(logits, temperature, top_k, top_p, generator)[:, None]
        text = torch.cat((text, unread), dim=1)
        yield unread[:, 0].tolist()


def generate(model: SmolLM, ids: list[int], max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, stop_ids: Collection[int] = ()) -> Iterator[int]:
    """Continue a prompt (list of ids); yields ids one by one, and stops before the first of stop_ids."""
    for (new,) in generate_batch(model, [ids], max_new_tokens, temperature, top_k, top_p, seed):
        if new in stop_ids:
            return
        yield new


def continuations(model: SmolLM, tok: Tokenizer, ids: list[int], n: int, settings: dict) -> list[str]:
    """n continuations of one prompt as texts, generated together, each cut at its first stop id."""
    columns = zip(*generate_batch(model, [ids] * n, **settings), strict=True)
    return [tok.decode(takewhile(lambda i: i not in tok.stop_ids, column)) for column in columns]


def fit_context(tok: Tokenizer, messages: list[dict], limit: int) -> tuple[list[int], int]:
    """(ids up to the assistant's turn, messages dropped): when a conversation is longer than the context, its
    oldest turns are left out first. The system message stays."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns, dropped = messages[len(system):], 0
    while True:
        ids, _ = tok.chat(system + turns, add_generation_prompt=True)
        if len(ids) <= limit or len(turns) <= 2:
            return ids, dropped
        turns, dropped = turns[2:], dropped + 2


# ---------------------------------------------------------------------------------------------------------
# text in the terminal; skip the rest at a first reading


def pieces(tok: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """ids as they come -> text as soon as it is complete: the bytes of a character wait for its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        if 0 <= i < tok.vocab_size and (piece := decoder.decode(tok.token_bytes[i])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def note(text: str) -> None:
    """Tell the user something that is not part of the text."""
    print(f"({text})", file=sys.stderr, flush=True)


def warn_if_long(ids: list[int], T: int) -> None:
    if len(ids) > T:
        note(f"the model reads only the last {T} of {len(ids)} ids")


def warn_of_marks(text: str) -> None:
    if any(mark in text for mark in SPECIAL[:3]):
        note("special tokens that are typed are letters like any others; --chat places the real ones")


def stream(model: SmolLM, tok: Tokenizer, ids: list[int], settings: dict) -> tuple[str, int]:
    """Print a continuation as it is generated: (the text, how many ids it has). Ctrl-C ends it early."""
    T, written, new = model.cfg.seq_len, [], []
    warn_if_long(ids, T)

    def generated() -> Iterator[int]:
        for i in generate(model, ids, **settings, stop_ids=tok.stop_ids):
            new.append(i)
            yield i

    try:
        for piece in pieces(tok, generated()):
            written.append(piece)
            print(escape_controls(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print(flush=True)
    if len(ids) <= T < len(ids) + len(new):
        note(f"the context of {T} ids was full: the model no longer saw the beginning")
    return "".join(written), len(new)


# ---------------------------------------------------------------------------------------------------------
# chat


def reply(model: SmolLM, tok: Tokenizer, messages: list[dict], settings: dict) -> str:
    """Print the answer to a conversation as it is generated, and return it."""
    T = model.cfg.seq_len
    ids, dropped = fit_context(tok, messages, max(T - settings["max_new_tokens"], T // 2))
    if dropped:
        note(f"the conversation is too long for the model: its oldest {dropped} messages were left out")
    answer, n = stream(model, tok, ids, settings)
    if n == settings["max_new_tokens"]:
        note(f"the answer is cut: it reached --max_new_tokens={n}")
    return answer


def answer_each(model: SmolLM, tok: Tokenizer, texts: list[str], settings: dict) -> None:
    """Print the answer to each text, none of which sees the others."""
    for text in texts:
        warn_of_marks(text)
        if len(texts) > 1:
            print(f"> {escape_controls(text)}")
        reply(model, tok, [{"role": "user", "content": clean(text)}], settings)


def converse(model: SmolLM, tok: Tokenizer, settings: dict) -> None:
    """A conversation in the terminal, until /quit or Ctrl-D."""
    try:
        import readline  # noqa: F401  arrow keys in input(), where the system has it
    except ImportError:
        pass
    print("/reset starts over, /system TEXT sets a system message, /quit ends; Ctrl-C stops an answer")
    messages: list[dict] = []
    while True:
        try:
            text = clean(input("> ")).strip()
        except KeyboardInterrupt:
            print("\n(/quit ends)")
            continue
        except EOFError:
            return print()
        name, _, rest = text.partition(" ")
        if name == "/quit":
            return None
        elif name in ("/reset", "/system"):
            messages = [{"role": "system", "content": rest.strip()}] if name == "/system" else []
            print("(a new conversation)")
        elif name.startswith("/"):
            print(f"there is no command {name}: there are /reset, /system TEXT and /quit")
        elif text:
            messages.append({"role": "user", "content": text})
            answer = reply(model, tok, messages, settings)
            said = [{"role": "assistant", "content": answer}]  # as it was said, white space included
            messages = [*messages, *said] if answer.strip() else messages[:-1]


# ---------------------------------------------------------------------------------------------------------
# the command line

RANGES = {"max_new_tokens": (lambda n: n > 0, "1 or more"),
          "temperature": (lambda x: x >= 0, "0 (greedy) or more"),
          "top_k": (lambda n: n >= 0, "0 (off) or more"),
          "top_p": (lambda p: 0 < p <= 1, "above 0, up to 1 (off)"),
          "seed": (lambda n: 0 <= n < 2**63, "from 0 to 2^63 - 1"),
          "num_samples": (lambda n: n > 0, "1 or more")}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UserError for a value that is out of range."""
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a step folder, a stage folder (its newest step), or a hub name")
    parser.add_argument("--prompt", help="text to continue; without it and --file, standard input is read")
    parser.add_argument("--file", help="read the prompt from this file")
    parser.add_argument("--chat", nargs="*", metavar="TEXT", help="talk with a chat model; given a text, "
                        "print its answer and exit; given several, answer each of them separately")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), help=f"{RANGES[name][1]}; default: what the "
                            f"checkpoint's generation_config.json says, or {default}")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    parser.add_argument("--num_samples", type=int, default=1, help="several continuations at a time")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
                        help="of weights and products (default float32). For 8 bits on a CPU use llama.cpp: "
                             "python -m export CHECKPOINT --format=gguf --quant=q8_0")
    parser.add_argument("--speed", action="store_true", help="print tokens per second (not with --chat)")
    args = parser.parse_args(argv)
    for name, (fits, wanted) in RANGES.items():
        if getattr(args, name) is not None and not fits(getattr(args, name)):
            raise UserError(f"--{name}={getattr(args, name)} must be {wanted}")
    for text in args.chat or []:
        if not text.strip():
            raise UserError(f"--chat={text!r} asks nothing: give it a question, or no value to converse")
    if args.temperature == 0 and args.num_samples > 1:
        raise UserError(f"--num_samples={args.num_samples} with --temperature=0 would repeat one text: leave "
                        "out one of them")
    given = [name for name in ("prompt", "file") if getattr(args, name) is not None]
    unused = {"chat": [*given, *(["num_samples"] if args.num_samples > 1 else []), *(["speed"] * args.speed)],
              "prompt": given[1:]}
    for name, others in unused.items():
        if getattr(args, name) is not None and others:
            raise UserError(f"--{others[0]} has no meaning together with --{name}: leave one of them out")
    return args


def settings_of(args: argparse.Namespace, folder: Path) -> dict:
    """{name: value} of DEFAULTS and the seed: flags take precedence over generation_config.json."""
    path = folder / "generation_config.json"
    theirs = disk.read_json(path) if path.exists() else {}
    if theirs.get("do_sample") is False:
        theirs["temperature"] = 0
    settings = {"seed": args.seed}
    for name, default in DEFAULTS.items():
        value = theirs.get(name)
        if value is not None and not (type(value) in (int, type(default)) and RANGES[name][0](value)):
            raise UserError(f"{path}: {name}={value!r} must be {RANGES[name][1]}")
        flag = getattr(args, name)
        settings[name] = flag if flag is not None else default if value is None else value
    for name in ("repetition_penalty", "no_repeat_ngram_size", "min_p", "num_beams"):
        if theirs.get(name) not in (None, 0, 1):
            note(f"{path.name} asks for {name}={theirs[name]}, which is not implemented here")
    return settings


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return clean(args.prompt)
    if not args.file and sys.stdin.isatty():
        note("type a prompt, and end it with Ctrl-D (Windows: Ctrl-Z, Enter)")
    where = args.file or "standard input"
    try:
        data = Path(args.file).read_bytes() if args.file else sys.stdin.buffer.read()
        text = clean(data.decode(encoding_of(data)))
    except (OSError, UnicodeError) as error:
        raise UserError(f"the prompt in {where} cannot be read: {error}") from None
    if has_nul(text):
        raise UserError(f"the prompt in {where} contains NUL characters: is it a binary file, or UTF-16?")
    return text


def complete(model: SmolLM, tok: Tokenizer, prompt: str, n: int, settings: dict) -> list[str]:
    """Print a prompt with n continuations, and return the continuations."""
    ids = tok.encode(prompt) or [tok.eos_id]  # without a prompt: what may follow the end of a document
    warn_of_marks(prompt)
    if prompt.endswith(" "):
        note("the prompt ends with a space, which belongs to the token of the next word: leave it out")
    if n == 1:
        print(escape_controls(prompt), end="", flush=True)
        return [stream(model, tok, ids, settings)[0]]
    warn_if_long(ids, model.cfg.seq_len)
    texts = continuations(model, tok, ids, n, settings)
    for number, text in enumerate(texts, 1):
        print(f"--- {number}\n{escape_controls(prompt + text)}")
    return texts


def main(argv: list[str]) -> Any:
    args = parse_args(argv)
    device, folder = pick_device(args.device), checkpoint.find(args.checkpoint)
    settings = settings_of(args, folder)
    model, tok = checkpoint.load(folder)
    model = model.to(device, getattr(torch, args.dtype)).for_decoding()
    if args.chat is not None and not tok.is_chat:
        raise UserError(f"{folder} is a base model, which only continues text: use --prompt, or make a chat "
                        "model of it with sft.py")
    if args.chat is not None:
        return answer_each(model, tok, args.chat, settings) if args.chat else converse(model, tok, settings)
    began = time.perf_counter()
    texts = complete(model, tok, read_prompt(args), args.num_samples, settings)
    if args.speed:
        n_tokens = sum(len(tok.encode(text)) for text in texts)
        print(f"{n_tokens / (time.perf_counter() - began):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    command(main)

"""
bench/shakespeare.py: what do two minutes on one CPU core teach about one small text?

Both sides learn the first nine tenths of a text. The last tenth says how well:

    bits per byte = sum of -log2 p(token) over the last tenth / its bytes

A token is some two bytes here and one character in nanoGPT. Per byte, the two are comparable.

    ours       python train.py config/demo.py --data=TEXT with the flags of OURS
    nanoGPT    the run on a CPU that its README documents, in a copy of its checkout; it keeps the checkpoint
               that does best on the last tenth, and ours the last one

Each reads the last tenth in windows as long as its context. They advance by half a context and only their new
half counts, so every token has at least half a context before it; before the first is the end of the training
text. CPU seconds are those of whole commands: imports, tokenizer, training, validation, checkpoints.

    python -m bench shakespeare --text=input.txt --nanogpt=../nanoGPT
"""

import argparse
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import config
from config import UserError
from corpus.files import clean
from corpus.sources import Documents
from model import SmolLM
from plumbing import checkpoint, disk
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
# A megabyte is few tokens: many small steps of a small model. One document needs no mask.
OURS = ("config/demo.py --val_fraction=0.1 --vocab_size=1024 --d_model=128 --d_ff=352 --seq_len=128 "
        "--doc_mask=False --batch=8 --micro_batch=8 --max_steps=700 --lr=1e-2 --decay_steps=400 "
        "--eval_every=0 --save_every=0 --sample_every=0").split()
NANOGPT = ("config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
           "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
           "--lr_decay_iters=2000 --dropout=0.0").split()

# ---------------------------------------------------------------------------------------------------------
# bits


@torch.inference_mode()
def bits(log_p: Callable[[Tensor, Tensor], Tensor], ids: list[int], first: int, T: int) -> float:
    """What ids[first:] cost, in bits, with a context of T. log_p(inputs, targets): (1, t) each -> (1, t)."""
    nats = 0.0
    for start in range(first, len(ids), T // 2):
        end = min(start + T // 2, len(ids))
        row = torch.tensor(ids[max(0, end - 1 - T):end])[None]
        nats -= log_p(row[:, :-1], row[:, 1:])[0, start - end:].sum().item()
    return nats / math.log(2)


def bits_ours(model: SmolLM, tok: Tokenizer, before: str, text: str) -> float:
    """The text is encoded apart from what precedes it: all of its bytes are paid for, and no others."""
    context = tok.encode(before)
    return bits(model, context + tok.encode(text), len(context), model.cfg.seq_len)


def bits_nanogpt(model: Any, characters: list[str], before: str, text: str) -> float:
    ids = [characters.index(character) for character in before + text]
    return bits(lambda x, y: model(x, y)[0].log_softmax(-1).gather(-1, y[..., None])[..., 0], ids,
                len(before), model.config.block_size)


# ---------------------------------------------------------------------------------------------------------
# the two runs


def cpu_seconds(words: list[str], folder: Path, o: Namespace) -> float:
    """Run python WORDS in a folder; the CPU time of all its threads. Raises UserError if it fails."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(o.threads))
    before = os.times()
    done = subprocess.run([sys.executable, *words], cwd=folder, env=os.environ | threads)
    after = os.times()
    if done.returncode:
        raise UserError(f"python {' '.join(words)} in {folder} ended with code {done.returncode}: see above")
    return after.children_user + after.children_system - before.children_user - before.children_system


def train_ours(o: Namespace, text: str, cut: int) -> tuple[float, SmolLM, Tokenizer]:
    """(CPU seconds, model, tok). A finished run in out_dir is not repeated: its seconds are 0."""
    words = [*OURS, f"--data={o.text.resolve()}", f"--out_dir={o.out_dir.resolve()}", *o.flags]
    cfg = config.load([str(ROOT / words[0]), *words[1:]])
    learned = "".join(part for split, part in Documents(str(o.text), cfg).split(text) if split == "train")
    assert len(learned) <= cut, "some of what is held out would be learned"
    stage, seconds = o.out_dir / "pretrain", 0.0
    if done := checkpoint.checkpoints(stage):
        if done[-1][0] < cfg.max_steps:  # resumed, it would seem faster than it is
            raise UserError(f"{stage} ends with step {done[-1][0]} of {cfg.max_steps}: choose another "
                            "--out_dir")
    else:
        seconds = cpu_seconds(["train.py", *words], ROOT, o)
    return seconds, *checkpoint.load(stage)


def train_nanogpt(o: Namespace, text: str) -> tuple[float, nn.Module]:
    """(CPU seconds, model): its own code trains and computes. A finished run is not repeated."""
    folder, seconds = o.out_dir / "nanogpt", 0.0
    path = folder / "out-shakespeare-char" / "ckpt.pt"
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(o.nanogpt, folder, ignore=shutil.ignore_patterns(".git", "out*"))
        disk.write_text(folder / "data" / "shakespeare_char" / "input.txt", text)
        seconds = cpu_seconds(["data/shakespeare_char/prepare.py"], folder, o)
        seconds += cpu_seconds(["train.py", *NANOGPT], folder, o)
    spec = importlib.util.spec_from_file_location("nanogpt", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    saved = torch.load(path, weights_only=True)  # tensors and plain values: no code in the file runs
    model = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    return seconds, model


# ---------------------------------------------------------------------------------------------------------
# the command


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench shakespeare", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="tiny Shakespeare, or another text file")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT; without it, only ours")
    parser.add_argument("--out_dir", type=Path, default=Path("out/shakespeare"), help="what is finished here "
                        "is only evaluated (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    o, flags = parser.parse_known_args(argv)  # the others are train.py's: --lr=1e-2
    o.flags = flags
    torch.set_num_threads(o.threads)
    if not o.text.is_file():
        raise UserError(f"there is no file --text={o.text}: tiny Shakespeare is "
                        "data/tinyshakespeare/input.txt of karpathy/char-rnn")
    if o.nanogpt and not (o.nanogpt / "model.py").is_file():
        raise UserError(f"--nanogpt={o.nanogpt} has no model.py: name a checkout of karpathy/nanoGPT")
    text = clean(o.text.read_text(encoding="utf-8"))
    cut = int(0.9 * len(text))  # where nanoGPT's data/shakespeare_char/prepare.py cuts
    before, held_out = text[max(0, cut - 4000):cut], text[cut:]
    seconds, model, tok = train_ours(o, text, cut)
    rows: dict[str, tuple[float, nn.Module, float]] = {
        "ours": (seconds, model, bits_ours(model, tok, before, held_out))}
    if o.nanogpt:
        seconds, theirs = train_nanogpt(o, text)
        rows["nanoGPT"] = (seconds, theirs, bits_nanogpt(theirs, sorted(set(text)), before, held_out))
    n_bytes = len(held_out.encode())
    print(f"\nthe last {n_bytes:,} bytes of {o.text}, {o.threads} threads; torch {torch.__version__}")
    print("           CPU seconds   parameters   bits per byte")
    for name, (seconds, side, n_bits) in rows.items():
        n_params = sum(weight.numel() for weight in side.parameters())
        spent = f"{seconds:.0f}" if seconds else "(before)"
        print(f"{name:8}   {spent:>11}   {n_params:>10,}   {n_bits / n_bytes:>13.3f}")

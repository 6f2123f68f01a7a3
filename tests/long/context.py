"""
context.py: how well does a model predict beyond the length of the rows that it was trained on?

    python tests/long/context.py [--out=out/context]

trains a model of half a million parameters on the built-in corpus in rows of 128 ids. Then the model reads
validation rows of 512: the table shows the loss at the first 128 positions, which it knows, and after them.
Then, like config/smol_135m_8k.py in miniature, training continues in rows of 512 with a larger rope_theta,
for an eighth of the tokens, and the model reads the same rows again. Loss in nats per token.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import config  # noqa: E402  the project is two folders up
import data  # noqa: E402
import train  # noqa: E402
from plumbing import checkpoint  # noqa: E402
from plumbing.processes import command  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

OLD, NEW = 128, 512  # ids in a row
STRETCHES = [(0, OLD), (OLD, 192), (192, 256), (256, NEW)]  # of positions: known ones, then new ones
ROWS = 128  # of validation
DEMO = ["config/demo.py", "--n_layer=3", "--n_head=4", "--n_kv_head=2", "--d_model=128", "--d_ff=256",
        "--vocab_size=1024", "--tokenizer_bytes=2000000", "--data=builtin-world", "--doc_mask=False",
        "--eval_every=0", "--save_every=200", "--sample_every=0"]
SHORT = [*DEMO, f"--seq_len={OLD}", "--rope_theta=10000", "--batch=16", "--micro_batch=16",
         "--max_steps=1000"]
LONG = [*DEMO, f"--seq_len={NEW}", "--rope_theta=100000", "--batch=4", "--micro_batch=4", "--max_steps=125",
        "--lr=2e-3", "--warmup_ratio=0.1", "--schedule=cosine"]


@torch.no_grad()
def loss_by_position(model, batches):
    """The mean loss at each of NEW positions: (NEW,)."""
    parts = [model(*batches("val", i)) for i in range(ROWS // batches.cfg.micro_batch)]
    return -torch.cat(parts).mean(dim=0)


def report(name, model, batches):
    """Print the mean loss at each stretch of positions."""
    losses = loss_by_position(model, batches)
    print(f"{name:34}" + "".join(f"{losses[first:last].mean().item():10.3f}" for first, last in STRETCHES))


def main(argv):
    parser = argparse.ArgumentParser(prog="context.py", description=__doc__)
    parser.add_argument("--out", default="out/context")
    out = parser.parse_args(argv).out
    short, long = f"--out_dir={out}/short", [f"--out_dir={out}/long", f"--init_from={out}/short/pretrain"]
    train.main([*SHORT, short])
    train.main([*LONG, *long])
    cfg = config.load([*LONG, *long])
    batches = data.Batches(cfg, Tokenizer.load(f"{out}/short/tokenizer"))
    before, _ = checkpoint.load(f"{out}/short/pretrain")
    after, _ = checkpoint.load(f"{out}/long/pretrain")
    print(f"{'loss at positions':34}" + "".join(f"{f'{first}-{last - 1}':>10}" for first, last in STRETCHES))
    report(f"trained in rows of {OLD}", before, batches)
    slower, _ = checkpoint.load(f"{out}/short/pretrain", replace(before.cfg, rope_theta=cfg.rope_theta))
    report("the same with the new rope_theta", slower, batches)
    report(f"continued in rows of {NEW}", after, batches)


if __name__ == "__main__":
    command(main, own_help=True)

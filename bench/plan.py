"""
bench/plan.py: what will a run cost, before it begins?

    python -m bench plan config/day.py                       its fields are flags: --max_steps=38147

Everything is computed from the config; nothing is run. Time is the number of operations divided by how many
a card does per second. Training never reaches a card's peak: 40% of it is good, and small models get less.
What this machine reaches is known after `python -m bench train`.

Memory is what training holds all the time (weights, gradients, averages) and what the forward pass keeps for
the backward pass, the activations. SmolLM-135M keeps 0.9 MB for each position of a micro-batch. So
micro_batch is what to lower if a card is too small.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

import config
from config import Config, UserError
from export.__main__ import must_be_llama, n_linear, training_bytes
from model import LOGITS_AT_ONCE
from plumbing import disk
from plumbing.processes import PEAKS, Run
from plumbing.shards import budget_of

CARDS = ("RTX 3090", "RTX 4090", "L20", "L40S", "A100", "H100")
# Apple states no peak for its GPUs. This one was measured: products of large float32 matrices on the ten
# cores of an M4 (Hübner et al. 2025, "Apple vs. Oranges"). An M4 Max has four times as many.
M4 = 2.9e12
REACHED = 0.4  # of the peak
RATE = Path("out/bench_train.json")  # what python -m bench train measured on this machine

# ---------------------------------------------------------------------------------------------------------
# memory


def activation_bytes(cfg: Config, half: bool) -> int:
    """What the backward pass needs of a block for each position, in bytes: half, with products in bfloat16.

        kept in float32     C  each of: both inputs of the norms, both normalized ones, before their weights
        for the products    C  the input of q, k, v, gate and up: in bfloat16 each has a copy of its own
                            C  q, and what attention returns, the input of o_proj
                            KD k and v
                            F  gate, silu(gate), up, and their product, the input of down_proj
        in float32          H  a logarithm per head, and 1 per norm

    A GPU's fused norm keeps 8 C less, and torch.compile computes some of it again instead of keeping it.
    """
    C, KD, F, H = cfg.d_model, cfg.n_kv_head * cfg.head_dim, cfg.d_ff, cfg.n_head
    inputs = 5 * C if half else 2 * C  # in float32 all who read a tensor share it
    return 4 * (4 * C + H + 2) + (2 if half else 4) * (inputs + 2 * C + 2 * KD + 4 * F)


def memory_bytes(cfg: Config, micro_batch: int) -> int:
    """The most memory of a training step, not compiled: at the end of the forward pass, in the head.

    The head keeps the gradient of its matrix and of its inputs. Besides, it has logits and their logarithms
    of one chunk and the gradient of the chunk before. bfloat16 adds a copy of each matrix.
    """
    half, V, C = cfg.dtype != "float32", cfg.vocab_size, cfg.d_model
    matrices = 2 * (n_linear(cfg) + V * C) if half else 0
    final_norm = 4 * 3 * C + 2 * (2 if half else 4) * C  # its tensors; the head's inputs and their gradients
    positions = micro_batch * cfg.seq_len * (cfg.n_layer * activation_bytes(cfg, half) + final_norm)
    chunk = min(LOGITS_AT_ONCE, micro_batch * cfg.seq_len * V) * (4 + 4 + (6 if half else 4))
    return sum(training_bytes(cfg).values()) + matrices + 4 * V * C + positions + chunk


# ---------------------------------------------------------------------------------------------------------
# disk, time


def disk_bytes(cfg: Config) -> tuple[int, int, int]:
    """(bytes of the token shards, of one checkpoint, how many checkpoints there are at most). Without the
    shards of built-in sources, some megabytes."""
    shards = 2 * sum(budget_of(source, cfg) for source in cfg.sources)  # ids of 16 bits
    held = training_bytes(cfg)
    saved = math.ceil(cfg.max_steps / (cfg.save_every or cfg.max_steps))
    kept = min(saved, cfg.keep_checkpoints + 1) if cfg.keep_checkpoints else saved  # + 1: before one goes
    return shards, sum(held.values()) - held["gradients"], kept


def hours(cfg: Config, operations_per_second: float) -> float:
    return cfg.flops_per_token * cfg.tokens_per_step * cfg.max_steps / operations_per_second / 3600


def remember(o: Namespace, tokens_per_second: float) -> None:
    """Store what this machine did in python -m bench train, in operations per second."""
    shape = config.load([o.config, f"--seq_len={o.T}"])
    machine = Run("bench", Path(), torch.device(o.device)).origin()["machine"].removeprefix("1 x ")
    disk.write_json(RATE, {"operations": float(tokens_per_second * shape.flops_per_token), "machine": machine,
                           "what": f"{o.config}, {o.batch} rows of {o.T}, {o.dtype}"})


def machines() -> Iterator[tuple[str, float, str]]:
    """(name, operations per second that training gets, where the figure comes from)."""
    for card in CARDS:
        yield card, REACHED * PEAKS[card], f"{PEAKS[card] / 1e12:g} TFLOP/s, bfloat16"
    yield "Apple M4", REACHED * M4, f"{M4 / 1e12:g} TFLOP/s, float32, measured by others"
    if RATE.exists():
        found = disk.read_json(RATE, {"operations": float, "machine": str, "what": str})
        yield "this machine", found["operations"], f"{found['machine']}, measured with {found['what']}"


# ---------------------------------------------------------------------------------------------------------
# the table


def main(argv: list[str]) -> None:
    if {"--help", "-h"} & set(argv):
        print(__doc__.strip())
        return
    cfg = config.load(argv)
    preset = next(word for word in argv if word.endswith(".py") and not word.startswith("--"))
    must_be_llama(cfg, "plan")
    if cfg.fractions:
        raise UserError(f"{preset} is for chats or pairs, and nobody knows how many tokens they are before "
                        "sft.py or dpo.py has read them: plan the pretraining, which takes most of the time")
    if cfg.max_seconds:
        raise UserError(f"{preset} ends after max_seconds={cfg.max_seconds:g}, and nobody knows how many "
                        "steps that will be: add --max_seconds=0 to plan a run of max_steps")
    if not cfg.max_steps:
        raise UserError(f"{preset} trains for epochs={cfg.epochs:g} of its texts, and nobody knows how many "
                        "they are before data.py has read them: say how long with --max_steps=1000")
    tokens, (shards, checkpoint, n) = cfg.max_steps * cfg.tokens_per_step, disk_bytes(cfg)
    dtype = "float32" if cfg.dtype == "float32" else "bfloat16"
    print(f"{preset}, computed, not run")
    for name, text in {
        "parameters": f"{cfg.n_params:,}",
        "tokens": f"{tokens:,}, {tokens / cfg.n_params:.1f} per parameter: "
                  f"{cfg.max_steps:,} steps of {cfg.tokens_per_step:,}",
        "operations": f"{tokens * cfg.flops_per_token:.2e}, 6 N + 6 L C T per token",
        "disk": f"{(shards + n * checkpoint) / 1e9:,.1f} GB: {shards / 1e9:,.1f} of tokens, "
                f"{n} checkpoint{'s' * (n > 1)} of {checkpoint / 1e9:,.2f}",
    }.items():
        print(f"    {name:<14}{text}")
    mask = ", without the document mask" if cfg.doc_mask else ""
    print(f"\nmicro_batch, and GB of memory in {dtype}, not compiled{mask}")
    for rows in sorted({2**n for n in range(7) if cfg.batch % 2**n == 0} | {cfg.micro_batch}):
        here = "    the preset's" if rows == cfg.micro_batch else ""
        print(f"    {rows:<14}{memory_bytes(cfg, rows) / 1e9:>12,.1f}{here}")
    print(f"\nhours at {REACHED:.0%} of the peak, or at this machine's own rate")
    for name, rate, source in machines():
        print(f"    {name:<14}{hours(cfg, rate):>12,.2f}    {source}")
    if not RATE.exists():
        print("    this machine  measure it first: python -m bench train")

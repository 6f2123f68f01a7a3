"""bench/sampling.py: a prompt of o.T ids is read (prefill), or o.new ids are written after 16 (decode)."""

# B prompts, T positions

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.training import fresh, shaped, some_ids, their_model
from config import Config
from sample import generate_batch


def config_of(o: Namespace) -> Config:
    return replace(shaped(o), seq_len=max(o.T, 16 + o.new) + 1)


def sampling(o: Namespace, write: Callable[[Tensor, int], Tensor]) -> dict[str, tuple]:
    """The rows of a side; write(prompts (B, T), n) returns n more ids of each prompt, the likeliest ones."""
    def work(prompts: Tensor, n: int) -> Callable[[], int]:
        return lambda: int(write(prompts, n).sum())  # if both sides write the same ids, so are their sums

    rows = {}
    for B in (1, 8):
        rows[f"prefill, batch {B}"] = work(some_ids(o, B, o.T), 1), B * o.T, "tokens"
        rows[f"decode, batch {B}"] = work(some_ids(o, B, 16), o.new), B * o.new, "tokens"
    return rows


def sample_ours(o: Namespace) -> dict[str, tuple]:
    model = fresh(config_of(o)).to(o.device, getattr(torch, o.dtype)).for_decoding()

    def write(prompts: Tensor, n: int) -> Tensor:
        return torch.tensor(list(generate_batch(model, prompts.tolist(), n, temperature=0)))

    return sampling(o, write)


def sample_transformers(o: Namespace) -> dict[str, tuple]:
    model = their_model(config_of(o)).to(o.device, getattr(torch, o.dtype)).eval()

    def write(prompts: Tensor, n: int) -> Tensor:
        ids = model.generate(  # type: ignore[operator]
            prompts, attention_mask=torch.ones_like(prompts), min_new_tokens=n,
            max_new_tokens=n, do_sample=False, pad_token_id=0)
        return ids[:, prompts.shape[1]:]

    return sampling(o, write)

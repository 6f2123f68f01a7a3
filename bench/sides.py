"""
contests: the same work, done by this project and by another one, for bench.py to time.

A side is a function (o, ready) -> {row of the table: (work, amount, unit)}. o are the options of bench.py.
It calls ready() between its imports and its first model: what it holds behind that counts as its memory.
work() does the work once, and amount says how much that is: tokens, pairs, bytes; or None, for a number
that both sides must agree on.

    training.py     a step of pretraining, of fine-tuning, of preferences
    sampling.py     reading a prompt, and writing on
    tokenizing.py   learning merges, and encoding
    scaling.py      our own speed as rows, batches, models grow                              next: ../bench.py
"""

from collections.abc import Callable
from functools import partial

from bench.sampling import sample_llama_cpp, sample_ours, sample_transformers
from bench.tokenizing import tokenizer_ours, tokenizer_tokenizers
from bench.training import dpo_ours, dpo_trl, sft, train_ours, train_transformers

SIDES: dict[str, dict[str, Callable]] = {
    "train": {"ours": train_ours, "transformers": train_transformers},
    "sample": {"ours": sample_ours, "transformers": sample_transformers, "llama.cpp": sample_llama_cpp},
    "tokenizer": {"ours": tokenizer_ours, "tokenizers": tokenizer_tokenizers},
    "sft": {"ours": partial(sft, packed=True), "padded": partial(sft, packed=False)},
    "dpo": {"ours": dpo_ours, "trl": dpo_trl}}

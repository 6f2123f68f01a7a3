"""sampling.py: a prompt of o.T ids is read (prefill), or o.new ids are written on (decode)."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.training import fresh, shaped, some_ids, their_llama
from fast import FastLM
from sample import generate_many
from tokenizer import Tokenizer


def sampling(o: SimpleNamespace, read_and_write: Callable) -> dict[str, tuple]:
    """The works of sampling; read_and_write(prompts, n) continues prompts (B, T) by n ids."""
    works = {}
    for B in (1, 8):
        long, short = some_ids(o, B, o.T), some_ids(o, B, 16)
        works[f"prefill, batch {B}"] = (lambda long=long: read_and_write(long, 1), B * o.T, "tokens")
        works[f"decode, batch {B}"] = (lambda short=short: read_and_write(short, o.new), B * o.new, "tokens")
    return works


def sample_ours(o: SimpleNamespace, ready: Callable[[], None]) -> dict[str, tuple]:
    ready()
    cfg = replace(shaped(o), seq_len=max(o.T, 16 + o.new) + 1)
    model = FastLM(fresh(cfg), o.dtype)
    return sampling(o, lambda prompts, n: list(generate_many(model, prompts.tolist(), n, temperature=0)))


def sample_transformers(o: SimpleNamespace, ready: Callable[[], None]) -> dict[str, tuple]:
    dtype = torch.float32 if o.dtype == "float32" else torch.bfloat16  # int8 is compared with bfloat16
    model = their_llama(o, ready).to(dtype).eval()

    def read_and_write(prompts, n):
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), min_new_tokens=n,
                              max_new_tokens=n, do_sample=False, pad_token_id=0)

    return sampling(o, read_and_write)


def sample_llama_cpp(o: SimpleNamespace, ready: Callable[[], None]) -> dict[str, tuple]:
    import llama_cpp

    from export import gguf_file
    quant = {"float32": "f16", "bfloat16": "f16", "int8": "q8_0"}[o.dtype]
    with tempfile.TemporaryDirectory() as folder:
        fresh(shaped(o)).save(folder)
        Tokenizer.train(["a b"], 300).save(folder)
        gguf_file.write(Path(folder), Path(folder) / "model.gguf", quant)
        ready()
        llama = llama_cpp.Llama(f"{folder}/model.gguf", n_ctx=max(o.T, 16 + o.new) + 1, n_threads=o.threads,
                                n_threads_batch=o.threads, verbose=False)

    def read_and_write(prompts, n):
        llama.reset()
        llama.eval(prompts[0].tolist())
        for _ in range(n):
            llama.eval([llama.sample(temp=0)])

    return {name: work for name, work in sampling(o, read_and_write).items() if name.endswith("batch 1")}

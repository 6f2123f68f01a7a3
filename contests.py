"""
contests.py: the same work, done by this project and by another one, for bench.py to time.

A side is a function (o, ready) -> {row of the table: (work, amount, unit)}. o are the options of bench.py. It
calls ready() between its imports and its first model: what it holds behind that counts as its memory. work() does
the work once, and amount says how much that is: tokens, pairs, bytes; or None, for a number that both sides must
agree on.                                                                                       next: bench.py
"""

# B rows, T positions in a row

import sysconfig
import tempfile
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

import checkpoint
import config
import data
import dpo
import fast
import packing
import train
from config import UserError
from corpus.conversations import conversations, preferences
from model import IGNORE, SmolLM
from run import Run, compile_blocks
from sample import generate_many
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------
# a training step


def shaped(o):
    """The Config of a bench: the preset's model in rows of o.T, o.batch of them a step, with AdamW."""
    return replace(config.load_preset(o.config), device=o.device, dtype=o.dtype, seq_len=o.T, batch=o.batch,
                   micro_batch=o.batch, optimizer="adamw", max_steps=1000, warmup_steps=10, decay_steps=10,
                   doc_mask=False, data=(("builtin", 1.0),), fractions=False, init_from=None)


def some_ids(o, *shape):
    """Which ids they are does not matter for time."""
    return torch.randint(17, 2000, shape, generator=torch.Generator().manual_seed(0)).to(o.device)


def some_batch(o):
    """ids and targets, (B, T) each."""
    ids = some_ids(o, o.batch, o.T + 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def autocast(o):
    return torch.autocast(o.device, torch.bfloat16, enabled=o.dtype == "bfloat16")


def fresh(cfg):
    torch.manual_seed(0)
    return SmolLM(cfg)


def trained(cfg, o):
    """A fresh model, and step(batch, loss_fn): one step of it, with train.py's own code."""
    run, model = Run("bench", cfg, device=torch.device(o.device)), fresh(cfg).to(o.device)
    if o.compile:
        compile_blocks(model, run)
    optimizers = train.make_optimizers(model, cfg)

    def step(batch, loss_fn):
        return train.train_step(9, cfg, run, model, optimizers, (lambda split, i: batch, loss_fn))

    return model, step


def train_ours(o, ready):
    ready()
    _, step = trained(shaped(o), o)
    ids, targets = some_batch(o)
    batch = ids, targets, torch.zeros_like(ids)
    return {"step": (lambda: step(batch, train.loss_fn), o.batch * o.T, "tokens")}


def train_transformers(o, ready):
    from transformers import LlamaConfig, LlamaForCausalLM
    ready()
    cfg = shaped(o)
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.hf_config(cfg))).to(o.device)
    net = torch.compile(model) if o.compile else model
    optimizer = train.make_optimizers(model, cfg)[0]
    ids, targets = some_batch(o)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(o):
            loss = net(input_ids=ids, labels=targets, shift_labels=targets).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        return loss.item()

    return {"step": (step, o.batch * o.T, "tokens")}


# ---------------------------------------------------------------------------------------------------------
# sampling: a prompt of o.T ids is read (prefill), or o.new ids are written behind a short one (decode)


def sampling(o, read_and_write):
    """The works of sampling; read_and_write(prompts, n) continues prompts (B, T) by n ids."""
    works = {}
    for B in (1, 8):
        long, short = some_ids(o, B, o.T), some_ids(o, B, 16)
        works[f"prefill, batch {B}"] = (lambda long=long: read_and_write(long, 1), B * o.T, "tokens")
        works[f"decode, batch {B}"] = (lambda short=short: read_and_write(short, o.new), B * o.new, "tokens")
    return works


def sample_ours(o, ready):
    ready()
    cfg = replace(shaped(o), dtype="float32", seq_len=max(o.T, 16 + o.new) + 1)
    model = fast.FastLM(fresh(cfg), o.dtype)
    return sampling(o, lambda prompts, n: list(generate_many(model, prompts.tolist(), n, temperature=0)))


def sample_transformers(o, ready):
    from transformers import LlamaConfig, LlamaForCausalLM
    ready()
    dtype = torch.float32 if o.dtype == "float32" else torch.bfloat16  # int8 is compared with bfloat16
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.hf_config(shaped(o)))).to(o.device, dtype).eval()

    def read_and_write(prompts, n):
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), min_new_tokens=n,
                              max_new_tokens=n, do_sample=False, pad_token_id=0)

    return sampling(o, read_and_write)


def sample_llama_cpp(o, ready):
    import llama_cpp

    import gguf_file
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


# ---------------------------------------------------------------------------------------------------------
# the tokenizer


def texts_of(o):
    """About o.megabytes of text: Python files of the installed packages, which every reader has."""
    left, texts = o.megabytes * 1e6, []
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        left -= len(text.encode())
        if left < 0:
            return texts
    raise UserError(f"the installed packages have only {o.megabytes - left / 1e6:.0f} MB of Python files: lower "
                    f"--megabytes={o.megabytes}")


def tokenizing(o, learn, encode):
    texts = texts_of(o)
    size = sum(len(text.encode()) for text in texts)
    tok = learn(texts)
    return {"train": (lambda: learn(texts), size, "bytes"),
            "encode": (lambda: encode(tok, texts), size, "bytes")}


def tokenizer_ours(o, ready):
    ready()

    class Documents(list):
        def state(self):
            return {}

    def encode(tok, texts):
        with tempfile.TemporaryDirectory() as folder:
            batches = data.ahead(data.encoded_batches(Documents(texts), tok, 0.0005))
            return data.write_shard(batches, Path(folder), "0", 0, data.tqdm(disable=True))

    return tokenizing(o, lambda texts: Tokenizer.train(texts, 49152), encode)


def tokenizer_tokenizers(o, ready):
    ready()

    def encode(tok, texts):
        for i in range(0, len(texts), 200):
            tok.rust.encode_batch_fast(texts[i:i + 200], add_special_tokens=False)

    return tokenizing(o, lambda texts: Tokenizer.train(texts, 49152, "rust"), encode)


# ---------------------------------------------------------------------------------------------------------
# fine-tuning: chats of mixed length, packed, or one to a row and padded to the longest of the batch


def rows_of(kind, cfg, encoded, items):
    """The first items of a built-in source, as rows of ids and targets, by a small tokenizer of their own."""
    items = list(islice(items(replace(cfg, data=((f"builtin-{kind}", 1.0),), fractions=True)), 2000))
    tok = Tokenizer.train((str(item) for item in items[:500]), 600)
    return [encoded(item, tok) for item in items]


def sft(o, ready, packed):
    cfg = replace(shaped(o), doc_mask=packed)
    rows = rows_of("chats", cfg, lambda chat, tok: packing.encoded(chat, tok, o.T), conversations)
    chats = list(chain.from_iterable(rows))
    ready()
    model, step = trained(cfg, o)
    if packed:
        rows = torch.from_numpy(packing.filled(chats, o.T)).long()                        # (3, rows, T)
        batches = [tuple(rows[:, i:i + o.batch]) for i in range(0, 2 * o.batch, o.batch)]
        full = sum(len(ids) for ids, _ in chats) / rows[0].numel()
        real = full * len(batches) * o.batch * o.T
    else:
        batches = [dpo.padded(chats[i:i + o.batch]) for i in range(0, 16 * o.batch, o.batch)]
        real = sum(len(ids) for ids, _ in chats[:16 * o.batch])
    return {"real tokens": (lambda: [step(batch, train.loss_fn) for batch in batches], int(real), "tokens")}


# ---------------------------------------------------------------------------------------------------------
# preferences


def pairs_batch(o, cfg):
    """A batch of o.batch preference pairs, and the log-probabilities that a reference gives their answers."""
    cfg = replace(cfg, dpo_max_length=o.T, dpo_max_prompt_length=o.T // 2)
    pairs = rows_of("pairs", cfg, lambda pair, tok: dpo.encoded(pair, tok, cfg), preferences)[:o.batch]
    return tuple(t.to(o.device) for t in dpo.padded([a for a, _ in pairs] + [b for _, b in pairs]))


def reference(cfg):
    torch.manual_seed(1)
    return SmolLM(cfg)


def dpo_ours(o, ready):
    cfg = shaped(o)
    batch = pairs_batch(o, cfg)
    loss_fn = partial(dpo.loss_fn, beta=0.3)
    with torch.no_grad(), autocast(o):
        log_ref = reference(cfg).to(o.device)(*batch).sum(1).float()
    ready()
    model, step = trained(cfg, o)

    def refer_and_step():
        with torch.no_grad(), autocast(o):
            model(*batch)
        step((*batch, log_ref), loss_fn)

    return {"loss": (lambda: step((*batch, log_ref), loss_fn)["loss"], None, "check"),
            "pairs": (lambda: step((*batch, log_ref), loss_fn), o.batch, "pairs"),
            "pairs, reference included": (refer_and_step, o.batch, "pairs")}


def dpo_trl(o, ready):
    import datasets
    import transformers
    import trl
    cfg = shaped(o)
    ids, targets, _ = pairs_batch(o, cfg)
    # trl masks the answer where it stands, not where it is predicted
    whole = torch.cat((ids, torch.zeros_like(ids[:, :1])), dim=1)
    answer = torch.cat((torch.zeros_like(ids[:, :1]), (targets != IGNORE).long()), dim=1)
    whole[answer == 1] = targets[targets != IGNORE]
    there = (answer.flip(1).cumsum(1).flip(1) > 0).long()
    inputs = {"input_ids": whole, "attention_mask": there, "completion_mask": answer}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("reference", reference(cfg)), ("policy", fresh(cfg))):
            model.save(f"{folder}/{name}")
        Tokenizer.train(["a b"], 300).save(f"{folder}/policy")
        load = transformers.AutoModelForCausalLM.from_pretrained
        ready()
        trainer = trl.DPOTrainer(
            model=load(f"{folder}/policy", dtype=torch.float32),
            ref_model=load(f"{folder}/reference", dtype=torch.float32),
            processing_class=transformers.AutoTokenizer.from_pretrained(f"{folder}/policy",
                                                                        pad_token="<|endoftext|>"),
            train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
            args=trl.DPOConfig(f"{folder}/trl", beta=0.3, use_cpu=o.device == "cpu", report_to=[], bf16=False,
                               gradient_checkpointing=False, disable_dropout=True))
    model = trainer.model.train()
    optimizer = train.make_optimizers(model, cfg)[0]

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(o):
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
        clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        return loss.item()

    return {"loss": (step, None, "check"), "pairs": (step, o.batch, "pairs"),
            "pairs, reference included": (step, o.batch, "pairs")}


SIDES = {"train": {"ours": train_ours, "transformers": train_transformers},
         "sample": {"ours": sample_ours, "transformers": sample_transformers, "llama.cpp": sample_llama_cpp},
         "tokenizer": {"ours": tokenizer_ours, "tokenizers": tokenizer_tokenizers},
         "sft": {"ours": partial(sft, packed=True), "padded": partial(sft, packed=False)},
         "dpo": {"ours": dpo_ours, "trl": dpo_trl}}

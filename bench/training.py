"""training.py: steps of pretraining, of fine-tuning on chats of mixed length, and of preferences."""

# B rows, T positions in a row

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import config
import dpo
from plumbing import hf_config
import packing
import train
from config import Config
from corpus.conversations import conversations, preferences
from model import IGNORE, SmolLM
from plumbing.processes import Run, compile_blocks
from tokenizer import Tokenizer


def shaped(o: SimpleNamespace) -> Config:
    """The Config of a bench: the preset's model in rows of o.T, o.batch of them a step, with AdamW."""
    return replace(config.load_preset(o.config), device=o.device, seq_len=o.T, batch=o.batch,
                   micro_batch=o.batch, dtype="bfloat16" if o.dtype == "bfloat16" else "float32",
                   optimizer="adamw", max_steps=1000, warmup_steps=10, decay_steps=10, doc_mask=False,
                   data=(("builtin", 1.0),), fractions=False, init_from=None)


def some_ids(o: SimpleNamespace, *shape: int) -> Tensor:
    """Which ids they are does not matter for time."""
    return torch.randint(17, 2000, shape, generator=torch.Generator().manual_seed(0)).to(o.device)


def some_batch(o: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """ids and targets, (B, T) each."""
    ids = some_ids(o, o.batch, o.T + 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def autocast(o: SimpleNamespace) -> torch.autocast:
    return torch.autocast(o.device, torch.bfloat16, enabled=o.dtype == "bfloat16")


def fresh(cfg: Config, seed: int = 0) -> SmolLM:
    torch.manual_seed(seed)
    return SmolLM(cfg)


def their_llama(o: SimpleNamespace, ready: Callable[[], None]) -> nn.Module:
    """The same shape as a model of transformers, with weights of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM
    ready()
    return LlamaForCausalLM(LlamaConfig(**hf_config.to_hf(shaped(o)))).to(o.device)


def their_step(o: SimpleNamespace, model: nn.Module, loss_of: Callable) -> Callable[[], float]:
    """A step as a user of another library writes it, with the optimizer and the clipping of train.py."""
    cfg = shaped(o)
    optimizer = train.make_optimizers(model, cfg)[0]

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(o):
            loss = loss_of()
        loss.backward()
        clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        return loss.item()

    return step


def trained(cfg: Config, o: SimpleNamespace) -> tuple[SmolLM, Callable]:
    """A fresh model, and step(batch, loss_fn): one step of it, with train.py's own code."""
    run, model = Run("bench", cfg, device=torch.device(o.device)), fresh(cfg).to(o.device)
    if o.compile:
        compile_blocks(model, run)
    optimizers = train.make_optimizers(model, cfg)

    def step(batch, loss_fn):
        return train.train_step(9, cfg, run, model, optimizers, (lambda split, i: batch, loss_fn))

    return model, step


def train_ours(o: SimpleNamespace, ready: Callable[[], None]) -> dict[str, tuple]:
    ready()
    _, step = trained(shaped(o), o)
    ids, targets = some_batch(o)
    batch = ids, targets, torch.zeros_like(ids)
    return {"step": (lambda: step(batch, train.loss_fn), o.batch * o.T, "tokens")}


def train_transformers(o: SimpleNamespace, ready: Callable[[], None]) -> dict[str, tuple]:
    model = their_llama(o, ready)
    net = torch.compile(model) if o.compile else model
    ids, targets = some_batch(o)
    step = their_step(o, model, lambda: net(input_ids=ids, labels=targets, shift_labels=targets).loss)
    return {"step": (step, o.batch * o.T, "tokens")}


# ---------------------------------------------------------------------------------------------------------
# fine-tuning: chats of mixed length, packed, or one to a row and padded to the longest of the batch


def rows_of(kind: str, cfg: Config, encoded: Callable, items: Callable) -> list:
    """The first items of a built-in source, as rows of ids and targets, by a small tokenizer of their own."""
    found = list(islice(items(replace(cfg, data=((f"builtin-{kind}", 1.0),), fractions=True)), 2000))
    tok = Tokenizer.train((str(item) for item in found[:500]), 600)
    return [encoded(item, tok) for item in found]


def sft(o: SimpleNamespace, ready: Callable[[], None], packed: bool) -> dict[str, tuple]:
    cfg = replace(shaped(o), doc_mask=packed)
    made = rows_of("chats", cfg, lambda chat, tok: packing.encoded(chat, tok, o.T), conversations)
    chats = list(chain.from_iterable(made))
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


def pairs_batch(o: SimpleNamespace, cfg: Config) -> tuple[Tensor, ...]:
    """ids, targets, doc of o.batch preference pairs, (2B, T) each: the chosen answers, then the rejected."""
    cfg = replace(cfg, dpo_max_length=o.T, dpo_max_prompt_length=o.T // 2)
    pairs = rows_of("pairs", cfg, lambda pair, tok: dpo.encoded(pair, tok, cfg), preferences)[:o.batch]
    return tuple(t.to(o.device) for t in dpo.padded([a for a, _ in pairs] + [b for _, b in pairs]))


def dpo_ours(o: SimpleNamespace, ready: Callable[[], None]) -> dict[str, tuple]:
    ready()
    cfg = shaped(o)
    batch = pairs_batch(o, cfg)
    loss_fn = partial(dpo.loss_fn, beta=0.3)
    with torch.no_grad(), autocast(o):
        log_ref = fresh(cfg, seed=1).to(o.device)(*batch).sum(1).float()
    model, step = trained(cfg, o)

    def refer_and_step():
        with torch.no_grad(), autocast(o):
            model(*batch)
        step((*batch, log_ref), loss_fn)

    return {"loss": (lambda: step((*batch, log_ref), loss_fn)["loss"], None, "check"),
            "pairs": (lambda: step((*batch, log_ref), loss_fn), o.batch, "pairs"),
            "pairs, reference included": (refer_and_step, o.batch, "pairs")}


def dpo_trl(o: SimpleNamespace, ready: Callable[[], None]) -> dict[str, tuple]:
    import datasets
    import transformers
    import trl
    ready()
    cfg = shaped(o)
    ids, targets, _ = pairs_batch(o, cfg)
    # trl masks the answer where it stands, not where it is predicted
    whole = torch.cat((ids, torch.zeros_like(ids[:, :1])), dim=1)
    answer = torch.cat((torch.zeros_like(ids[:, :1]), (targets != IGNORE).long()), dim=1)
    whole[answer == 1] = targets[targets != IGNORE]
    there = (answer.flip(1).cumsum(1).flip(1) > 0).long()
    inputs = {"input_ids": whole, "attention_mask": there, "completion_mask": answer}
    with tempfile.TemporaryDirectory() as folder:
        for name, ours in (("reference", fresh(cfg, seed=1)), ("policy", fresh(cfg))):
            ours.save(f"{folder}/{name}")
        Tokenizer.train(["a b"], 300).save(f"{folder}/policy")
        load = transformers.AutoModelForCausalLM.from_pretrained
        trainer = trl.DPOTrainer(
            model=load(f"{folder}/policy", dtype=torch.float32),
            ref_model=load(f"{folder}/reference", dtype=torch.float32),
            processing_class=transformers.AutoTokenizer.from_pretrained(f"{folder}/policy",
                                                                        pad_token="<|endoftext|>"),
            train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
            args=trl.DPOConfig(f"{folder}/trl", beta=0.3, use_cpu=o.device == "cpu", report_to=[], bf16=False,
                               gradient_checkpointing=False, disable_dropout=True))
    model = trainer.model.train()
    step = their_step(o, model, lambda: trainer.compute_loss(model, inputs))
    return {"loss": (step, None, "check"), "pairs": (step, o.batch, "pairs"),
            "pairs, reference included": (step, o.batch, "pairs")}

"""bench/training.py: steps of pretraining, of fine-tuning on chats of mixed length, and of preferences."""

# B rows, T positions in a row

import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from subprocess import Popen

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import config
import dpo
import train
from config import Config
from corpus.conversations import conversations, preferences
from model import IGNORE, SmolLM
from plumbing import checkpoint
from plumbing.processes import Run
from sft import encode_chat, fill_rows
from tokenizer import Tokenizer

BETA = 0.3


def shaped(o: Namespace) -> Config:
    """The preset's model on rows of o.T ids, o.batch of them per step, with AdamW."""
    return replace(config.load_preset(o.config), device=o.device, seq_len=o.T, batch=o.batch,
                   micro_batch=o.batch, dtype=o.dtype, optimizer="adamw", max_steps=1000, warmup_steps=10,
                   decay_steps=10, doc_mask=False, data=(("builtin", 1.0),), fractions=False, init_from=None)


def fresh(cfg: Config, seed: int = 0) -> SmolLM:
    """A model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return SmolLM(cfg)


def their_model(cfg: Config, seed: int = 0) -> nn.Module:
    """A model of transformers with the weights of fresh(cfg, seed)."""
    from transformers import LlamaConfig, LlamaForCausalLM
    ours, model = fresh(cfg, seed), LlamaForCausalLM(LlamaConfig(**checkpoint.to_hf(cfg)))
    assert not checkpoint.not_llama(ours), "transformers would compute something else"
    missing, _ = model.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"}, "another architecture"  # the head is tied
    return model


def some_ids(o: Namespace, *shape: int) -> Tensor:
    """Random ids: time does not depend on which they are."""
    return torch.randint(17, 2000, shape, generator=torch.Generator().manual_seed(0)).to(o.device)


def autocast(o: Namespace) -> torch.autocast:
    return torch.autocast(o.device, torch.bfloat16, enabled=o.dtype == "bfloat16")


def our_step(o: Namespace, cfg: Config, loss_fn: Callable) -> Callable[[tuple], float]:
    """step(batch) -> its loss: a step of a fresh model, with train.py's own code."""
    run, model = Run("bench", Path(), torch.device(o.device), o.dtype), fresh(cfg).to(o.device)
    optimizers = train.make_optimizers(model, cfg)

    def step(batch: tuple) -> float:
        return train.train_step(9, train.lr_at(9, cfg), cfg, run, model, optimizers,
                                lambda split, i: batch, loss_fn)["loss"]

    return step


def their_step(o: Namespace, model: nn.Module, loss_of: Callable) -> Callable[[], float]:
    """A step as a user of another library writes it, with train.py's optimizer and clipping."""
    cfg = shaped(o)
    optimizer = train.make_optimizers(model, cfg)[0]
    optimizer.param_groups[0]["lr"] = train.lr_at(9, cfg)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with autocast(o):
            loss = loss_of()
        loss.backward()
        clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        return loss.item()

    return step


# ---------------------------------------------------------------------------------------------------------
# pretraining


def some_batch(o: Namespace) -> tuple[Tensor, Tensor]:
    """ids and targets, (B, T) each."""
    ids = some_ids(o, o.batch, o.T + 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def train_ours(o: Namespace) -> dict[str, tuple]:
    step, (ids, targets) = our_step(o, shaped(o), train.loss_fn), some_batch(o)
    return {"step": (lambda: step((ids, targets, torch.zeros_like(ids))), o.batch * o.T, "tokens")}


def train_transformers(o: Namespace) -> dict[str, tuple]:
    model, (ids, targets) = their_model(shaped(o)).to(o.device), some_batch(o)
    step = their_step(o, model, lambda: model(input_ids=ids, labels=targets, shift_labels=targets).loss)
    return {"step": (step, o.batch * o.T, "tokens")}


def steps_beside(o: Namespace, busy: bool) -> dict[str, tuple]:
    """Ten pretraining steps, alone or while a busy process per core competes with them."""
    step, (ids, targets) = our_step(o, shaped(o), train.loss_fn), some_batch(o)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    neighbor = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # it never outlives us

    def work() -> float:
        neighbors = [Popen([sys.executable, "-c", neighbor]) for _ in range(cores * busy)]
        try:
            return [step((ids, targets, torch.zeros_like(ids))) for _ in range(10)][0]
        finally:
            for process in neighbors:
                process.kill()
                process.wait()

    return {"ten steps": (work, 10 * o.batch * o.T, "tokens")}


# ---------------------------------------------------------------------------------------------------------
# fine-tuning: chats of mixed length, packed, or one per row and padded to the longest of the batch


def encoded(kind: str, n: int, cfg: Config, encode: Callable, items: Callable) -> list:
    """The first n items of a built-in source, encoded by a small tokenizer that is made of them."""
    (documents,) = items(replace(cfg, data=((f"builtin-{kind}", 1.0),), fractions=True))
    found = list(islice(documents, n))
    tok = Tokenizer.train(map(str, found), 600)
    return [encode(item, tok) for item in found]


def sft(o: Namespace, packed: bool) -> dict[str, tuple]:
    cfg = replace(shaped(o), doc_mask=packed)
    n = 16 * o.batch
    found = encoded("chats", n, cfg, lambda chat, tok: encode_chat(chat, tok, o.T)[0], conversations)
    chats = list(chain.from_iterable(found))
    if packed:
        batches = list(torch.from_numpy(fill_rows(chats, o.T)).long().split(o.batch, dim=1))  # (3, B, T) each
    else:
        batches = [dpo.pad_rows(chats[i:i + o.batch]) for i in range(0, len(chats), o.batch)]
    step = our_step(o, cfg, train.loss_fn)

    def work() -> None:
        for batch in batches:
            step(batch)

    return {"chats": (work, sum(len(ids) for ids, _ in chats), "tokens without padding")}


# ---------------------------------------------------------------------------------------------------------
# preferences


def pairs_batch(o: Namespace, cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """ids, targets, doc of o.batch preference pairs, (2B, T) each: the chosen answers, then the rejected."""
    cfg = replace(cfg, dpo_max_length=o.T, dpo_max_prompt_length=o.T // 2)
    pairs = encoded("pairs", o.batch, cfg, lambda pair, tok: dpo.encode_pair(pair, tok, cfg)[0], preferences)
    ids, targets, doc = dpo.pad_rows([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs])
    return ids.to(o.device), targets.to(o.device), doc.to(o.device)


def dpo_ours(o: Namespace) -> dict[str, tuple]:
    cfg = shaped(o)
    batch, reference = pairs_batch(o, cfg), fresh(cfg, seed=1).to(o.device)
    step = our_step(o, cfg, partial(dpo.loss_fn, beta=BETA))

    @torch.no_grad()
    def refer() -> Tensor:
        with autocast(o):
            return reference(*batch).sum(1).float()

    log_ref = refer()
    return {"pairs, reference included": (lambda: step((*batch, refer())), o.batch, "pairs"),
            "pairs": (lambda: step((*batch, log_ref)), o.batch, "pairs")}


def dpo_trl(o: Namespace) -> dict[str, tuple]:
    import datasets
    import transformers
    import trl
    cfg = shaped(o)
    ids, targets, _ = pairs_batch(o, cfg)
    # trl masks an answer where its ids are, not where they are predicted
    together = torch.cat((ids, torch.zeros_like(ids[:, :1])), dim=1)
    answer = torch.cat((torch.zeros_like(ids[:, :1]), (targets != IGNORE).long()), dim=1)
    together[answer == 1] = targets[targets != IGNORE]
    not_padding = (answer.flip(1).cumsum(1).flip(1) > 0).long()
    inputs = {"input_ids": together, "attention_mask": not_padding, "completion_mask": answer}
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.train(["a b"], 300).rust,
                                               eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            model=their_model(cfg), ref_model=their_model(cfg, seed=1),  # type: ignore[arg-type]
            processing_class=tok,
            train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
            args=trl.DPOConfig(folder, beta=BETA, use_cpu=o.device == "cpu", report_to=[], bf16=False,
                               gradient_checkpointing=False, disable_dropout=True))
    model = trainer.model.train()
    step = their_step(o, model, lambda: trainer.compute_loss(model, inputs))
    rows = "pairs, reference included", "pairs"  # trl asks the reference in every step, also in the second
    return {row: (step, o.batch, "pairs") for row in rows}

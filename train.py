"""
train.py: the training loop, and pretraining.

One step: read a batch, let the model predict every next id, measure how surprised it was by the right ones
(the loss), and move every weight a little in the direction that would have surprised it less:

    loss = sum of -log p(target)     gradient = d loss / d weights / number of targets     weights -= lr * ...

The same loop trains all stages. They differ in two things: get_batch(split, i), which rows come next, and
loss_fn(model, batch), which returns (loss summed, number of targets, {name: sum}). Sums are added over the
parts of a batch and over devices and divided once: how a batch is cut up cannot change what is learnt.

Running the same command again continues from the newest checkpoint; Ctrl-C finishes the step and saves.

    python train.py config/demo.py                                              pretrain on one device
    torchrun --standalone --nproc_per_node=8 train.py config/smol_135m.py       on eight          next: sft.py
"""

import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from tqdm import tqdm

from plumbing import checkpoint
import config
import data
from plumbing import hf_config
from config import Config, UserError
from model import IGNORE, SmolLM
from plumbing.processes import SHAPE, Log, Run, compile_blocks, resume, save, start
from sample import samples, shown
from tokenizer import Tokenizer

PROMPT = "Once upon a time"
SAMPLE = dict(max_new_tokens=60, temperature=0.6, top_p=0.92)  # of the samples printed on the way

# ---------------------------------------------------------------------------------------------------------
# what a step is made of


def loss_fn(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, dict]:
    """Pretraining: every next id is a target. batch = (ids, targets, doc), (B, T) each."""
    ids, targets, doc = batch
    return -model(ids, targets, doc).sum(), (targets != IGNORE).sum(), {}


def lr_at(step: int, cfg: Config) -> float:
    """The learning rate of step 0, 1, 2, ...: SmolLM's trapezoid, or a cosine. As in nanotron, step 0 has 0.

    wsd      up in a line, constant for most of the run, down by 1 - sqrt (Hagele et al. 2024): the constant
             part can be prolonged at will, and much of the progress shows in the decay
    cosine   up in a line, then half a cosine down to 0
    """
    warmup = cfg.warmup_steps or math.ceil(cfg.warmup_ratio * cfg.max_steps)
    if step <= warmup and warmup:
        return cfg.lr * step / warmup
    if cfg.schedule == "cosine":
        return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (cfg.max_steps - warmup)))
    decay = cfg.max_steps // 5 if cfg.decay_steps is None else cfg.decay_steps
    start = cfg.max_steps - decay
    return cfg.lr if step < start else cfg.lr * (1 - math.sqrt((step - start) / decay))


def make_optimizers(model: nn.Module, cfg: Config) -> list[Optimizer]:
    """AdamW on everything, weight decay included, as SmolLM; or Muon on the matrices inside the blocks.

    Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix: all its
    directions are learnt at the same speed. "match_rms_adamw" scales it so that one lr serves both.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if ".layers." in name and p.ndim == 2 and cfg.optimizer == "muon"]
    others = [p for _, p in named if all(p is not matrix for matrix in matrices)]
    optimizers: list[Optimizer] = [
        torch.optim.AdamW(others, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=1e-8,
                          weight_decay=cfg.weight_decay, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, momentum=0.95,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def add_up(parts: list[dict], run: Run) -> dict[str, float]:
    """[{name: sum}, ...] of micro-batches -> {name: sum} over all of them and all processes, as numbers."""
    names = list(parts[0])
    rows = [[torch.as_tensor(part[name], device=run.device).float() for name in names] for part in parts]
    totals = torch.stack([torch.stack(row) for row in rows]).cpu().double().sum(0)
    if run.world > 1:
        totals = totals.to(run.device)
        dist.all_reduce(totals)
    return dict(zip(names, totals.tolist(), strict=True))


def train_step(step: int, cfg: Config, run: Run, net: nn.Module, optimizers: list[Optimizer],
               hooks: tuple[Callable, Callable]) -> dict[str, float]:
    """One optimizer step; returns what the log says about it."""
    get_batch, loss_fn = hooks
    micro_steps, parts, began = cfg.micro_steps(run.world), [], time.perf_counter()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg)
    for m in range(micro_steps):
        if run.world > 1:  # exchange gradients once per step, not once per micro-batch
            net.require_backward_grad_sync = m == micro_steps - 1  # type: ignore[assignment]
        with run.autocast():
            batch = run.move(get_batch("train", step * micro_steps + m))
            loss, count, sums = loss_fn(net, batch)
        loss.backward()  # the gradient of a sum is the sum of the gradients,
        n_targets = (batch[1] != IGNORE).sum()
        parts.append({"loss": loss.detach(), "count": count, "tokens": n_targets, **sums, "stop": run.stop})
    total = add_up(parts, run)  # over micro-batches and processes,
    where = f"step {step + 1} (draws {step * cfg.batch} to {(step + 1) * cfg.batch - 1} of the run)"
    if not total["count"]:
        raise UserError(f"{where} has no target at all: there is nothing to learn in these rows")
    parameters = [p for group in optimizers for g in group.param_groups for p in g["params"]]
    for p in parameters:  # so one division is exact. DDP has averaged over processes: `world` turns
        p.grad.mul_(run.world / total["count"])  # that back into a sum
    norm = clip_grad_norm_(parameters, cfg.grad_clip).item()
    if not math.isfinite(total["loss"]) or not math.isfinite(norm):
        raise UserError(f"{where}: the loss is {total['loss'] / total['count']} and the gradient's norm "
                        f"{norm}; nothing was updated. Lower --lr, or look at these rows")
    for optimizer in optimizers:
        optimizer.step()
    if total.pop("stop"):  # one process was asked to stop: all do
        run.stop = run.stop or signal.SIGTERM
    count, tokens, seconds = total.pop("count"), total.pop("tokens"), time.perf_counter() - began
    means = {name: value / count for name, value in total.items()}
    return {"step": step + 1, **means, "lr": lr_at(step, cfg), "grad_norm": norm, "tokens": int(tokens),
            "tokens_per_second": tokens / seconds, "seconds": seconds}


@torch.no_grad()
def evaluate(cfg: Config, run: Run, net: nn.Module, get_batch: Callable,
             loss_fn: Callable) -> dict[str, float]:
    """Means over the first eval_batches batches of validation rows: {"val_loss": ...}, or {} without rows."""
    parts = []
    for i in range(cfg.eval_batches * cfg.micro_steps(run.world)):
        batch = get_batch("val", i)
        if batch is None:
            return {}
        with run.autocast():
            loss, count, sums = loss_fn(net, run.move(batch))
        parts.append({"loss": loss, "count": count, **sums})
    total = add_up(parts, run)
    count = total.pop("count")
    means = {f"val_{name}": value / count for name, value in total.items()}
    if run.bytes_per_token:  # tokenizers cut text differently; bits per byte can be compared all the same
        means["val_bits_per_byte"] = means["val_loss"] / math.log(2) / run.bytes_per_token
    return means


# ---------------------------------------------------------------------------------------------------------
# the loop


def parallel(model: SmolLM, run: Run, hooks: tuple[Callable, Callable]) -> nn.Module:
    """The model, or among several processes DDP around it, which averages their gradients. Its first backward
    pass decides in which order it adds from then on: it is made here, for nothing, so that a run that
    continues computes the bits of one that was never interrupted."""
    if run.world == 1:
        return model
    net, (get_batch, loss_fn) = DistributedDataParallel(model), hooks
    with run.autocast():
        loss, _, _ = loss_fn(net, run.move(get_batch("train", 0)))
    loss.backward()
    return net


def fit(cfg: Config, run: Run, model: SmolLM, tok: Tokenizer, hooks: tuple[Callable, Callable]) -> None:
    """Train from the newest checkpoint to cfg.max_steps. hooks: get_batch and loss_fn."""
    model.to(run.device)
    optimizers = make_optimizers(model, cfg)
    first = resume(run, model, tok, optimizers)
    if first >= cfg.max_steps:
        run.say(f"nothing is left to do: {run.folder} has {first} steps, and max_steps={cfg.max_steps}")
        return
    if cfg.compile:
        compile_blocks(model, run)
    net = parallel(model, run, hooks)
    log, steps = Log(run, first), range(first + 1, cfg.max_steps + 1)
    bar = tqdm(steps, run.stage, cfg.max_steps, initial=first, disable=run.rank > 0, mininterval=0.5)
    with run.signals():
        for step in bar:
            line = train_step(step - 1, cfg, run, net, optimizers, hooks)
            if step == cfg.max_steps or is_due(step, cfg.eval_every):
                line |= evaluate(cfg, run, net, *hooks)
                values = [f"{name} {line[name]:.3f}" for name in line if "loss" in name or "val" in name]
                run.say(f"step {step}: {', '.join(values)}")
            log.write(line)
            bar.set_postfix(loss=f"{line['loss']:.3f}", tok_s=f"{line['tokens_per_second']:,.0f}")
            if is_due(step, cfg.sample_every) and run.rank == 0:
                with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
                    for prompt, ids in run.prompts.items():
                        run.say(f"    {prompt} | {shown(samples(model, tok, ids, 1, SAMPLE)[0])}")
            if step == cfg.max_steps or run.stop or is_due(step, cfg.save_every):
                save(step, run, model, tok, optimizers)
            if run.stop:
                bar.close()
                run.say(f"stopped after step {step}, which is saved; the same command continues")
                sys.exit(128 + run.stop)
    run.say(f"done: {run.folder}")


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


# ---------------------------------------------------------------------------------------------------------
# pretraining


def fresh_or_loaded(cfg: Config) -> tuple[Config, SmolLM]:
    """(cfg, model): fresh weights, or those of cfg.init_from, whose shape the returned cfg has, too.

    One field of the shape may be new: rows longer than the model's context may bring a larger rope_theta,
    with which far positions turn no further than near ones did before. Shorter rows leave the model its
    context: model.cfg.seq_len is the longer of the two.
    Raises UserError for a field that was set to something else than the checkpoint has.
    """
    torch.manual_seed(cfg.seed)
    if not cfg.init_from:
        return cfg, SmolLM(cfg)
    theirs, default = hf_config.read_config(checkpoint.find(cfg.init_from)), Config()
    kept = {name: getattr(theirs, name) for name in SHAPE}
    if cfg.seq_len > theirs.seq_len and theirs.rope_theta < cfg.rope_theta != default.rope_theta:
        kept["rope_theta"] = cfg.rope_theta
    for name, value in kept.items():
        if getattr(cfg, name) not in (value, getattr(default, name)):
            raise UserError(f"{name}={getattr(cfg, name)} conflicts with {value} of the checkpoint "
                            f"{cfg.init_from}: leave it out, or set --{name}={value}")
    cfg = replace(cfg, **kept)
    return cfg, SmolLM.load(cfg.init_from, replace(cfg, seq_len=max(cfg.seq_len, theirs.seq_len)))


def main(argv: list[str]) -> None:
    cfg = config.load(argv)
    with start("pretrain", cfg) as run:
        if run.rank == 0:
            data.ready_tokenizer(cfg, argv)
        run.wait()  # the others wait until it is there
        tok = data.ready_tokenizer(cfg, argv)
        cfg, model = fresh_or_loaded(cfg)
        if tok.vocab_size > cfg.vocab_size:
            raise UserError(f"the tokenizer has {tok.vocab_size} ids, and the model only "
                            f"vocab_size={cfg.vocab_size}: train another tokenizer, or another model")
        batches = data.Batches(cfg, tok, run.rank, run.world)
        run.cfg = cfg = replace(cfg, max_steps=cfg.max_steps or batches.steps())
        run.bytes_per_token = batches.bytes_per_token()
        run.prompts = {PROMPT: tok.encode(PROMPT)}
        run.say(f"{cfg.n_params:,} parameters, {cfg.max_steps:,} steps of {cfg.tokens_per_step:,} tokens, on "
                f"{run.world} x {run.device.type}")
        fit(cfg, run, model, tok, (batches, loss_fn))


if __name__ == "__main__":
    config.command(main)

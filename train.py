"""
train.py: the training loop, and pretraining.

One step: read a batch, let the model predict every next token, measure how surprised it was by the right ones
(the loss), and move every weight a little in the direction that would have surprised it less:

    loss = sum of -log p(target)    gradient = d loss / d weights / number of targets    weights -= lr * ...

The same loop trains all stages. They differ in two things: get_batch(split, i), which rows come next, and
loss_fn(model, batch), which returns (loss summed, number of targets, {name: sum}). Sums are added over the
parts of a batch and over devices and divided once, so how a batch is cut up cannot change what is learned.
A sum for the log that has a divisor of its own is a pair, {name: (sum, count)}.

Running the same command again resumes from the newest checkpoint. Ctrl-C finishes the step and saves.

    python train.py config/demo.py                                              pretrain on one device
    python train.py config/demo.py --max_seconds=600                            as far as ten minutes go
    torchrun --standalone --nproc_per_node=8 train.py config/smol_135m.py       on eight       next: sample.py
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from tqdm import tqdm

import config
import data
from config import Config, UserError
from model import IGNORE, SmolLM, rope_tables
from plumbing import checkpoint, shards
from plumbing.processes import Run, bar_text, command, escape_controls, start
from sample import continuations
from tokenizer import Tokenizer, load_or_train

PROMPT = "Once upon a time"
FEW_STEPS = 20  # a run of fewer is warned about
SAMPLE = dict(max_new_tokens=60, temperature=0.6, top_p=0.92)  # of the samples printed during training

# ---------------------------------------------------------------------------------------------------------
# what a step is made of


def loss_fn(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, dict]:
    """Pretraining: every next token is a target. batch = (ids, targets, doc, ...), (B, T) each."""
    ids, targets, doc = batch[:3]
    return -model(ids, targets, doc).sum(), (targets != IGNORE).sum(), {}


def plain_step(model: nn.Module, optimizers: list[Optimizer], batch: tuple[Tensor, ...], loss_fn: Callable,
               lr: float, grad_clip: float) -> float:
    """One optimizer step, in the lines that matter. train_step does the same for several micro-batches and
    processes, and keeps a log."""
    for optimizer in optimizers:
        optimizer.zero_grad()  # backward adds to the gradients that are there
        for group in optimizer.param_groups:
            group["lr"] = lr
    loss, count, _ = loss_fn(model, batch)  # how surprised the model is by the right tokens, summed
    (loss / count).backward()  # for each weight: how the mean surprise changes with it
    # All gradients together are one long vector. If it is longer than grad_clip, it is shortened to that, in
    # the same direction: one odd batch must not undo the work of many.
    clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        optimizer.step()  # each weight against its gradient
    return loss.item() / count.item()


def lr_at(step: float, cfg: Config) -> float:
    """The learning rate of step 0, 1, 2, ... of max_steps.

    There are two schedules, wsd and cosine. Both begin with a linear warm-up: at first every step changes the
    model so much that the next gradient points elsewhere, and AdamW's averages rest on few steps. As in
    nanotron, SmolLM's trainer, a warm-up starts at 0: its first step changes no weight. Both end near 0. A
    large rate goes far, but every step also follows the noise of its batch, so the weights jitter around the
    place where they belong. In the decay, with ever smaller steps, they settle.

    wsd      SmolLM's: warm-up, stable, decay by 1 - sqrt, the best of several shapes (Hägele et al. 2024). A
             run can be extended from the end of its stable part; a cosine must know its end in advance
    cosine   warm-up, then half a cosine down to 0
    """
    if step <= cfg.warmup and cfg.warmup:
        return cfg.lr * step / cfg.warmup
    if cfg.schedule == "cosine":
        return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / (cfg.max_steps - cfg.warmup)))
    start = cfg.max_steps - cfg.decay
    return cfg.lr if step < start else cfg.lr * (1 - math.sqrt((step - start) / cfg.decay))


def make_optimizers(model: nn.Module, cfg: Config) -> list[Optimizer]:
    """AdamW on everything, weight decay included, as SmolLM used it; or Muon on the matrices inside the
    blocks, and AdamW on the rest. SmolLM was trained before Muon existed. The embedding stays with AdamW, as
    Muon's authors advise: a row of it belongs to one token, and Muon (below) would mix rows that have
    nothing to do with each other. AdamW scales each number alone, so rare tokens are not left behind.

    AdamW keeps two averages over the last steps for each parameter: of its gradient, in which the noise of
    single batches cancels (momentum), and of the square. It moves the parameter by lr * the first / the root
    of the second: by about lr, whatever the scale of the gradient, and less where the sign keeps changing.
    Weight decay multiplies it by 1 - lr * weight_decay, 0.99994 in the demo: a weight that no gradient holds
    up goes to 0 in a long run. Small weights make a smoother function, which changes less between similar
    texts.
    """
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items()
                if cfg.optimizer == "muon" and ".layers." in name and p.ndim == 2}
    others = [p for name, p in named.items() if name not in matrices]
    optimizers: list[Optimizer] = [
        torch.optim.AdamW(others, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=1e-8,
                          weight_decay=cfg.weight_decay, fused=True)]
    if matrices:
        optimizers.append(Muon(list(matrices.values()), cfg.lr, cfg.weight_decay, getattr(torch, cfg.dtype)))
    return optimizers


def orthogonalize(G: Tensor) -> Tensor:
    """Matrices G = U S V^T (N, a, b), a <= b -> approximately U V^T: all singular values become about 1.
    (Linear algebra: skip it at a first reading. Muon, below, says what it is good for.)

    U and V hold the directions of output and input, S the singular values. X X^T X = U S^3 V^T: products of
    this kind change the singular values alone. So p(X) = 3.4445 X - 4.7750 X X^T X + 2.0315 (X X^T)^2 X turns
    each value s into 3.4445 s - 4.7750 s^3 + 2.0315 s^5. Applied five times, this moves every value from 0.01
    to 1 into 0.7 to 1.2, with nothing but matrix products (Newton-Schulz; Jordan et al. 2024).
    """
    X = G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value is above 1
    for _ in range(5):
        A = X @ X.mT                                                           # (N, a, a)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return X


class Muon(Optimizer):
    """Average the gradients of a matrix (momentum 0.95) and replace the average by the nearest orthogonal
    matrix (Jordan et al. 2024). At a first reading, its idea is enough:

    A matrix maps certain directions of its input to directions of its output, each with a strength, its
    singular value. In an averaged gradient a few directions are strong, those that nearly every text needs,
    and many are weak, such as those of rare facts. An orthogonal matrix has strength 1 in all of them. So the
    weights move as far in rare directions as in common ones.

    Details: an orthogonal matrix has numbers of size 1 / sqrt(longer side), and AdamW's updates, at most
    about 1, have a size of about 0.2 where signs change: the factor 0.2 sqrt(longer side) makes one lr serve
    both (Moonlight, Liu et al. 2025). Matrices of one shape are computed together, in `dtype`: bfloat16 is
    exact enough, since the polynomial repairs what rounding spoils.
    """

    def __init__(self, parameters: list, lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), parameters in by_shape.items():
                updates = []
                for p in parameters:
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    average = self.state[p]["momentum_buffer"]
                    average.lerp_(p.grad, 0.05)
                    # Nesterov: the average one step ahead
                    updates.append(p.grad.lerp(average, 0.95).to(self.dtype))
                G = torch.stack(updates)                                           # (N, rows, columns)
                G = orthogonalize(G) if rows <= columns else orthogonalize(G.mT).mT
                scale = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for p, update in zip(parameters, G):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


# ---------------------------------------------------------------------------------------------------------
# the same step for a batch in parts and for several processes, and the loop; skip the rest at a first reading


def as_pairs(loss: Tensor, count: Tensor | int, sums: dict) -> dict[str, tuple]:
    """What loss_fn returns -> {name: (sum, what it is divided by)}; of a plain sum, by count."""
    pairs = {name: value if isinstance(value, tuple) else (value, count) for name, value in sums.items()}
    return {"loss": (loss.detach(), count), **pairs}


def add_up(parts: list[dict[str, tuple]], run: Run) -> dict[str, tuple[float, float]]:
    """{name: (sum, count)} of each micro-batch -> the same over all of them and all processes, as numbers.

    A name may be missing in some, for example where a source has no row: it is (0, 0) there.
    """
    names = run.union(name for part in parts for name in part)
    rows = [torch.stack([torch.as_tensor(value, device=run.device).float()
                         for name in names for value in part.get(name, (0, 0))]) for part in parts]
    totals = run.sum(torch.stack(rows).cpu().double().sum(0)).tolist()
    return dict(zip(names, zip(totals[::2], totals[1::2]), strict=True))


def means_of(totals: dict[str, tuple[float, float]]) -> dict[str, float]:
    """{name: sum / count}, without the names that nothing was counted for."""
    return {name: total / count for name, (total, count) in totals.items() if count}


def train_step(step: int, lr: float, cfg: Config, run: Run, net: nn.Module, optimizers: list[Optimizer],
               get_batch: Callable, loss_fn: Callable) -> dict[str, float]:
    """plain_step for a batch in parts: step counts from 0; returns the step's line for the log.

    The gradient of a sum is the sum of the gradients. So each micro-batch adds the gradient of its summed
    loss, and one division by the number of targets, of all micro-batches and processes, makes the mean exact.
    DDP averages the gradients over the processes; multiplying by their number (world) turns that back into a
    sum.
    """
    micro_steps, parts, began = cfg.micro_steps(run.world), [], time.perf_counter()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = lr
    for m in range(micro_steps):
        if run.world > 1:  # exchange gradients once per step, not once per micro-batch
            net.require_backward_grad_sync = m == micro_steps - 1  # type: ignore[assignment]
        with run.autocast():
            batch = run.move(get_batch("train", step * micro_steps + m))
            loss, count, sums = loss_fn(net, batch)
        loss.backward()
        # count is what the loss is averaged over: targets here, pairs in dpo.py. The log shows tokens, too.
        parts.append(as_pairs(loss, count, sums | {"tokens": ((batch[1] != IGNORE).sum(), 1)}))
    total = add_up(parts, run)
    (total_loss, count), (tokens, _) = total["loss"], total.pop("tokens")
    where = f"step {step + 1} (draws {step * cfg.batch} to {(step + 1) * cfg.batch - 1} of the run)"
    if not count:
        raise UserError(f"{where} has no target at all: there is nothing to learn in these rows")
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad.mul_(run.world / count)
    norm = clip_grad_norm_(parameters, cfg.grad_clip).item()
    if not math.isfinite(total_loss) or not math.isfinite(norm):
        raise UserError(f"{where}: the loss is {total_loss / count} and the gradient's norm {norm}; "
                        "nothing was updated. Lower --lr, or look at these rows: python -m learn.look rows "
                        f"with the preset and flags of this run, and --step={step + 1}")
    for optimizer in optimizers:
        optimizer.step()
    seconds = time.perf_counter() - began
    # a row is computed whole, whatever its targets; those of pairs (dpo.py) have lengths of their own
    rows = cfg.batch / run.world if batch[0].shape == (cfg.micro_batch, cfg.seq_len) else 0
    return {"step": step + 1, **means_of(total), "lr": lr, "grad_norm": norm,
            "tokens": int(tokens), "tokens_per_second": tokens / seconds, "seconds": seconds,
            **run.usage(rows * cfg.seq_len * cfg.flops_per_token / seconds)}


@torch.no_grad()
def evaluate(cfg: Config, run: Run, net: nn.Module, get_batch: Callable, loss_fn: Callable,
             bytes_per_token: float = 0.0) -> dict[str, float]:
    """Means over the first eval_batches batches of validation rows: {"val_loss": ...}; {} without rows."""
    parts = []
    for i in range(cfg.eval_batches * cfg.micro_steps(run.world)):
        batch = get_batch("val", i)
        if batch is None:
            break
        with run.autocast():
            loss, count, sums = loss_fn(net, run.move(batch))
        parts.append(as_pairs(loss, count, sums))
    if not parts:
        return {}
    means = {f"val_{name}": mean for name, mean in means_of(add_up(parts, run)).items()}
    if bytes_per_token:  # a loss per token depends on the tokenizer, bits per byte do not; 1 bit = ln 2 nats
        means["val_bits_per_byte"] = means["val_loss"] / math.log(2) / bytes_per_token
    return means


# ---------------------------------------------------------------------------------------------------------
# the loop


def fit(cfg: Config, run: Run, model: SmolLM, tok: Tokenizer, get_batch: Callable, loss_fn: Callable,
        prompts: dict[str, list[int]], bytes_per_token: float = 0.0) -> None:
    """Train from the newest checkpoint to cfg.max_steps. prompts: {text: ids} to sample while training.

    run is this process: its device, its number among others (rank of world), its folder, and what it says.
    """
    # auto depends on the machine; the checkpoint records what it was
    cfg = replace(cfg, dtype=run.dtype)  # type: ignore[arg-type]
    model.to(run.device)
    optimizers = make_optimizers(model, cfg)
    first, facts = checkpoint.resume(run, cfg, model, tok, optimizers)
    log = checkpoint.Log(run, first)
    clock = Clock(cfg, run, log.elapsed)
    if clock.is_over(first):
        limit = f"max_seconds={cfg.max_seconds:g}" if cfg.max_seconds else f"max_steps={cfg.max_steps}"
        run.say(f"nothing is left to do: {run.folder} has {first} steps, and {limit}")
        write_card(run, model, tok)
        return
    if cfg.compile:
        x = torch.zeros(cfg.micro_batch, cfg.seq_len, cfg.d_model, device=run.device)
        rope = rope_tables(torch.arange(cfg.seq_len, device=run.device), cfg.head_dim, cfg.rope_theta)
        run.compile(model.model.layers, x, rope)
    if run.peak is None and run.device.type != "cpu":
        run.say(f"the log has no MFU, the share of the peak: that of this {run.device.type} is unknown")
    if cfg.max_steps < FEW_STEPS and not cfg.max_seconds:
        run.say(f"only {cfg.max_steps} step{'s' * (cfg.max_steps > 1)}: a model hardly changes in so few; a "
                "lower --batch, more --epochs or --max_steps make more")
    net, moved = in_parallel(model, run, get_batch, loss_fn), False
    bar = tqdm(count(first + 1), run.stage, None if cfg.max_seconds else cfg.max_steps, initial=first,
               disable=run.rank > 0, mininterval=0.5)
    with run.signals(), run.prefetch(get_batch) as get_batch:
        for step in bar:
            # fit counts finished steps from 1, train_step from 0
            lr = lr_at(clock.position(step - 1), cfg)
            line = train_step(step - 1, lr, cfg, run, net, optimizers, get_batch, loss_fn)
            last, moved = clock.is_over(step), moved or line["lr"] * line["grad_norm"] > 0
            if last or is_due(step, cfg.eval_every):
                line |= evaluate(cfg, run, net, get_batch, loss_fn, bytes_per_token)
                values = [f"{name} {line[name]:.3f}" for name in line if "loss" in name or "val" in name]
                run.say(f"step {step}: {', '.join(values)}")
            log.write(line | {"elapsed": clock.elapsed()})
            left = {"s_left": max(0.0, cfg.max_seconds - clock.now)} if cfg.max_seconds else {}
            bar.set_postfix_str(bar_text(line | left))
            if is_due(step, cfg.sample_every) and run.rank == 0:
                with torch.compiler.set_stance("force_eager"):  # or each length would be compiled again
                    for prompt, ids in prompts.items():
                        text = continuations(model, tok, ids, 1, dict(SAMPLE, seed=cfg.seed))[0]
                        run.say(f"    {prompt} | {escape_controls(text)}")
            stop = run.must_stop()
            if last or stop or is_due(step, cfg.save_every):
                checkpoint.save_step(step, run, model, tok, optimizers, facts, cfg.keep_checkpoints)
            if stop and not last:
                run.wait()  # for rank 0 to save: once a process ends, torchrun gives the others 30 seconds
                bar.close()
                run.say(f"stopped after step {step}, which is saved; the same command resumes")
                sys.exit(128 + stop)  # stop is the signal's number: the convention of shells
            if last:
                bar.close()
                break
        write_card(run, model, tok)
    run.say(f"done: {run.folder}" + ("" if moved else "; nothing was learned: every gradient was 0"))


# ---------------------------------------------------------------------------------------------------------
# around the loop: the end of a run, its clock, several processes


def write_card(run: Run, model: SmolLM, tok: Tokenizer) -> None:
    """The model card of a finished run, unless it has one."""
    from plumbing import card  # here, since only a run that ends needs it
    if run.rank > 0:  # perhaps rank 0 is still saving
        return
    folder = checkpoint.find(run.folder)
    if not (folder / "README.md").exists():
        card.write(folder, model, tok)


class Clock:
    """When a run ends, and how far it has come: by its steps, or with max_seconds by its time.

    With max_seconds nobody knows how many steps there will be. So the schedule gets a position as if the run
    had max_steps: after a third of the time it is where a run of max_steps is after a third of its steps.
    Evaluating and saving count as well, and so does what an interrupted run had used up to its checkpoint.
    """

    def __init__(self, cfg: Config, run: Run, used: float) -> None:
        self.cfg, self.run, self.began, self.now = cfg, run, time.perf_counter() - used, used

    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def position(self, steps: int) -> float:
        """Where the schedule is after so many steps."""
        limit = self.cfg.max_seconds
        return min(1.0, self.now / limit) * self.cfg.max_steps if limit else steps

    def is_over(self, steps: int) -> bool:
        """Whether the run ends after so many steps. The clock of rank 0 decides for all processes."""
        if not self.cfg.max_seconds:
            return steps >= self.cfg.max_steps
        self.now = float(self.run.sum(torch.tensor(self.elapsed() if self.run.rank == 0 else 0.0)))
        return self.now >= self.cfg.max_seconds


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def in_parallel(model: SmolLM, run: Run, get_batch: Callable, loss_fn: Callable) -> nn.Module:
    """The model, or DistributedDataParallel (DDP) around it, which averages the gradients of several
    processes.

    DDP fixes its reduction order during the first backward pass. Run one here and discard it, so that a
    resumed run is bit-identical to an uninterrupted one.
    """
    if run.world == 1:
        return model
    net = DistributedDataParallel(model)
    with run.autocast():
        loss = loss_fn(net, run.move(get_batch("train", 0)))[0]
    loss.backward()
    return net


# ---------------------------------------------------------------------------------------------------------
# pretraining


def main(argv: list[str]) -> None:
    cfg = config.load(argv)
    with start("pretrain", cfg) as run:
        cfg, model = checkpoint.initial_model(cfg)
        run.rank_0_first(lambda: shards.prepare(cfg, argv))
        tok = load_or_train(cfg)
        if tok.vocab_size > cfg.vocab_size:
            raise UserError(f"the tokenizer has {tok.vocab_size} ids, and the model only vocab_size="
                            f"{cfg.vocab_size}: train another tokenizer, or another model")
        batches = data.Batches(cfg, tok, run.rank, run.world)
        cfg = replace(cfg, max_steps=cfg.max_steps or data.n_steps(cfg, batches.n_rows()))
        n_params = sum(weight.numel() for weight in model.parameters())
        run.say(f"{n_params:,} parameters, {cfg.length}, {cfg.tokens_per_step:,} tokens per step, on "
                f"{run.world} x {run.device.type} in {run.dtype}")
        fit(cfg, run, model, tok, batches, loss_fn, {PROMPT: tok.encode(PROMPT)}, batches.bytes_per_token())


if __name__ == "__main__":
    command(main)

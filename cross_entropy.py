"""
cross_entropy.py: head and loss together, with the gradient written by hand.

The head gives a position a score (logit) for each id of the vocabulary; a loss wants one number of them:

    log p(target) = logit of target - log sum exp(logits)       its gradient: onehot(target) - softmax(logits)

With 49,152 ids the logits are the largest thing in training: 3.2 GB for 8 rows of 2,048 ids, and autograd
would keep them several times. So they are made for some positions at a time, turned into their gradient in
place, and forgotten: the memory grows with that chunk, and not with the batch.

The gradients are then ready before the loss is, as if it were the plain sum of all log-probabilities. For
a loss that is the sum times a number, as in train.py and sft.py, one product mends that. For any other, as
in dpo.py, the backward pass makes the logits a second time.                                 next: model.py
"""

# N positions, n of them in a chunk, C = d_model, V vocabulary

from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # the target of a position where nothing is learnt
LOGITS_AT_ONCE = 2**24  # how many logits exist at a time in training: 64 MiB in float32


@torch.compiler.disable  # a compiler would unroll the chunks, for minutes, and gain nothing
def target_log_probs(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """log softmax(x head^T)[target], 0 where the target is IGNORE: x (N, C), head (V, C), targets (N) -> (N).

    Under autocast the logits are rounded to its dtype; all behind them is float32.
    """
    if torch.is_grad_enabled():
        return TargetLogProbs.apply(x, head, targets)
    x, head = matmul_dtype(x, head)
    room = buffers(x, head)
    return torch.cat([log_softmax(x[part], head, targets[part], room)[1] for part in chunks(x, room)])


def matmul_dtype(x: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Both as autocast casts them for a product: it does not reach into an autograd.Function."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return x.to(dtype), head.to(dtype)


def buffers(x: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Room for LOGITS_AT_ONCE logits, those of a chunk, and for their logarithms; used again for each chunk,
    since taking fresh memory costs as much time as writing it."""
    n = max(1, min(len(x), LOGITS_AT_ONCE // len(head)))
    return x.new_empty(n, len(head)), x.new_empty((n, len(head)), dtype=wide(x))


def chunks(x: Tensor, room: tuple[Tensor, Tensor]) -> list[slice]:
    """Slices of the N positions, as many at a time as there is room for."""
    n = len(room[0])
    return [slice(i, i + n) for i in range(0, len(x), n)]


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums and logarithms: float32, or float64 of a float64 model."""
    return torch.promote_types(x.dtype, torch.float32)


def log_softmax(x: Tensor, head: Tensor, targets: Tensor,
                room: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all ids (n, V), in the second part of room, and of the targets (n)."""
    logits, logs = (whole[:len(x)] for whole in room)
    torch.mm(x, head.T, out=logits)
    torch.log_softmax(logits.to(logs.dtype), dim=1, out=logs)
    of_targets = logs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return logs, torch.where(targets == IGNORE, 0, of_targets)


def add_gradients(weight: Tensor, logs: Tensor, x: Tensor, head: Tensor, targets: Tensor, d_x: Tensor,
                  d_head: Tensor) -> None:
    """The gradients of sum(weight * log p(target)): write d_x (n, C), add to d_head (V, C).

    logs (n, V) becomes d loss / d logits in place. weight (n) is 0 where the target is IGNORE.
    """
    d_logits = logs.exp_().mul_(-weight[:, None])
    d_logits.scatter_add_(1, targets.clamp(min=0)[:, None], weight[:, None])
    if x.dtype == d_head.dtype:
        d_head.addmm_(d_logits.T, x)
    else:
        d_logits = d_logits.to(x.dtype)
        d_head += d_logits.T @ x
    torch.mm(d_logits, head, out=d_x)


def log_probs_and_gradients(weight: Tensor, x: Tensor, head: Tensor,
                            targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target) (N), and the gradients of sum(weight * log p(target)): d_x (N, C), d_head (V, C)."""
    found, room = x.new_empty(len(x), dtype=wide(x)), buffers(x, head)
    d_x, d_head = torch.empty_like(x), torch.zeros_like(head, dtype=found.dtype)
    for part in chunks(x, room):
        logs, found[part] = log_softmax(x[part], head, targets[part], room)
        add_gradients(weight[part], logs, x[part], head, targets[part], d_x[part], d_head)
    return found, d_x, d_head


class TargetLogProbs(torch.autograd.Function):
    """target_log_probs, differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        ctx.dtypes = x.dtype, head.dtype
        x, head = matmul_dtype(x, head)
        learnt = (targets != IGNORE).to(wide(x))
        found, d_x, d_head = log_probs_and_gradients(learnt, x, head, targets)
        ctx.save_for_backward(x, head, targets, learnt, d_x, d_head)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        """weight: d loss / d log p(target), (N)."""
        x, head, targets, learnt, d_x, d_head = ctx.saved_tensors
        weight = weight * learnt
        factor: Tensor | int = weight[learnt.argmax()]  # that of a position with a target
        if not torch.equal(weight, factor * learnt):
            _, d_x, d_head = log_probs_and_gradients(weight, x, head, targets)
            factor = 1
        return (d_x * factor).to(ctx.dtypes[0]), d_head.mul_(factor).to(ctx.dtypes[1]), None

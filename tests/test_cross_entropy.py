"""cross_entropy.py against the plain formula in float64, and what it keeps in memory."""


import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cross_entropy
from cross_entropy import IGNORE, target_log_probs

V, C, N = 300, 24, 40


@pytest.fixture(params=[7, 100], ids=["chunks of 7", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", V * request.param + 1)


def numbers(dtype, n=N):
    random = torch.Generator().manual_seed(0)
    x, head = torch.randn(n, C, generator=random), torch.randn(V, C, generator=random) / 4
    targets = torch.randint(0, V, (n,), generator=random)
    targets[::5] = IGNORE
    return *(t.to(dtype).requires_grad_() for t in (x, head)), targets


def plain(x, head, targets):
    logs = (x @ head.T).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets == IGNORE, 0, logs)


def with_gradients(function, dtype, loss_of):
    x, head, targets = numbers(dtype)
    found = function(x, head, targets)
    loss_of(found).backward()
    return found.detach().double(), x.grad.double(), head.grad.double()


WEIGHTS = torch.randn(N, generator=torch.Generator().manual_seed(1)).double()
LOSSES = {
    "sum": lambda found: -found.sum(),
    "mean": lambda found: found.mean(),
    "weighted": lambda found: (found * WEIGHTS).sum(),
    "one weight differs": lambda found: found.sum() + found[7],
    "one of two": lambda found: found[: N // 2].sum(),
    "not linear": lambda found: found.square().sum(),
    "no weight": lambda found: 0 * found.sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_the_plain_formula(chunk, dtype, loss):
    expected = with_gradients(plain, torch.float64, LOSSES[loss])
    found = with_gradients(target_log_probs, dtype, LOSSES[loss])
    for mine, exact in zip(found, expected):
        assert (mine - exact).norm() <= (1e-12 if dtype == torch.float64 else 1e-6) * exact.norm()


@pytest.mark.parametrize("loss", ["sum", "weighted"])
def test_under_autocast_they_agree_as_far_as_bfloat16_goes(chunk, loss):
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(target_log_probs, torch.float32, LOSSES[loss])
    expected = with_gradients(plain, torch.float64, LOSSES[loss])
    assert all(0 < (mine - exact).norm() < 0.01 * exact.norm() for mine, exact in zip(found, expected))


def test_without_gradients_the_values_are_the_same(chunk):
    x, head, targets = numbers(torch.float32)
    with torch.no_grad():
        found = target_log_probs(x, head, targets)
    assert found.dtype == torch.float32 and torch.equal(found, target_log_probs(x, head, targets))


def test_where_nothing_is_learnt_everything_is_0(chunk):
    x, head, targets = numbers(torch.float32)
    found = target_log_probs(x, head, torch.full_like(targets, IGNORE))
    found.sum().backward()
    assert not found.any() and not x.grad.any() and not head.grad.any()


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that any operation makes."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.size = max(self.size, made.numel())
        return made


@pytest.mark.parametrize("loss", ["sum", "weighted"])
def test_memory_grows_with_the_chunk_and_not_with_the_batch(monkeypatch, loss):
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_ONCE", V * 50)

    def largest(function, n):
        x, head, targets = numbers(torch.float32, n)
        weights = torch.arange(n) if loss == "weighted" else 1
        with Largest() as mode:
            (function(x, head, targets) * weights).sum().backward()
        return mode.size

    assert [largest(target_log_probs, n) for n in (100, 200, 400)] == [V * 50] * 3
    assert [largest(plain, n) for n in (100, 200, 400)] == [V * 100, V * 200, V * 400]

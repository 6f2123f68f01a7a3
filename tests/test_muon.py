"""Muon of train.py: next to torch.optim.Muon, and next to the singular values that it should leave."""

import pytest
import torch
from conftest import TINY
from torch import nn

from config import Config
from model import SmolLM
from train import Muon, make_optimizers, orthogonalize


def matrices(seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in ((12, 30), (30, 12), (12, 30), (20, 20), (1, 5))]


def test_its_steps_are_those_of_torchs_muon():
    """Three of the five matrices share a step of ours, if not their shape; torch takes them one at a time."""
    ours, theirs = matrices(), matrices()
    mine = Muon(ours, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16)
    yours = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        torch.manual_seed(step)
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        before = [p.detach().clone() for p in theirs]
        mine.step()
        yours.step()
        for a, b, old in zip(ours, theirs, before):  # both round to bfloat16, in another order
            assert (a - b).norm() < 0.02 * (b - old).norm() * (step + 1)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(mine.state[a]["momentum_buffer"], yours.state[b]["momentum_buffer"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_1_and_the_singular_vectors_stay(dtype):
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 16, generator=generator))[0] for n in (16, 40))
    S = torch.logspace(0, -1.5, 16)
    G = torch.stack((U * S @ V.T, 1000 * U * S.flip(0) @ V.T))
    found = orthogonalize(G.to(dtype)).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    rotated = U.T @ found @ V  # diagonal if the vectors are the same
    off = rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
    assert off.norm() < {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype] * rotated.norm()


def test_singular_values_after_five_times_are_those_of_the_papers_polynomial():
    G = torch.randn(1, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(G / G.norm())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(torch.linalg.svdvals(orthogonalize(G)).sort().values, s.abs().sort().values,
                               rtol=1e-5, atol=1e-5)


def test_an_update_is_as_large_as_adamws():
    """Its root mean square is about 0.2 of lr, whatever the shape: what AdamW's is in practice."""
    for rows, columns in ((64, 64), (64, 256), (256, 64)):
        p = nn.Parameter(torch.zeros(rows, columns))
        p.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        Muon([p], lr=0.5, weight_decay=0.0, dtype=torch.float32).step()
        assert p.square().mean().sqrt().item() / 0.5 == pytest.approx(0.2, rel=0.15)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else():
    cfg = Config(**TINY, optimizer="muon", dtype="float32")
    model = SmolLM(cfg)
    adamw, muon = make_optimizers(model, cfg)
    names = {p: name for name, p in model.named_parameters()}
    taken = {names[p] for group in muon.param_groups for p in group["params"]}
    assert taken == {name for name in names.values() if ".layers." in name and "norm" not in name}
    assert len(taken) == 7 * cfg.n_layer and muon.dtype == torch.float32
    rest = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert rest == set(names.values()) - taken

"""Any number of processes, any way of cutting a batch: the gradient is that of the complete batch."""

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from children import METHOD
from conftest import TINY
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

import dpo
import train
from config import Config
from model import IGNORE, RMSNorm, SmolLM
from plumbing.processes import Run

BATCH, T = 12, 100
CFG = Config(**TINY, seq_len=T, init_std=0.1, batch=BATCH, micro_batch=1, max_steps=9, decay_steps=1,
             grad_clip=1e9, dtype="float32")
N_TARGETS = [97, 3, 100, 1, 50, 7, 3, 97, 2, 64, 99, 5]  # of each row: no two processes have equally many


def some_rows(n):
    """ids, targets, doc (n, T); the targets of row i are its last N_TARGETS[i] positions."""
    ids = torch.randint(17, 300, (n, T + 1), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    for row, n_targets in enumerate(N_TARGETS * (n // BATCH)):
        targets[row, : T - n_targets] = IGNORE
    return ids[:, :-1].contiguous(), targets, torch.zeros(n, T, dtype=torch.long)


def chats(split, first, last):
    """Rows first to last of the batch."""
    return tuple(tensor[first:last] for tensor in some_rows(BATCH))


def pairs(split, first, last):
    """Pairs first to last: chosen above rejected, and the reference log-probabilities."""
    batch = (*some_rows(2 * BATCH), torch.linspace(-700, -600, 2 * BATCH, dtype=torch.float64))
    return tuple(torch.cat((tensor[first:last], tensor[BATCH + first : BATCH + last])) for tensor in batch)


STAGES = {"chats": (chats, train.loss_fn), "pairs": (pairs, partial(dpo.loss_fn, beta=0.3))}
CASES = [(stage, dtype, parts) for stage in STAGES for dtype in (torch.float64, torch.float32)
         for parts in ("one part", "many parts")]


def gradient(case, rank, world):
    """{name: gradient} of the first step in this process."""
    stage, dtype, parts = case
    rows, loss_fn = STAGES[stage]
    B = BATCH // world if parts == "one part" else 1
    cfg = replace(CFG, micro_batch=B)
    torch.manual_seed(rank)  # DDP copies the weights of process 0 to all
    model = SmolLM(cfg).to(dtype)
    for norm in model.modules():  # it computes in float32, whatever the model's dtype
        if isinstance(norm, RMSNorm) and dtype == torch.float64:
            norm.forward = partial(torch.rms_norm, normalized_shape=[cfg.d_model], weight=norm.weight,
                                   eps=norm.eps)
    net = DistributedDataParallel(model) if world > 1 else model

    def get_batch(split, i):
        first = (i * world + rank) * B
        return rows(split, first, first + B)

    sgd = [torch.optim.SGD(model.parameters(), lr=1.0)]
    run = Run("x", Path("x"), rank=rank, world=world)
    line = train.train_step(0, train.lr_at(0, cfg), cfg, run, net, sgd, get_batch, loss_fn)
    facts = torch.tensor([line["loss"], line["grad_norm"], line["tokens"]], dtype=torch.float64)
    return {name: p.grad for name, p in model.named_parameters()} | {"loss, norm, tokens": facts}


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", (folder / "meeting").as_uri(), rank=rank, world_size=world)
    for number, case in enumerate(CASES):
        save_file(gradient(case, rank, world), folder / f"{number}_{rank}.safetensors")
    Run("x", folder, rank=rank, world=world).wait()
    gc.collect()  # DDP refers to itself; freed after the process group, it could wait forever
    dist.destroy_process_group()


def compare(found, case):
    """Compare the gradient, and what the log says, with those of the complete batch in one process."""
    stage, dtype, _ = case
    alone = gradient((stage, dtype, "one part"), 0, 1)
    facts = "loss, norm, tokens"
    torch.testing.assert_close(found.pop(facts), alone.pop(facts), rtol=1e-5, atol=0)  # sums in float32
    difference = sum((found[name] - alone[name]).square().sum() for name in alone).sqrt()
    size = sum(tensor.square().sum() for tensor in alone.values()).sqrt()
    assert difference / size < (1e-9 if dtype == torch.float64 else 1e-5), case


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_gradient_does_not_depend_on_the_number_of_processes_and_parts(world, tmp_path):
    start_processes(worker, (world, tmp_path), world, start_method=METHOD)
    for number, case in enumerate(CASES):
        for rank in range(world):
            compare(load_file(tmp_path / f"{number}_{rank}.safetensors"), case)


def one_of_three(rank, folder):
    """Process 0 has two micro-batches, process 2 knows other names than process 0."""
    dist.init_process_group("gloo", (folder / "meeting").as_uri(), rank=rank, world_size=3)
    parts = [[{"loss": (1.0, 2)}, {"loss": (2.0, 2), "a source": (5.0, 1)}],
             [{"loss": (4.0, 4)}],
             [{"ä": (7.0, 3), "loss": (8.0, 8), "a source": (1.0, 1)}]][rank]
    total = train.add_up(parts, Run("x", folder, rank=rank, world=3))
    (folder / str(rank)).write_text(repr(total), encoding="utf-8")
    dist.destroy_process_group()


def test_processes_may_have_sums_of_other_names(tmp_path):
    """As the loss of each source has, when not every process draws a row of every source in a step."""
    start_processes(one_of_three, (tmp_path,), 3, start_method=METHOD)
    expected = {"loss": (15.0, 16.0), "a source": (6.0, 2.0), "ä": (7.0, 3.0)}
    assert {(tmp_path / str(rank)).read_text(encoding="utf-8") for rank in range(3)} == {repr(expected)}


@pytest.mark.parametrize("case", CASES)
def test_alone_the_gradient_does_not_depend_on_the_number_of_parts(case):
    compare(gradient(case, 0, 1), case)

"""
run.py: what surrounds a training loop: the device, the other processes, signals, checkpoints, the log.

Nothing here is about learning; a reader may skip it. torchrun starts one process for each GPU and tells it
who it is (rank) among how many (world).                                                     next: train.py
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.optim import Optimizer
from tqdm import tqdm

from plumbing import checkpoint
from config import Config, UserError
from model import SmolLM
from tokenizer import Tokenizer

# what belongs to weights: another value would need other weights, or, of rope_theta, more training
SHAPE = "vocab_size n_layer n_head n_kv_head d_model d_ff rope_theta norm_eps tie_embeddings".split()
PATIENCE = timedelta(minutes=30)  # how long a process waits for the others before it gives up


def pick_device(name: str) -> torch.device:
    """auto -> the best there is; raises UserError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise UserError(f"device={name} is not available on this machine: use cpu or auto")
    return torch.device(name)


@dataclass
class Run:
    """Where a stage runs: its folder, this process among all, its device."""

    stage: str
    cfg: Config
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    prompts: dict = field(default_factory=dict)  # of the samples printed on the way: text -> ids
    bytes_per_token: float = 0.0  # of the validation text; 0: unknown
    stop: int = 0  # the signal that asked this process to stop after its step

    @property
    def folder(self) -> Path:
        return Path(self.cfg.out_dir) / self.stage

    def autocast(self) -> torch.autocast:
        """bfloat16 for matrix products, float32 for the rest; or float32 for everything."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16")

    def move(self, batch: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)

    def say(self, text: str) -> None:
        if self.rank == 0:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except BrokenPipeError:  # nobody reads any more, as behind `| head`: save, and end
                sys.stdout, self.stop = open(os.devnull, "w", encoding="utf-8"), signal.SIGTERM

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """Part from the other processes."""
        if self.world > 1:
            gc.collect()  # DDP holds itself; where it was the last to hold the group, both could wait forever
            dist.destroy_process_group()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While this holds, Ctrl-C and SIGTERM set `stop`, and the step in progress ends well; a second one
        ends the process at once."""
        def ask(number, frame):
            self.stop = number
            signal.signal(number, signal.SIG_DFL)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def start(stage: str, cfg: Config) -> Iterator[Run]:
    """The Run of this process, alone or under torchrun, and no second one in the same folder while it holds.
    Raises UserError for what this machine cannot do."""
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = pick_device(cfg.device)
    cfg.micro_steps(world)
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # after a restart, torchrun's store still holds the addresses of the processes that ended
        store, _, _ = next(rendezvous("env://", rank, world, timeout=PATIENCE))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE, store=store,
                                rank=rank, world_size=world)
    run = Run(stage, cfg, rank, world, device)
    with checkpoint.lock(run.folder / "lock") if rank == 0 else nullcontext():
        yield run
        run.leave()


def compile_blocks(model: SmolLM, run: Run) -> None:
    """torch.compile, where it works: it needs a compiler, which a laptop may not have.

    The blocks are alike: one is compiled and serves for all, in seconds instead of minutes. The model stays
    the object that it was, and so do the names of its parameters.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=run.device))
    except Exception as error:
        run.say(f"training without torch.compile, which does not work here: {str(error).splitlines()[0]}")
        return
    run.say("compiling a block of the model: the first step takes longer")
    for block in model.model.layers:
        block.compile()


def save(step: int, run: Run, model: SmolLM, tok: Tokenizer, optimizers: list[Optimizer]) -> None:
    """Process 0 writes the checkpoint of `step` steps; then old ones are removed."""
    folder = run.folder / f"step_{step:07}"
    if run.rank == 0:
        versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
        checkpoint.save_step(folder, model, tok, optimizers,
                             {"step": step, "config": asdict(run.cfg), "versions": versions})
        checkpoint.prune(run.folder, run.cfg.keep_checkpoints)


def resume(run: Run, model: SmolLM, tok: Tokenizer, optimizers: list[Optimizer]) -> int:
    """Load the newest whole checkpoint of the stage into model and optimizers; returns its step, or 0.
    Raises UserError where its ids or its numbers would get another meaning."""
    if run.rank == 0:
        for sentence in checkpoint.set_aside_damaged(run.folder):
            run.say(f"warning: {sentence}")
    run.wait()
    if not checkpoint.steps(run.folder):
        return 0
    step, folder = checkpoint.steps(run.folder)[-1]
    before = checkpoint.read_json(folder / "train.json")["config"]
    now = json.loads(json.dumps(asdict(run.cfg)))
    changed = {name: f"{name} {before[name]} -> {now.get(name)}" for name in before
               if before[name] != now.get(name)}
    if wrong := [changed[name] for name in SHAPE if name in changed]:
        raise UserError(f"{folder} is another model ({', '.join(wrong)}): choose another --out_dir")
    if Tokenizer.load(folder).digest() != tok.digest():
        raise UserError(f"{folder} was trained with another tokenizer: go on with --tokenizer={folder}, or "
                        "choose another --out_dir")
    changes = f", with changes: {', '.join(changed.values())}" if changed else ""
    run.say(f"continuing from {folder}{changes}")
    checkpoint.load_step(folder, model, optimizers)
    return step


def step_of(line: str) -> float:
    """The step of a line of the log; infinity for a line that is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")


class Log:
    """log.jsonl: one object a step. On resuming, lines behind the checkpoint are cut off."""

    def __init__(self, run: Run, step: int) -> None:
        self.path = run.folder / "log.jsonl" if run.rank == 0 else None
        if self.path and self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            checkpoint.write(self.path, "".join(f"{line}\n" for line in lines if step_of(line) <= step))

    def write(self, line: dict) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")

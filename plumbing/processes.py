"""
plumbing/processes.py: how a command starts and ends: its errors, its device, its signals, and the other
processes.

torchrun starts one process per GPU and tells each one who it is (rank) among how many (world).
"""

import gc
import math
import os
import platform
import re
import shlex
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

import config
from config import Config, UserError
from plumbing import disk

AHEAD = 2  # batches of each split that are made before they are needed
PATIENCE = timedelta(minutes=30)  # how long a process waits for the others in a step before it gives up

# ---------------------------------------------------------------------------------------------------------
# a command


def command(main: Callable[[list[str]], Any], own_help: bool = False) -> None:
    """Run main(argv): --help prints the docstring and the fields; a user's mistake exits with code 2."""
    argv = sys.argv[1:]
    open_streams()
    try:
        if {"--help", "-h"} & set(argv) and not own_help:
            presets = [word for word in argv if not word.startswith("-")][:1]
            print(sys.modules["__main__"].__doc__.strip(), "\n\nfields, with their values:\n")
            print(config.field_help(config.load_preset(presets[0]) if presets else Config()))
        else:
            main(argv)
    except BrokenPipeError:  # the reader of our output has ended, as `head` does
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        sys.exit(141)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if "allocate" not in str(error):  # the word that torch (on any device) and numpy use
            raise
        print(f"error: there is not enough memory: {str(error).splitlines()[0]}\n"
              "lower --micro_batch, or choose a smaller model", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


BAR = {"loss": "loss {:.3f}", "tokens_per_second": "{:,.0f} tok/s", "mfu": "MFU {:.0%}",
       "peak_gb": "{:.1f} GB", "s_left": "{:.0f} s left"}


def bar_text(line: dict[str, float]) -> str:
    """What a progress bar shows of a line of the log: "loss 2.345, 11,072 tok/s, MFU 41%, 5.2 GB"."""
    return ", ".join(form.format(line[name]) for name, form in BAR.items() if name in line)


def open_streams() -> None:
    """Characters that the terminal lacks are printed as "?", and a closed stream is replaced by an empty
    one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# What a model writes could steer a terminal: escape sequences, a bell, text that runs backwards.
HARMLESS: dict[int, str | int] = {code: "\N{REPLACEMENT CHARACTER}" for code in (
    *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
HARMLESS |= {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}  # their pictures


def escape_controls(text: str) -> str:
    """Text that is safe in a terminal, with control characters as pictures: "\\x1b[2J" -> "␛[2J"."""
    return text.translate(HARMLESS)


def pick_device(name: str) -> torch.device:
    """auto -> the best device there is. Raises UserError for one that is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available.get(name):
        raise UserError(f"device={name} is not available on this machine: use cpu or auto")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> str:
    """auto -> bfloat16 where the device has instructions for it: elsewhere a CPU is several times slower."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has: Any = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not say
        fast = device.type == "cpu" and any(map(has.get, ("avx512_bf16", "amx_bf16", "bf16")))
    return "bfloat16" if fast else "float32"


# Dense bfloat16 operations per second of a card's matrix units, accumulated in float32, as its maker states
# them: in words that must all occur in the card's name, the more special first. Apple does not state any.
PEAKS: dict[str, float] = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L20": 119.5e12, "L4": 121e12, "RTX 5090": 209.5e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_of(name: str) -> float | None:
    """The peak of a card by its full name, "NVIDIA H100 80GB HBM3" -> 989e12, or None if it is not listed."""
    words = set(re.split(r"[ -]", name))
    return next((peak for card, peak in PEAKS.items() if words >= set(card.split())), None)


def name_of(device: torch.device) -> str:
    """The full name of a card or, on Linux, of the CPU: "AMD EPYC 9B14"; elsewhere "arm64"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"^model name\s*: (.+)", info.read_text(), re.M) if info.exists() else None
    return cpu[1] if cpu else platform.machine()


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had at a time, on a GPU there; 0 if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # what is held now, which is rarely given back
    with suppress(ImportError):  # Windows has no such module
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


# ---------------------------------------------------------------------------------------------------------
# one process among several


@dataclass
class StopFlag:
    """The signal that asked this process to stop, or 0. Only Run.must_stop decides whether to stop."""

    asked: int = 0


@dataclass(frozen=True)
class Run:
    """Where a stage runs: its folder, its device, and this process among all."""

    stage: str
    folder: Path
    device: torch.device = torch.device("cpu")
    dtype: str = "float32"
    rank: int = 0
    world: int = 1
    store: Any = None  # torch.distributed's key-value store, shared by all processes
    stop: StopFlag = field(default_factory=StopFlag)
    peak: float | None = None  # operations per second of the device, if it is in PEAKS

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16 and the rest in float32, or everything in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def move(self, batch: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=tensor.is_pinned()) for tensor in batch)

    def prefetch(self, get_batch: Callable) -> AbstractContextManager[Callable]:
        """get_batch; on a GPU, which should not wait for a disk, with the thread of prefetch() below."""
        return prefetch(get_batch) if self.device.type == "cuda" else nullcontext(get_batch)

    def usage(self, rate: float) -> dict[str, float]:
        """For the log: which share of the device's peak `rate` operations per second are (MFU, model FLOPs
        utilization), and the most memory so far. What is unknown, 0 or None, is left out."""
        found = {"mfu": rate / (self.peak or math.inf), "peak_gb": peak_memory(self.device) / 1e9}
        return {name: round(value, 3) for name, value in found.items() if value}

    def say(self, text: str) -> None:
        """Print a line above the progress bar, from rank 0 only."""
        if self.rank == 0:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except BrokenPipeError:  # the reader of our output has ended, as `head` does: save, and stop
                sys.stdout = open(os.devnull, "w", encoding="utf-8")
                self.stop.asked = signal.SIGTERM

    def origin(self) -> dict[str, Any]:
        """How a checkpoint was made, for its card: the command, the machine, the versions."""
        machine, threads = name_of(self.device), torch.get_num_threads()
        if self.device.type != "cuda":
            machine += f", {threads} thread{'s' * (threads > 1)}"
        here = os.environ.get("LOCAL_WORLD_SIZE", self.world)  # processes of this machine
        start = f"torchrun --nproc_per_node={here}" if self.world > 1 else "python"
        return {"command": shlex.join([*start.split(), Path(sys.argv[0]).name, *sys.argv[1:]]),
                "machine": f"{self.world} x {machine}",
                "versions": {"torch": torch.__version__, "Python": platform.python_version()}}

    def rank_0_first(self, work: Callable[[], Any]) -> None:
        """Rank 0 does some work; the others wait for it as long as it takes, unlike in a barrier."""
        if self.rank == 0:
            work()
        if self.world > 1:
            key = f"{self.stage} prepared"
            if self.rank == 0:
                self.store.set(key, "yes")
            self.store.wait([key], timedelta(days=30))

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, totals: torch.Tensor) -> torch.Tensor:
        """A tensor of sums, added up over all processes."""
        if self.world > 1:
            totals = totals.to(self.device)
            dist.all_reduce(totals)
        return totals

    def union(self, names: Iterable[str]) -> list[str]:
        """Every name that any process has, once, in an order that is the same in all of them."""
        found = list(dict.fromkeys(names))
        if self.world > 1:
            text = "\n".join(found).encode()
            size = torch.tensor(len(text), device=self.device)
            dist.all_reduce(size, dist.ReduceOp.MAX)  # tensors of one size can be exchanged
            mine = torch.tensor(list(text.ljust(int(size), b"\n")), dtype=torch.uint8, device=self.device)
            everybody = [torch.empty_like(mine) for _ in range(self.world)]
            dist.all_gather(everybody, mine)
            found = "\n".join(bytes(each.tolist()).decode() for each in everybody).split("\n")
        return [name for name in dict.fromkeys(found) if name]

    def compile(self, blocks: Iterable[Any], *example: Any) -> None:
        """torch.compile blocks that are alike, where it works: it needs a compiler, which a laptop may not
        have.

        One block is compiled and serves for all, in seconds instead of minutes. The blocks stay the same
        objects.
        """
        blocks = list(blocks)
        self.say("compiling a block of the model: the first step takes longer")
        try:
            with self.autocast():
                torch.compile(blocks[0])(*example)
        except Exception as error:  # no compiler, an old one, a graph it cannot lower: there are many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.say(f"training without torch.compile, which does not work here: {reason}")
            return
        for block in blocks:
            block.compile()

    def must_stop(self) -> int:
        """The signal with which *all* processes stop now, or 0. All call this at the same place of the same
        step.

        A signal may reach a single process at any time. If that one left alone, the others would wait for it
        in their next exchange until they fail, without a checkpoint.
        """
        if self.world == 1:  # no tensor: to read one from a GPU is to wait until the optimizer is done
            return self.stop.asked
        asked = torch.tensor(int(self.stop.asked), device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return int(asked)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """In this block, Ctrl-C and SIGTERM ask to stop after the current step. A second one kills."""
        def ask(number, frame):
            self.stop.asked = number
            signal.signal(number, signal.SIG_DFL)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def start(stage: str, cfg: Config) -> Iterator[Run]:
    """The Run of this process, alone or under torchrun. No other command may write to its folder meanwhile.

    Raises UserError for what this machine cannot do. A run that fails before its first checkpoint leaves no
    folder.
    """
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device, store = pick_device(cfg.device), None
    cfg.micro_steps(world)
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        # torchrun's store outlives a restart and still holds the addresses of the processes that ended
        store, _, _ = next(rendezvous("env://", rank, world, timeout=PATIENCE))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=world)
    run = Run(stage, Path(cfg.out_dir) / stage, device, pick_dtype(cfg.dtype, device), rank, world, store,
              peak=peak_of(name_of(device)))
    with disk.lock(run.folder / "lock") if rank == 0 else nullcontext():
        try:
            yield run
        finally:
            if rank == 0:
                remove_if_unused(run.folder)
    if world > 1:
        gc.collect()  # DDP refers to itself; freed after the process group, it could wait forever
        dist.destroy_process_group()


@contextmanager
def prefetch(get_batch: Callable) -> Iterator[Callable]:
    """get_batch(split, i) for one who asks for i, i + 1, ...: a thread already makes the next AHEAD of them.

    What get_batch returns depends on (split, i) alone, so nothing else changes: what was made too early,
    before a stop or at the end of a validation, is made again. An error is raised where its batch is needed.
    """
    thread, coming = ThreadPoolExecutor(1), defaultdict[str, dict[int, Future]](dict)

    def make(split: str, i: int) -> tuple | None:
        batch = get_batch(split, i)  # from pinned memory a GPU copies by itself, while Python goes on
        return tuple(each.pin_memory() for each in batch) if batch and torch.cuda.is_available() else batch

    def fetch(split: str, i: int) -> tuple | None:
        coming[split] = {n: coming[split].get(n) or thread.submit(make, split, n)
                         for n in range(i, i + 1 + AHEAD)}
        return coming[split].pop(i).result()

    try:
        yield fetch
    finally:
        thread.shutdown(cancel_futures=True)


def remove_if_unused(folder: Path) -> None:
    """Remove a stage folder in which there is only its lock, and the folders above it if they are empty."""
    with suppress(OSError):  # Windows does not remove a file that is open; then the empty folder stays
        if [path.name for path in folder.iterdir()] == ["lock"]:
            (folder / "lock").unlink()
            folder.rmdir()
            folder.parent.rmdir()

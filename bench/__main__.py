"""
bench.py: how fast is this, next to others, on this machine, now?

Both sides do the same work (contests/) in processes of their own, in turns: ours, theirs, ours, theirs,
so that whatever else the machine does meets both. Each round gives a ratio, and the table their median.

    python bench.py train      steps of pretraining                                 --against=transformers
    python bench.py sample     reading a prompt (prefill), writing on (decode)      ... or llama.cpp
    python bench.py sft        packed rows, against rows padded to the longest      --against=padded
    python bench.py dpo        preference pairs                                     --against=trl
    python bench.py tokenizer  training, and encoding                               --against=tokenizers
    python bench.py loop       what a step costs beside forward, backward, optimizer
    python bench.py scale      tokens/s as rows, batches, models grow

Before that the limits of the machine are measured: products of large matrices, and reading memory. "of the
limit" says how much of them a side reaches: a training step needs 6 N + 6 L C T operations a token (N
parameters, L layers), decoding reads all weights once for each position. Memory is the most that a process
held, less what it held before the model existed.                        what came out: docs/performance.md
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch

import config
from config import UserError
from bench import scaling
from bench.sides import SIDES

# ---------------------------------------------------------------------------------------------------------
# clocks


def seconds_of(work: Callable, device: str) -> tuple[float, Any]:
    """(how long work() takes, what it returns); a GPU's own clock where there is one."""
    if device != "cuda":
        began = time.perf_counter()
        result = work()
        return time.perf_counter() - began, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000, result


def high_water(device: str) -> int:
    """The most memory that this process has held so far, in bytes; 0 where the system does not say."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        return 0


def limits(o: SimpleNamespace) -> dict[str, float]:
    """What the machine can do: operations a second in matrix products of o.dtype, bytes read a second."""
    dtype = torch.bfloat16 if o.dtype == "bfloat16" else torch.float32
    a, b = (torch.randn(2048, 2048, device=o.device).to(dtype) for _ in range(2))
    numbers = torch.ones(2**27 if o.device == "cuda" else 2**26, device=o.device)
    products, reads = (min(seconds_of(work, o.device)[0] for _ in range(6))
                       for work in (lambda: a @ b, numbers.sum))
    return {"operations": 2 * 2048**3 / products, "bytes": 4 * len(numbers) / reads}


# ---------------------------------------------------------------------------------------------------------
# two processes in turns


def side(pipe: Connection, what: str, name: str, o: SimpleNamespace) -> None:
    """A process that builds its side, tells what it can do, and then does what the pipe asks for."""
    try:
        torch.set_num_threads(o.threads)
        before: list[int] = []
        works = SIDES[what][name](o, lambda: before.append(high_water(o.device)))
        checks = {key: work() for key, (work, amount, _) in works.items() if amount is None}
        for work, _, unit in works.values():  # what is compiled or cached is so before it is timed
            if unit != "bytes":
                work()
        pipe.send((None, {key: (amount, unit) for key, (_, amount, unit) in works.items() if amount}, checks))
        while key := pipe.recv():
            pipe.send((seconds_of(works[key][0], o.device)[0], high_water(o.device) - before[0]))
    except ImportError as error:
        pipe.send((f"{name} is not installed: {error}", {}, {}))
    except UserError as error:
        pipe.send((str(error), {}, {}))
    except (EOFError, KeyboardInterrupt):  # the first process has ended
        pass


@contextmanager
def sides(what: str, names: list[str], o: SimpleNamespace) -> Iterator[dict[str, Connection]]:
    """{side: the pipe to its process}. Behind the block all processes have ended."""
    context, pipes, processes = get_context("spawn"), {}, []
    try:
        for name in names:
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=side, args=(theirs, what, name, o), daemon=True))
            processes[-1].start()
            theirs.close()
        yield pipes
        for pipe in pipes.values():
            pipe.send(None)
    except BaseException:
        for process in processes:
            process.terminate()  # it may be in the middle of long work
        raise
    finally:
        for process in processes:
            process.join()


def compare(what: str, names: list[str], o: SimpleNamespace) -> tuple[dict, dict, dict]:
    """{row: {side: [(amount a second, memory), ...] over o.rounds}}, and the checks of each side."""
    results: dict[str, dict] = {}
    checks, amounts = {}, {}
    with sides(what, names, o) as pipes:
        for name, pipe in pipes.items():
            try:
                error, amounts[name], checks[name] = pipe.recv()
            except EOFError:
                error = f"the process of {name} ended: see above"
            if error:
                raise UserError(error)
        shared = [key for key in amounts[names[0]] if all(key in amounts[name] for name in names)]
        for _ in range(o.rounds):
            for key in shared:
                for name, pipe in pipes.items():
                    pipe.send(key)
                    seconds, memory = pipe.recv()
                    rate = amounts[name][key][0] / seconds
                    results.setdefault(key, {}).setdefault(name, []).append((rate, memory))
    units = {key: amounts[names[0]][key][1] for key in shared}
    return results, units, checks


# ---------------------------------------------------------------------------------------------------------
# the table


def readable(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.1f} {letter}"
    return f"{number:,.1f} " if number >= 10 else f"{number:.3f} "


def spread(values: list[float]) -> str:
    """[3, 1, 2] -> "2.0 (1.0 to 3.0)"."""
    low, middle, high = (readable(f(values)).strip() for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def share(key: str, o: SimpleNamespace, rate: float, limit: dict[str, float]) -> str:
    """The part of the machine's limit that a rate of tokens reaches, or ""."""
    cfg = config.load_preset(o.config)
    if key == "step":
        work = 6 * cfg.n_params + 6 * cfg.n_layer * cfg.d_model * o.T
        return f"{rate * work / limit['operations']:.0%}"
    if key.startswith("decode"):
        size = cfg.n_params * {"float32": 4, "bfloat16": 2, "int8": 1}[o.dtype]
        return f"{rate / int(key.split()[-1]) * size / limit['bytes']:.0%}"
    return ""


def show(results: dict, units: dict, checks: dict, o: SimpleNamespace, limit: dict[str, float]) -> None:
    for key, sides in results.items():
        ours, *others = sides
        rates = {name: [rate for rate, _ in rounds] for name, rounds in sides.items()}
        print(f"\n{key}, {units[key]} a second: median (range)")
        for name in sides:
            reached = share(key, o, statistics.median(rates[name]), limit)
            memory = max(memory for _, memory in sides[name])
            print(f"    {name:<14} {spread(rates[name]):<34}{reached and reached + ' of the limit':<20}"
                  + f"peak memory {readable(memory)}B" * (memory > 0))
        for name in others:
            ratios = [a / b for a, b in zip(rates[ours], rates[name])]
            memory, theirs = (max(memory for _, memory in sides[who]) for who in (ours, name))
            print(f"    {ours} / {name}: {statistics.median(ratios):.2f} "
                  f"({min(ratios):.2f} to {max(ratios):.2f})"
                  + (f", memory {memory / theirs:.2f}" if theirs else ""))
    for key in {key for found in checks.values() for key in found}:
        print(f"\n{key}: " + ", ".join(f"{name} {found[key]:.7f}" for name, found in checks.items()))


# ---------------------------------------------------------------------------------------------------------
# the command line

AGAINST = {what: [name for name in sides if name != "ours"] for what, sides in SIDES.items()}
ALONE = ("loop", "scale")  # ours without another side


def parse(argv: list[str]) -> SimpleNamespace:
    """The command line. Raises UserError for a contest that does not exist."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*AGAINST, *ALONE])
    parser.add_argument("--config", default="config/smol_135m.py", help="a preset, for its shape")
    parser.add_argument("--against", help="; ".join(f"{a}: {' or '.join(AGAINST[a])}" for a in AGAINST))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "int8"],
                        help="of both sides; int8 is for sample, against others' bfloat16 (default float32)")
    parser.add_argument("--compile", action="store_true", help="torch.compile both sides")
    parser.add_argument("--batch", type=int, default=4, help="rows a step (default 4)")
    parser.add_argument("--T", type=int, default=512, help="positions in a row, or in a prompt (default 512)")
    parser.add_argument("--new", type=int, default=48, help="sample: ids to write (default 48)")
    parser.add_argument("--megabytes", type=int, default=100, help="tokenizer: text (default 100)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    parser.add_argument("--out", default="out/scaling.png", help="scale: the picture (needs matplotlib)")
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    others = AGAINST.get(args.what, [])
    args.against = args.against or next(iter(others), None)
    if args.against and args.against not in others:
        raise UserError(f"--against={args.against}: {args.what} is compared with "
                        f"{' or '.join(others) or 'nothing'}")
    if args.dtype == "int8" and args.what != "sample":
        raise UserError("--dtype=int8 is for bench.py sample: nothing is trained in 8 bits here")
    for name in ("batch", "T", "new", "megabytes", "rounds", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1")
    config.load_preset(args.config)
    return SimpleNamespace(**vars(args))


def main(argv: list[str]) -> None:
    o = parse(argv)
    if o.what == "loop":
        return scaling.loop(o)
    limit = limits(o)
    print(f"{o.device}, {o.threads} threads: matrix products {readable(limit['operations'])}operations/s in "
          f"{o.dtype if o.dtype != 'int8' else 'float32'}, reading {readable(limit['bytes'])}B/s; torch "
          f"{torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    if o.what == "scale":
        return scaling.scale(o, compare)
    show(*compare(o.what, ["ours", o.against], o), o, limit)


if __name__ == "__main__":
    config.command(main, own_help=True)

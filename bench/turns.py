"""
bench/turns.py: the same work, timed in two processes that take turns.

    round 1    ours      |#####|             |####|            one ratio for each row of the table:
               theirs           |########|          |#######|  theirs / ours in seconds
    round 2    ours      ...
                          row A               row B
"""

import os
import time
from argparse import Namespace
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from config import UserError

# ---------------------------------------------------------------------------------------------------------
# clocks


def seconds_of(work: Callable, device: str) -> tuple[float, float]:
    """How long work() takes: (wall-clock seconds, CPU seconds of all threads of this process)."""
    def wait() -> None:  # a GPU is not done when Python is
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def limits(o: Namespace) -> dict[str, float]:
    """What the machine can do: operations per second in matrix products of o.dtype, bytes read per second."""
    matrix = torch.randn(2048, 2048, device=o.device).to(getattr(torch, o.dtype))
    numbers = torch.ones(2**27 if o.device == "cuda" else 2**26, device=o.device)  # larger than any cache
    product = min(seconds_of(lambda: matrix @ matrix, o.device)[0] for _ in range(6))
    read = min(seconds_of(numbers.sum, o.device)[0] for _ in range(6))
    return {"operations": 2 * 2048**3 / product, "bytes": 4 * len(numbers) / read}


# ---------------------------------------------------------------------------------------------------------
# two processes


def serve(pipe: Connection, name: str, side: Callable, o: Namespace) -> None:
    """In a process of its own: build one side, warm it up, then time each row that the pipe asks for."""
    try:
        os.environ["RAYON_NUM_THREADS"] = str(o.threads)  # of the library tokenizers
        torch.set_num_threads(o.threads)
        rows = side(o)
        pipe.send({row: (amount, unit, work()) for row, (work, amount, unit) in rows.items()})
        while True:
            pipe.send(seconds_of(rows[pipe.recv()][0], o.device))
    except ImportError as error:
        pipe.send(UserError(f"{name} is not installed: {error}"))
    except UserError as error:
        pipe.send(error)
    except (EOFError, OSError, KeyboardInterrupt):  # the first process is done, or was stopped
        pass


def answer(pipe: Connection, name: str) -> Any:
    """What a side's process sends. Raises UserError if it could not do its work."""
    try:
        got = pipe.recv()
    except EOFError:
        raise UserError(f"the process of {name} ended: see above") from None
    if isinstance(got, UserError):
        raise got
    return got


def compare(sides: dict[str, Callable], o: Namespace) -> tuple[dict, dict]:
    """({side: {row: (amount, unit, first result)}}, {row: {side: [(wall, CPU seconds) of each round]}})."""
    context, processes, pipes, facts = get_context("spawn"), [], {}, {}
    try:
        for name, side in sides.items():
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(theirs, name, side, o), daemon=True))
            processes[-1].start()
            theirs.close()
            facts[name] = answer(pipes[name], name)
        times: dict = {row: {name: [] for name in facts} for row in facts[name]}
        for _ in range(o.rounds):
            for row, rounds in times.items():
                for name, pipe in pipes.items():
                    pipe.send(row)
                    rounds[name].append(answer(pipe, name))
        return facts, times
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join()

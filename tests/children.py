"""
children.py: `python WORDS` as a process of its own, for tests of what a process does and leaves.

Starting Python takes a moment, importing torch takes seconds. So a server imports the large packages once,
but nothing of this project, and each process is forked from it:

    done = run("train.py", "config/demo.py", "--lr=x")         .returncode, .stdout, .stderr
    training = start("train.py", preset, folder=tmp_path)      .pid, .exitcode, .terminate(), .join()

Where the operating system has no fork, each process starts like any other.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = str(ROOT), str(ROOT / "tests")
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
SERVER = multiprocessing.get_context(METHOD)
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.rendezvous", "safetensors.torch",
                               "tokenizers", "tqdm", "pytest"])


def main(words, folder, stdin, cwd, env):
    """In the new process: its three streams are files, and WORDS are run as Python runs them."""
    for number, (path, flags) in enumerate([(stdin, os.O_RDONLY), (folder / "stdout", os.O_WRONLY),
                                            (folder / "stderr", os.O_WRONLY)]):
        os.dup2(os.open(path, flags), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    home = Path(words[0]).resolve().parent if words[0][0] != "-" else cwd
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [str(home), *filter(None, given), *(path for path in sys.path if path not in OURS)]
    sys.argv = list(words if words[0][0] != "-" else words[1:])
    del sys.modules["children"]  # in a copy of the project, its tests import their own
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        (folder / "words.py").write_text(words[1], encoding="utf-8")
        runpy.run_path(str(folder / "words.py"), run_name="__main__")
    else:
        runpy.run_path(words[0], run_name="__main__")


def start(*words, folder, stdin=os.devnull, cwd=ROOT, env=None):
    """Start `python WORDS`. What it prints is in folder/stdout and folder/stderr, which may be FIFOs."""
    for name in ("stdout", "stderr"):
        if not (folder / name).exists():
            (folder / name).touch()
    process = SERVER.Process(target=main, args=(tuple(map(str, words)), folder, stdin, cwd,
                                                 {**os.environ, **(env or {})}))
    process.start()
    return process


def run(*words, said=b"", cwd=ROOT, env=None, timeout=300):
    """Run `python WORDS` to its end, with `said` typed into it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "stdin").write_bytes(said)
        process = start(*words, folder=folder, stdin=folder / "stdin", cwd=cwd, env=env)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{words} did not end within {timeout} s")
        printed = [(folder / each).read_bytes().decode() for each in ("stdout", "stderr")]
        return subprocess.CompletedProcess(words, process.exitcode, *printed)


@contextmanager
def several(n, *words, folder):
    """n processes that find each other as those of torchrun do. At the end of the block they are killed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(n):
        (folder / f"process_{rank}").mkdir(exist_ok=True)
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "localhost",
               "MASTER_PORT": str(port)}
        processes.append(start(*words, folder=folder / f"process_{rank}", env=env))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def end_server():
    """End the server, so that no process is left."""
    forkserver._forkserver._stop()

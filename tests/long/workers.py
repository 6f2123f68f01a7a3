"""
workers.py: several processes. One is killed, or the network between them is cut.

    python tests/long/workers.py

    killed      torchrun --max-restarts: a worker gets SIGKILL in the middle of a step or of a save (before a
                file or before the folder gets its name). The run ends with the bits of an undisturbed one.
    worlds      four steps with 1 process, then 2, 4, 3 and 1: the data come in the same order, and the log is
                that of one process up to rounding
    cut         two hosts (network namespaces); the cable between them is cut after a step. Both end with an
                error within the given time, and the checkpoints are intact. Needs `unshare -rmn`.

Prints one line for each, and exits with 1 if anything differs.
"""

import argparse
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from stages import outcome, presets, run, same, write_preset

import data
import train
from plumbing import checkpoint, disk, processes

PLACES = {"step": (train, "add_up"), "files": (disk, "write_tensors"), "name": (disk, "replace")}
ROOT = Path(__file__).parents[2]


def worker(preset, rank, place, n):
    """train.py in one of several processes, which dies before the n-th call of a place, unless restarted."""
    torch.set_num_threads(1)
    module, name = PLACES[place]
    function, calls = getattr(module, name), [0]

    def dying(*args):
        calls[0] += 1
        if calls[0] == n and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    if int(os.environ["RANK"]) == rank:
        setattr(module, name, dying)
    train.main([preset])


def prepare(preset):
    """Tokenize its texts, quietly."""
    with redirect_stdout(io.StringIO()):
        data.main([preset])


def torchrun(world, preset, rank=0, place="step", n=0):
    """(exit code, output) of `world` processes on a preset."""
    prepare(preset)
    done = run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "--max-restarts=2",
               __file__, "--worker", preset, rank, place, n, timeout=600)
    return done.returncode, done.stderr


def killed(folder, cfg, world, cases):
    """(tries, failures): a worker dies in each case, and the result is that of an undisturbed run."""
    def end(name, *where):
        out = folder / f"{name}_{world}"
        preset = write_preset(folder / f"{name}_{world}.py", replace(cfg, out_dir=str(out)))
        code, said = torchrun(world, preset, *where)
        if code or ("exitcode: -9" in said) != bool(where):
            print(f"{name}, {world} processes: exit code {code}\n{said[-3000:]}")
            return None
        return outcome(out / "pretrain")

    expected = end("undisturbed")
    ends = [end(f"{place}_{n}_of_{rank}", rank, place, n) for rank, place, n in cases]
    return len(cases), sum(not (expected and found and same(found, expected)) for found in ends)


def worlds(folder, cfg):
    """(tries, failures): the number of processes changes at each start."""
    logs = []
    for name, sequence in (("one", [(20, 1)]), ("many", [(4, 1), (8, 2), (12, 4), (16, 3), (20, 1)])):
        for max_steps, world in sequence:
            now = replace(cfg, out_dir=str(folder / name), max_steps=max_steps, batch=12, micro_batch=1,
                          warmup_steps=0, decay_steps=0, optimizer="adamw")
            code, said = torchrun(world, write_preset(folder / f"{name}.py", now))
            if code:
                print(said[-3000:])
                return 1, 1
        logs.append(outcome(folder / name / "pretrain")[1])
    one, many = ([(line["loss"], line["grad_norm"]) for line in log] for log in logs)
    close = all(math.isclose(a, b, rel_tol=1e-3)
                for x, y in zip(one, many, strict=True) for a, b in zip(x, y))
    return 4, 0 if close else 4


# ---------------------------------------------------------------------------------------------------------
# two hosts

CABLE = """
unshare -n sleep 170 >/dev/null 2>&1 & other=$!
sleep 0.5
ip link add here type veth peer name there
ip link set there netns $other
ip addr add 10.99.0.1/24 dev here && ip link set here up && ip link set lo up
nsenter -t $other -n sh -c 'ip addr add 10.99.0.2/24 dev there && ip link set there up && ip link set lo up'
export MASTER_ADDR=10.99.0.1 MASTER_PORT=29555 WORLD_SIZE=2 LOCAL_RANK=0
RANK=0 GLOO_SOCKET_IFNAME=here $PYTHON $SCRIPT --host $PRESET & first=$!
RANK=1 GLOO_SOCKET_IFNAME=there nsenter -t $other -n $PYTHON $SCRIPT --host $PRESET & second=$!
until [ -e "$CUT" ] || ! kill -0 $first; do sleep 0.1; done
ip link set here down
wait $first; one=$?
wait $second; two=$?
kill $other
echo "exit codes: $one $two"
"""


def host(preset):
    """train.py on one of two hosts, which wait 20 seconds for each other; after step 5 the cable is cut."""
    torch.set_num_threads(1)
    processes.PATIENCE, step = timedelta(seconds=20), train.train_step

    def cutting(number, lr, cfg, *others):
        line = step(number, lr, cfg, *others)
        if number == 4:
            Path(cfg.out_dir, f"cut_{os.environ['RANK']}").touch()
            time.sleep(2)
        return line

    train.train_step = cutting
    train.main([preset])


def cut(folder, cfg):
    """(tries, failures), or None if this machine does not allow network namespaces."""
    try_it = "unshare -rmn ip link add here type veth peer name there".split()
    if not shutil.which("unshare") or subprocess.run(try_it, capture_output=True).returncode:
        return None
    cfg = replace(cfg, out_dir=str(folder / "cut"), save_every=1, keep_checkpoints=0)
    preset = write_preset(folder / "cut.py", cfg)
    prepare(preset)
    began = time.monotonic()
    done = subprocess.run(
        ["unshare", "-rmn", "bash", "-c", CABLE], cwd=ROOT, capture_output=True, text=True, timeout=180,
        env=os.environ | {"PYTHON": sys.executable, "SCRIPT": __file__, "PRESET": preset,
                          "CUT": str(folder / "cut" / "cut_0")})
    codes = done.stdout.splitlines()[-1].removeprefix("exit codes: ").split()
    steps = checkpoint.checkpoints(folder / "cut" / "pretrain")
    right = ("0" not in codes and [step for step, _ in steps] == [1, 2, 3, 4]
             and not any(checkpoint.damage(step) for _, step in steps))
    if not right:
        print(json.dumps([codes, [str(step) for _, step in steps]]), done.stdout[-2000:], done.stderr[-4000:])
    print(f"both hosts ended {time.monotonic() - began:.0f} s after the start, with exit codes {codes}")
    return 1, int(not right)


# ---------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--host", help=argparse.SUPPRESS)
    args, bad = parser.parse_args(), 0
    if args.worker:
        preset, rank, place, n = args.worker
        return worker(preset, int(rank), place, int(n))
    if args.host:
        return host(args.host)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg = replace(presets(folder)["pretrain"], micro_batch=1)
        cases = [(1, "step", 10), (0, "step", 7), (0, "files", 3), (0, "name", 14)]
        works = [("killed, 4 processes", lambda: killed(folder, cfg, 4, [(3, "step", 10), *cases[2:]])),
                 ("killed, 2 processes", lambda: killed(folder, cfg, 2, cases)),
                 ("worlds", lambda: worlds(folder, cfg)), ("cut", lambda: cut(folder, cfg))]
        for what, work in works:
            result = work()
            print(f"{what:<24}" + (f"{result[0]:>5} tries {result[1]:>4} failures" if result else
                                   "skipped: no network namespaces here"), flush=True)
            bad += result[1] if result else 0
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()

"""
activations.py: is the memory that `python -m bench plan` computes the memory that a training step takes?

    python tests/long/activations.py

takes two steps of two micro-batches on the CPU, in a process of its own for each preset and dtype, and
compares the most memory that they added to the process with bench/plan.py's formula. The C library is told to
return freed memory at once; else what it keeps for later would count.
"""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import re, sys
from argparse import Namespace
from dataclasses import replace
from bench import training
from bench.plan import memory_bytes
import torch, train

def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

o = Namespace(config=sys.argv[1], batch=int(sys.argv[2]), T=int(sys.argv[3]), dtype=sys.argv[4], device="cpu")
ids, targets = training.some_batch(o)
cfg = replace(training.shaped(o), batch=2 * o.batch)
shapes = [dict(n_layer=1, n_head=1, n_kv_head=1, d_model=64, d_ff=64, vocab_size=2048), {}]
for shape in shapes:  # the first, a tiny one, loads what a step needs of libraries
    before = status("VmRSS")
    step = training.our_step(o, replace(cfg, **shape), train.loss_fn)
    for _ in range(2):
        step((ids, targets, torch.zeros_like(ids)))
print(memory_bytes(cfg, o.batch) / 1e9, (status("VmHWM") - before) / 1e9)
"""


def main():
    for preset, rows, T in (("stories", 4, 512), ("day", 1, 512), ("day", 2, 512)):
        for dtype in ("bfloat16", "float32"):
            words = [f"config/{preset}.py", str(rows), str(T), dtype]
            done = subprocess.run([sys.executable, "-c", CODE, *words], cwd=Path(__file__).parents[2],
                                  env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
                                  capture_output=True, text=True, check=True)
            computed, measured = map(float, done.stdout.split())
            print(f"{preset:8} {rows} x {T:5} {dtype:9} computed {computed:6.2f} GB  "
                  f"measured {measured:6.2f} GB  {computed / measured - 1:+.1%}", flush=True)


if __name__ == "__main__":
    main()

"""
rows.py: the data of a run of 629 billion tokens, without its terabyte.

    python tests/long/rows.py

makes shards of the real size as sparse files, which are empty and need no disk: 300 million rows of 2,048
ids. Then a new process opens them as train.py would and reads some batches, up to the last one of 600,000
steps. Exits with 1 unless it starts within 10 s, needs less than 500 MB more memory, and reads a batch of 8
rows within 50 ms.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stages import WORDS

import config
import data
from plumbing import disk, shards
from tokenizer import Tokenizer

ROWS, STEPS = 300_000_000, 600_000


def simulate(folder, cfg, tok):
    """Shards and a manifest for ROWS rows of one source."""
    place = shards.shard_folder(cfg.sources[0], cfg, tok)
    place.mkdir(parents=True)
    manifest, left = [], ROWS * cfg.seq_len
    while left > 0:
        shard = {}
        for split, tokens in (("train", min(left, shards.SHARD_TOKENS)), ("val", 2**15)):
            name = f"{split}_1of1_{len(manifest):05}.bin"
            with open(place / name, "wb") as file:
                file.truncate(2 * tokens)
            shard[split] = {"file": name, "tokens": tokens, "documents": tokens // 1000, "bytes": 4 * tokens}
        manifest.append(shard)
        left -= shards.SHARD_TOKENS
    reader = {"source": cfg.sources[0], "read": 0, "bad": 0, "left_out": {}, "notes": {}, "files": []}
    disk.write_json(place / "manifest_1of1.json", {"tokenizer": tok.digest(), "complete": True,
                                                   "shards": manifest, "reader": reader,
                                                   "stops": [{"tokens": 0, "shards": len(manifest)}]})
    return len(manifest)


def resident():
    """Bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(folder):
    """{what: value} of opening the data and reading batches."""
    cfg, tok = settings(folder)
    before, began = resident(), time.perf_counter()
    batches = data.Batches(cfg, tok, rank=0, world=8)
    started, times = time.perf_counter() - began, []
    for step in (0, 1, 1000, STEPS // 2, STEPS - 1):
        micro = cfg.micro_steps(8)
        began = time.perf_counter()
        batches("train", step * micro + micro - 1)
        times.append(time.perf_counter() - began)
    return {"rows": len(batches.rows["train", cfg.sources[0]]), "start-up, s": started,
            "memory, MB": (resident() - before) / 1e6, "open files": len(os.listdir("/proc/self/fd")) - 1,
            f"slowest batch of 8 rows, up to step {STEPS:,}, ms": 1000 * max(times)}


def settings(folder):
    cfg = config.load(["config/smol_135m.py", f"--out_dir={folder}/out", f"--data={folder}/texts.jsonl",
                       f"--tokenizer={folder}/tok"])
    return cfg, Tokenizer.load(folder / "tok")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.chdir(Path(__file__).parents[2])
    if args.measure:
        return print(json.dumps(measure(Path(args.measure))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts.jsonl").write_text("{}\n")
        Tokenizer.train([" ".join(WORDS)] * 3, 300).save(folder / "tok")
        n = simulate(folder, *settings(folder))
        command = [sys.executable, __file__, f"--measure={folder}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout)
    print(f"{n:,} shards in each split")
    for what, value in found.items():
        print(f"{what:<50}{value:>14,.1f}")
    start, memory, _, batch = list(found.values())[1:]
    sys.exit(start > 10 or memory > 500 or batch > 50)


if __name__ == "__main__":
    main()

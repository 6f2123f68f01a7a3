"""
memory.py: does tokenizing need more memory for more text?

    python tests/long/memory.py

tokenizes 11 MB and then 73 MB, each in a process of its own, and prints the most memory that it used. Neither
texts nor ids are kept, so both figures are about the same. Exits with 1 if they differ by more than 64 MB.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from stages import WORDS

from tokenizer import Tokenizer

CODE = """
import sys, data
data.main(sys.argv[1:])
print(open("/proc/self/status").read())
"""  # the high-water mark of getrusage would include that of this script, the parent


def most_memory(folder, n):
    """MB that data.py needs for n documents of 400 words."""
    source, rng = folder / f"{n}.jsonl", random.Random(0)
    with open(source, "w", encoding="utf-8") as file:
        for i in range(n):
            print(json.dumps({"text": f"{i} " + " ".join(rng.choices(WORDS, k=400))}), file=file)
    flags = [f"--data={source}", f"--tokenizer={folder / 'tok'}", f"--out_dir={folder / str(n)}"]
    command = [sys.executable, "-c", CODE, "config/demo.py", *flags]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    print(f"{source.stat().st_size / 1e6:5.1f} MB of text", end="", flush=True)
    return int(done.stdout.split("VmHWM:")[1].split()[0]) / 2**10


def main():
    with tempfile.TemporaryDirectory() as name:
        Tokenizer.train([" ".join(WORDS)] * 3, 300).save(Path(name) / "tok")
        peaks = []
        for n in (6_000, 40_000):
            peaks.append(most_memory(Path(name), n))
            print(f"{peaks[-1]:8.0f} MB of memory")
    sys.exit(peaks[1] > peaks[0] + 64)


if __name__ == "__main__":
    main()

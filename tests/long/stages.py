"""
stages.py: three tiny stages on files of their own, for the scripts in this folder.

They run the real code in about a second: 20,000 parameters, eight steps, a checkpoint every two steps. A run
is a forked child of the script, which has imported everything, so a killed run restarts quickly.
"""

import json
import os
import random
import sys
from pathlib import Path
from threading import RLock

import torch
import torch._dynamo  # optimizers import it: here once, and not in each child
from safetensors.torch import load_file
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parents[n]) for n in (2, 1)]

from children import run  # noqa: E402, F401  the others here take these from this file
from conftest import TINY, WORDS, write_preset  # noqa: E402, F401

import data  # noqa: E402  the project is two folders up, what tests share is one folder up
import dpo  # noqa: E402
import sft  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402
from corpus.conversations import exchange  # noqa: E402
from plumbing import checkpoint  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

STEPS = 8

# tqdm's own lock is shared with forked children, and one that is killed would keep it
tqdm.set_lock(RLock())
tqdm.monitor_interval = 0


def pretrain(argv):
    """What data.py and then train.py do."""
    data.main(argv)
    train.main(argv)


MAINS = {"pretrain": pretrain, "sft": sft.main, "dpo": dpo.main}


def write_lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


def presets(folder):
    """{stage: Config}. Writes a tokenizer, texts, chats and pairs into folder, but no model."""
    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer.train([" ".join(WORDS)] * 3, 300).save(folder / "tok")
    rng = random.Random(0)

    def words(n):
        return " ".join(rng.choices(WORDS, k=n))

    texts = write_lines(folder / "texts.jsonl", [{"text": f"{i} {words(40)}"} for i in range(200)])
    chats = write_lines(folder / "chats.jsonl", [{"messages": exchange(f"{i} {words(3)}", words(9))}
                                                 for i in range(100)])
    pairs = write_lines(folder / "pairs.jsonl", [pair(f"{i} {words(5)}", words(6), words(4))
                                                 for i in range(40)])
    shared = dict(**TINY, seq_len=64, init_std=0.1, device="cpu", dtype="float32", val_fraction=0.1,
                  max_steps=STEPS, batch=4, micro_batch=2, lr=1e-2, eval_every=4, eval_batches=1,
                  save_every=2, keep_checkpoints=3, sample_every=0)
    later = dict(fractions=True, init_from=str(folder / "first" / "pretrain"))
    return {"pretrain": Config(**shared, tokenizer=str(folder / "tok"), data=((texts, 1.0),),
                               optimizer="muon"),
            "sft": Config(**shared, **later, data=((chats, 1.0),), doc_mask=True),
            "dpo": Config(**shared, **later, data=((pairs, 1.0),), dpo_max_length=64,
                          dpo_max_prompt_length=32)}


def pair(prompt, chosen, rejected):
    return {"chosen": exchange(prompt, chosen), "rejected": exchange(prompt, rejected)}


def child(work):
    """Start work() in a child process; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    try:
        torch.set_num_threads(1)
        sys.stdout.reconfigure(line_buffering=True)  # an error comes last, as on a terminal
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(pid):
    """Wait for a child; its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder):
    """Everything that a stage leaves: weights, optimizer states, and log lines without their times."""
    newest = checkpoint.find(folder)
    tensors = load_file(newest / "model.safetensors") | {
        f"optimizer {name}": tensor for name, tensor in load_file(newest / "optimizer.safetensors").items()}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        for name in ("seconds", "elapsed", "tokens_per_second", "peak_gb"):
            line.pop(name, None)
    return tensors, lines


def same(a, b):
    """Whether two outcomes are equal, bit for bit."""
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(
        torch.equal(a[0][name].view(-1).view(torch.uint8), b[0][name].view(-1).view(torch.uint8))
        for name in a[0])

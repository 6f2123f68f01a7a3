"""What several test files share: a tiny tokenizer, and a run to work with."""

import io
import json
import os
import random
import runpy
import signal
import sys
from pathlib import Path

import children
import pytest
import torch

import tokenizer
from config import Config

ROOT = Path(__file__).parents[1]
WORDS = "the cat sat on a mat and saw the dog run over green hills while rain fell softly".split()


TINY = dict(vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48)  # the shape of a model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These models are too small to share among cores, here and in all processes that tests start."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def a_child_can_be_interrupted():
    """A shell starts what runs in the background with SIGINT ignored, and each process passes that on.

    A signal that has a handler here is reset in a child, so every test may send one a Ctrl-C.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left():
    """After the last test, no process that the tests started is left."""
    yield
    children.end_server()
    left = []
    for task in Path("/proc/self/task").glob("*/children"):  # on Linux
        for pid in task.read_text().split():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except FileNotFoundError:  # it has just ended
                continue
            if "resource_tracker" not in command:  # multiprocessing's own, which ends with this process
                left.append(f"{pid} {command}")
    assert left == []


@pytest.fixture(scope="session")
def tok():
    return tokenizer.Tokenizer.train([" ".join(WORDS)] * 3, 300)


def write_texts(path, n, seed=0, words=40):
    """n documents of random words as a .jsonl file."""
    rng = random.Random(seed)
    lines = [json.dumps({"text": f"{i} " + " ".join(rng.choices(WORDS, k=words))}) for i in range(n)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_preset(path, cfg):
    """A preset with every field of cfg; returns its path."""
    fields = ", ".join(f"{name}={value!r}" for name, value in vars(cfg).items())
    path.write_text(f"from config import Config\nconfig = Config({fields})\n", encoding="utf-8")
    return str(path)


def small_config(folder, tok):
    """A Config of a 20,000-parameter model on one local file, with its tokenizer saved."""
    tok.save(folder / "tok")
    source = write_texts(folder / "texts.jsonl", 300)
    return Config(
        **TINY, seq_len=32, init_std=0.1,
        out_dir=str(folder / "out"), tokenizer=str(folder / "tok"), data=((source, 1.0),),
        data_tokens=10**9,  # more than there are, so all of them
        device="cpu", dtype="float32", val_fraction=0.1,
        max_steps=40, batch=8, micro_batch=4, lr=1e-2, warmup_steps=4, decay_steps=10,
        eval_every=10, eval_batches=2, save_every=10, sample_every=0,
    )


@pytest.fixture
def small(tmp_path, tok):
    return small_config(tmp_path, tok)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here("sample.py", "--prompt=a", said="typed") -> (exit code, stdout, stderr).

    What `python sample.py --prompt=a` does, in this process: starting Python and torch takes seconds.
    """
    def run(script, *argv, said=""):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode()), encoding="utf-8"))
        capsys.readouterr()
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def each_graph_is_recorded_once():
    """Recording takes seconds: equal weights get the graph that was recorded before."""
    from export import onnx_file
    record, graphs = onnx_file.record, {}

    def record_once(model, quant):
        key = quant, model.cfg, sum(weight.double().abs().sum().item() for weight in model.parameters())
        if key not in graphs:
            graphs[key] = record(model, quant)
        return graphs[key]

    onnx_file.record = record_once
    yield
    onnx_file.record = record

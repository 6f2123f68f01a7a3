"""python -m bench shakespeare: every held-out byte is paid for once, by two programs, in the same way."""

import math
import re
from argparse import Namespace

import pytest
import torch
from conftest import WORDS

from bench import shakespeare
from config import Config, UserError
from model import SmolLM

PREPARE = """
import torch
text = open("data/shakespeare_char/input.txt").read()
torch.save(text[: int(0.9 * len(text))], "data/shakespeare_char/train.pt")
"""
MODEL = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.scale = config, torch.nn.Parameter(torch.ones(1))

    def forward(self, x, targets=None):
        return 0 * self.scale * torch.ones(*x.shape, self.config.vocab_size), None
"""
TRAIN = """
import os, sys, torch
from model import GPT, GPTConfig
assert "--block_size=64" in sys.argv
V = len(set(torch.load("data/shakespeare_char/train.pt")))
os.makedirs("out-shakespeare-char")
args = {"block_size": 64, "vocab_size": V}
torch.save({"model": GPT(GPTConfig(**args)).state_dict(), "model_args": args}, "out-shakespeare-char/ckpt.pt")
"""


@pytest.mark.parametrize("n", [1, 3, 4, 9, 40])
def test_every_id_is_paid_for_once_with_at_least_half_a_context(n):
    """In a text of ids 0, 1, 2, ... whose id i costs i bits, the sum says which ones were paid for."""
    T, first, asked = 8, 20, []

    def log_p(inputs, targets):
        assert torch.equal(targets, inputs + 1) and 0 < inputs.shape[1] <= T
        asked.append(targets[0].tolist())
        return -math.log(2) * targets

    whole = range(first + n)
    assert shakespeare.bits(log_p, list(whole), first, T) == pytest.approx(sum(whole[first:]))
    starts = range(first, first + n, T // 2)
    paid = [row[-min(T // 2, first + n - start) :] for row, start in zip(asked, starts)]
    assert sum(paid, []) == list(range(first, first + n))
    assert all(len(row) - len(new) >= T // 2 for row, new in zip(asked, paid))


def test_a_model_that_knows_nothing_pays_the_logarithm_of_its_vocabulary_for_each_of_its_tokens(tok):
    model = SmolLM(Config(vocab_size=300, n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_ff=16, seq_len=16))
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    text = "the dog run over green hills " * 5
    expected = len(tok.encode(text)) * math.log2(300)
    assert shakespeare.bits_ours(model, tok, "the cat sat on ", text) == pytest.approx(expected)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("".join(f"{i} {WORDS[i % 17]} {WORDS[i * 7 % 17]}\n" for i in range(1500)))
    return path


def test_both_sides_learn_the_same_nine_tenths_and_are_compared_on_the_rest(text, tmp_path, capsys):
    """The other program has the files of nanoGPT and is small: to its model all characters are alike."""
    theirs = tmp_path / "nanoGPT"
    (theirs / "data" / "shakespeare_char").mkdir(parents=True)
    files = {"model.py": MODEL, "train.py": TRAIN, "data/shakespeare_char/prepare.py": PREPARE}
    for name, code in files.items():
        (theirs / name).write_text(code)
    argv = [f"--text={text}", f"--nanogpt={theirs}", f"--out_dir={tmp_path / 'out'}"]
    argv += "--vocab_size=300 --n_layer=1 --d_model=32 --d_ff=64 --seq_len=32".split()
    argv += ["--max_steps=2", "--decay_steps=1"]
    shakespeare.main([*argv, "--eval_every=0", "--sample_every=0"])
    first = capsys.readouterr().out
    whole = text.read_text()
    held_out = whole[int(0.9 * len(whole)) :]
    assert f"the last {len(held_out):,} bytes of {text}" in first
    row = r"(?:ours|nanoGPT) +(\d+) +([\d,]+) +([\d.]+)"
    (seconds, n_params, per_byte), (_, _, other) = re.findall(row, first)
    assert int(seconds) > 0 and n_params == "18,912"
    assert float(other) == pytest.approx(math.log2(len(set(whole))), abs=1e-3)
    assert 0 < float(per_byte) < 8
    with pytest.raises(UserError, match="ends with step 2 of 3: choose another --out_dir"):
        shakespeare.main([*argv, "--max_steps=3"])
    shakespeare.main(argv)  # both are finished: only the comparison is made again
    again = capsys.readouterr().out
    assert again.count("(before)") == 2
    assert re.findall(r"[\d.]+$", again, re.M) == re.findall(r"[\d.]+$", first, re.M)


def test_mistakes_name_what_to_fetch(text, tmp_path):
    with pytest.raises(UserError, match="there is no file --text=none.txt: tiny Shakespeare is"):
        shakespeare.main(["--text=none.txt"])
    with pytest.raises(UserError, match="has no model.py: name a checkout of karpathy/nanoGPT"):
        shakespeare.main([f"--text={text}", f"--nanogpt={tmp_path}"])
    with pytest.raises(UserError, match="ended with code 3: see above"):
        shakespeare.cpu_seconds(["-c", "raise SystemExit(3)"], tmp_path, Namespace(threads=1))

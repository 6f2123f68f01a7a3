"""docs/hacking.md: its examples are applied to a copy of the project, run, and compared with formulas."""

import ast
import importlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import children
import pytest
from conftest import write_preset

from plumbing import checkpoint, shards

ROOT = Path(__file__).parents[1]
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "hacking.md").read_text("utf-8"),
                           re.M | re.DOTALL))


def block(section, kind):
    """The first ```kind block of a section of the page."""
    return re.search(rf"^```{kind}\n(.*?)^```$", SECTIONS[section], re.M | re.DOTALL)[1]


class Copy:
    """The project with the diff of one section."""

    def __init__(self, folder, section):
        self.folder = folder
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "out", "__pycache__", "docs"))
        diff = block(section, "diff")
        command = ["git", "apply", "-"]
        done = subprocess.run(command, cwd=folder, input=diff, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, (f"the diff of '{section}' does not apply any more. Where a change of "
                                      f"your own stands in its way, ignore this: {done.stderr}")
        files = re.findall(r"^\+\+\+ b/(.*)$", diff, re.M)
        assert len(files) <= 2 and sum(line[0] == "+" for line in diff.splitlines()) - len(files) < 15
        for test in re.findall(r"^python -m (pytest .*)$", SECTIONS[section], re.M):
            self.python("-m", *test.split(), "-q", "-p", "no:cacheprovider")

    def python(self, *words, fails=0):
        """What a command in the copy prints."""
        done = children.run(*words, cwd=self.folder)
        assert done.returncode == fails, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout + done.stderr

    def train(self, cfg, *flags):
        """Three steps; returns the folder of the checkpoint."""
        shards.write_shards(cfg.sources[0], cfg, checkpoint.Tokenizer.load(cfg.tokenizer))
        cfg = replace(cfg, max_steps=3, warmup_steps=1, decay_steps=1)
        self.python("train.py", write_preset(self.folder / "preset.py", cfg), *flags)
        return checkpoint.find(Path(cfg.out_dir) / "pretrain")


@pytest.fixture
def hacked(tmp_path):
    if not shutil.which("git"):
        pytest.skip("there is no git here to apply a diff with")
    return lambda section: Copy(tmp_path / "project", section)


def test_a_schedule(hacked, small):
    copy = hacked("A schedule")
    folder = copy.train(small, "--schedule=linear")
    lines = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([0, small.lr, small.lr / 2])
    code = ("import train; from config import Config\n"
            "cfg = Config(schedule='linear', max_steps=110, warmup_steps=10, lr=1.0)\n"
            "print([train.lr_at(step, cfg) for step in (0, 5, 10, 60, 109)])")
    assert ast.literal_eval(copy.python("-c", code)) == pytest.approx([0, 0.5, 1, 0.5, 0.01])


WINDOW = """
import sys, torch
from dataclasses import replace
from config import UserError
from export import gguf_file, onnx_file
from model import Attention, rope_tables
from plumbing import checkpoint
folder, w, T = sys.argv[1], 5, 20
cfg = checkpoint.load(folder)[0].cfg
assert cfg.window == w
torch.manual_seed(0)
x, rope = torch.randn(1, T, cfg.d_model), rope_tables(torch.arange(T), cfg.head_dim, cfg.rope_theta)
for layer in (0, 1, 2, 3):
    near, plain = Attention(cfg, layer), Attention(replace(cfg, window=0), layer)
    plain.load_state_dict(near.state_dict())
    for t in range(T):  # position t gets what it would get as the last one of a text that begins later
        first = max(0, t - w + 1) if layer % 2 else 0
        alone = plain(x[:, first:t + 1], [table[first:t + 1] for table in rope])[:, -1]
        torch.testing.assert_close(near(x, rope)[:, t], alone, rtol=0, atol=1e-6)
for export, quant in ((gguf_file, "f16"), (onnx_file, "fp32")):
    try:
        export.write(folder, folder, quant)
    except UserError as error:
        print(error)
"""


def test_a_sliding_window(hacked, small):
    """Its own test has seen to saving, loading, resuming and init_from."""
    for package in ("transformers", "gguf", "onnxscript"):
        pytest.importorskip(package)
    copy = hacked("A sliding window in every second layer")
    folder = copy.train(small, "--window=5")
    said = copy.python("-c", WINDOW, str(folder))
    assert said.count(f"{folder} is no Llama, because of window=5") == 2
    copy.python("sample.py", str(folder), "--prompt=the cat", "--max_new_tokens=9", "--device=cpu")
    with pytest.raises(ValueError, match="smollm_from_scratch"):
        importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(folder)


def test_a_format_of_chats(hacked, small):
    copy = hacked("A format of chats")
    folder, chats = copy.train(small), copy.folder / "chats.jsonl"
    rows = [{"id": n, "turns": ["hi", "Hello!", f"{n} + 1?", f"{n + 1}"], "system": "Be."} for n in range(40)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code = f"from corpus.conversations import messages_of; print(messages_of({rows[7]}))"
    messages = ast.literal_eval(copy.python("-c", code))
    assert [(message["role"], message["content"]) for message in messages] == [
        ("system", "Be."), ("user", "hi"), ("assistant", "Hello!"), ("user", "7 + 1?"), ("assistant", "8")]
    cfg = replace(small, data=((str(chats), 1.0),), fractions=True, init_from=str(folder), tokenizer=None,
                  seq_len=64, max_steps=1, warmup_steps=0, decay_steps=0)
    done = copy.python("sft.py", write_preset(copy.folder / "chats.py", cfg))
    assert "40  records read" in done and "left out" not in done
    chats.write_text(json.dumps({"turns": ["hi"]}), encoding="utf-8")
    assert "chats.jsonl line 1: messages out of order" in copy.python("sft.py", str(copy.folder / "chats.py"),
                                                                      fails=2)


def test_the_model_reads_only_fields_that_a_checkpoint_keeps():
    """A field that changes what a model computes, outside of Config's first block, would be lost in silence.

    If yours changes how something is computed, but no number, it may stay where it is: name it in `harmless`.
    """
    harmless: set[str] = set()
    code = (ROOT / "model.py").read_text(encoding="utf-8")
    read = {*checkpoint.FIELDS} & {*re.findall(r"\bcfg\.(\w+)", code)}
    kept = checkpoint.FIELDS[:checkpoint.FIELDS.index("out_dir")]
    assert "n_layer" in read and read - harmless <= {*kept}

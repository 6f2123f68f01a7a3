"""
fuzz.py: damaged and hostile files and arguments.

    python tests/long/fuzz.py                       20,000 mutations of each kind
    python tests/long/fuzz.py --tries=300           a short version
    python tests/long/fuzz.py --only=index --first=812 --tries=1      one mutation again, with its traceback

Each kind has a valid file and a way to read it. The file is mutated: bytes are flipped, removed, doubled or
cut off; in JSON, values are replaced, keys removed or renamed. The first two mutations of a kind are pickles
that would create a file if anything unpickled them. Reading must then succeed with a consistent result, or
raise UserError with a message of a few lines. Anything else is a failure: another exception, more than five
seconds, more than 2 GB of memory, a file outside of the folder, a pickle that ran.

Prints one line for each kind, with an example of each failure, and exits with 1 if there was any.
"""

import argparse
import copy
import gzip
import io
import json
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from stages import STEPS, child, ended, presets, pretrain, write_preset
from tqdm import tqdm

import config
import data
import sample
import train
from config import Config, UserError
from corpus.conversations import conversations, pairs_of, preferences
from corpus.sources import Documents
from evals import benchmarks
from model import SmolLM
from plumbing import checkpoint, disk, shards
from tokenizer import SPECIAL, Tokenizer, encode_bpe

ODD = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 2**70, -(2**65), 10**400, 0.5, 1e308, float("nan"),
       float("inf"), "", "x", "../../../etc/passwd", "/etc/passwd", "\0", "\ud800", "é" * 70, [], [[]], {},
       {"a": 1}, [1, 2], ["x", None], "x" * 5000]
PIECES = (b"\0", b"{", b"[", b'"', b"9" * 30, b"-", b"1e999", b"[" * 3000, b"\xff")
VALUES = ["", "0", "-1", "1", "7", "1e999", "nan", "None", "True", "x", "a:1", "a:0.5,b:0.5", "a:1@2", ":",
          "1/0", "3/64", "9" * 400, "1_000", "٣", "0x10", "cosine", "()", "\0", "builtin",
          "builtin:1e-9"]


def mutated_bytes(content, rng):
    """One to three accidents of a disk or a careless editor."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, kind = rng.randrange(len(content) + 1), rng.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at:at + rng.choice((1, 2, 10, 1000))]
        elif kind == 2:
            content[at:at] = content[at:at + rng.choice((1, 5, 100))]
        elif kind == 3:
            del content[at:]
        elif kind == 4:
            content[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
        else:
            content[at:at + 1] = rng.choice(PIECES)
    return bytes(content)


def mutated_value(value, rng):
    """A JSON value with one of its parts, at any depth, replaced, removed, renamed or doubled."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        value = copy.copy(value)
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.7:
            value[key] = mutated_value(value[key], rng)
        elif kind < 0.85:
            del value[key]
        elif isinstance(value, dict):
            value[rng.choice((key + "x", "name", ""))] = value[key]
        else:
            value.insert(key, value[key])
        return value
    return rng.choice(ODD)


def mutated(content, rng):
    """A mutation of a file's bytes, or of a value in it if it is JSON (or JSON lines)."""
    if rng.random() < 0.5:
        try:
            lines = content.splitlines() if content.count(b"\n{") > 1 else [content]
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(mutated_value(json.loads(lines[at]), rng)).encode()
            return b"\n".join(lines)
        except ValueError:
            pass
    return mutated_bytes(content, rng)


# ---------------------------------------------------------------------------------------------------------
# what is read: name -> (the file that is mutated, a function that reads it and checks the result)


def header(content, rng):
    """Mutations of a safetensors file's header, mostly with its length corrected."""
    (n,) = struct.unpack("<Q", content[:8])
    new = mutated(content[8:8 + n], rng)
    length = len(new) if rng.random() < 0.8 else rng.choice((0, 1, n, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + new + content[8 + n:]


class Pickle:
    """Unpickling it creates the file `ran`."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return Path.touch, (self.ran,)

    def planted(self):
        """The two forms in which weights used to be published."""
        torch.save(self, archive := io.BytesIO())
        return pickle.dumps(self), archive.getvalue()


class Kinds:
    """The valid files, which are made once, and their readers."""

    def __init__(self, folder):
        self.folder, made = folder, presets(folder)
        self.cfg = replace(made["pretrain"], out_dir=str(folder / "first"))
        preset = write_preset(folder / "pretrain.py", self.cfg)
        if ended(child(lambda: pretrain([preset]))):
            sys.exit("training does not run undisturbed")
        self.step = folder / "first" / "pretrain" / f"step_{STEPS:07}"
        self.tok = Tokenizer.load(folder / "tok")
        self.data = shards.shard_folder(self.cfg.sources[0], self.cfg, self.tok)
        self.shard = next(self.data.glob("train_*.bin"))
        checkpoint.load(self.step)  # before the clock runs: the first time, torch imports its compiler
        self.cut = folder / "cut"
        self.cut.mkdir()
        for path in self.step.iterdir():
            (self.cut / path.name).write_bytes(path.read_bytes())
        tensors = disk.read_tensors(self.cut / "model.safetensors")
        (self.cut / "model.safetensors").unlink()
        parts = {"model-1.safetensors": list(tensors)[:9], "model-2.safetensors": list(tensors)[9:]}
        for name, names in parts.items():
            disk.write_tensors(self.cut / name, {key: tensors[key] for key in names})
        disk.write_json(self.cut / "model.safetensors.index.json", {
            "metadata": {}, "weight_map": {key: name for name, names in parts.items() for key in names}})
        (folder / "questions").mkdir()
        question = {"question": "What do bees make?", "answerKey": "B",
                    "choices": {"text": ["milk", "honey"], "label": ["A", "B"]}}
        (folder / "questions" / "arc_easy.jsonl").write_text(f"{json.dumps(question)}\n" * 3)
        texts = (folder / "texts.jsonl").read_bytes().splitlines()[:9]
        (folder / "texts.jsonl.gz").write_bytes(gzip.compress(b"\n".join(texts)))
        for name in ("chats", "pairs"):
            lines = (folder / f"{name}.jsonl").read_bytes().splitlines()[:9]
            (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines))
        self.parquet(folder / "texts.parquet", [json.loads(line) for line in texts])
        self.ran = folder / "ran"
        self.pickles = Pickle(self.ran).planted()
        for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
            (self.step / name).write_bytes(self.pickles[1])
        self.all = {
            "config.json": (self.step / "config.json", self.model, mutated),
            "generation_config.json": (self.step / "generation_config.json", self.generation, mutated),
            "tokenizer.json": (self.step / "tokenizer.json", self.tokenizer, mutated),
            "tokenizer_config.json": (self.step / "tokenizer_config.json", self.tokenizer, mutated),
            "safetensors": (self.step / "model.safetensors", self.model, header),
            "index": (self.cut / "model.safetensors.index.json", self.model, mutated),
            "optimizer": (self.step / "optimizer.safetensors", self.resume, header),
            "train.json": (self.step / "train.json", self.resume, mutated),
            "B2SUMS": (self.step / "B2SUMS", self.resume, mutated),
            "log.jsonl": (self.step.parent / "log.jsonl", self.picture, mutated),
            "manifest": (next(self.data.glob("manifest_*.json")), self.batches, mutated),
            "shard": (self.shard, self.batches, mutated_bytes),
            "texts.jsonl": (folder / "texts.jsonl", self.texts, mutated),
            "texts.jsonl.gz": (folder / "texts.jsonl.gz", self.texts, mutated_bytes),
            "texts.parquet": (folder / "texts.parquet", self.texts, mutated_bytes),
            "chats.jsonl": (folder / "chats.jsonl", self.chats, mutated),
            "pairs.jsonl": (folder / "pairs.jsonl", self.pairs, mutated),
            "questions": (folder / "questions" / "arc_easy.jsonl", self.questions, mutated),
            "arguments": (None, self.arguments, None),
            "preset": (None, self.preset, None)}

    @staticmethod
    def parquet(path, rows):
        import pyarrow
        from pyarrow import parquet
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    def model(self, path):
        model, tok = checkpoint.load(path.parent)
        logits = model(torch.tensor([[1, 2, 3]]))
        assert logits.shape == (1, 3, model.cfg.vocab_size)
        assert tok.eos_id in tok.stop_ids and all(0 <= i for i in tok.stop_ids)

    def generation(self, path):
        args = sample.parse_args([str(path.parent)])
        settings = sample.settings_of(args, path.parent) | {"max_new_tokens": 2}
        model, tok = checkpoint.load(path.parent)
        assert len(list(sample.generate(model, [5, 6], **settings))) == 2
        assert tok.eos_id in tok.stop_ids and all(0 <= i for i in tok.stop_ids)

    def tokenizer(self, path):
        tok = Tokenizer.load(path.parent)
        text = f"the cat 12 {' '.join(SPECIAL)} é"
        ids = tok.encode(text)
        assert all(0 <= i < tok.vocab_size for i in ids) and len(tok.decode(ids)) <= 10 * len(text)
        assert not {tok.tokens[i] for i in ids} & set(SPECIAL)
        merges = json.loads(tok.rust.to_str())["model"]["merges"]
        tokens = encode_bpe(text, {tuple(pair): rank for rank, pair in enumerate(merges)})
        assert ids == [i for i in map(tok.rust.token_to_id, tokens) if i is not None]
        messages = [{"role": "user", "content": "the cat"}]
        assert len(tok.chat(messages)[0]) == len(tok.chat(messages)[1])

    def resume(self, path):
        found = checkpoint.damage(path.parent)
        assert found is None or isinstance(found, str) and str(path.parent) in found
        before = disk.read_json(path.parent / "train.json").get("config")
        if not found:
            assert isinstance(before, dict)
        model = SmolLM(self.cfg)
        optimizers = train.make_optimizers(model, self.cfg)
        checkpoint.load_step(path.parent, model, optimizers)
        loss = model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    def picture(self, path):
        for line in disk.read_lines(path):
            assert isinstance(line, dict)

    def batches(self, path):
        batches = data.Batches(self.cfg, self.tok)
        for i in (0, 7):
            for split in ("train", "val"):
                if (batch := batches(split, i)) is not None:
                    assert all(0 <= part.min() and part.max() < self.cfg.vocab_size for part in batch[:2])
        assert batches.n_rows() > 0 and batches.bytes_per_token() >= 0

    def source(self, path):
        return replace(self.cfg, data=((str(path), 1.0),))

    def texts(self, path):
        for text in Documents(str(path), self.source(path)):
            assert self.tok.encode(text)

    def chats(self, path):
        for messages in conversations(self.source(path))[0]:
            assert isinstance(messages, str) or self.tok.chat(messages)[0]

    def pairs(self, path):
        for prompt, chosen, rejected in pairs_of(preferences(self.source(path))[0]):
            assert prompt and self.tok.encode(chosen) and self.tok.encode(rejected)

    def questions(self, path):
        assert benchmarks.items("arc_easy", folder=path.parent)

    def arguments(self, rng):
        """A command line with one to four fields and arbitrary values."""
        words = [f"--{rng.choice([*Config.__dataclass_fields__, 'lrr', ''])}={rng.choice(VALUES)}"
                 for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.2:
            words.append(rng.choice(("--lr", "config/no.py", "-x", "=", "--", "config/demo.py", "config")))
        cfg = config.load(["config/demo.py", *words])
        assert cfg.head_dim > 0 and cfg.n_params > 0
        assert train.lr_at(1, replace(cfg, max_steps=cfg.max_steps or 10**6)) >= 0

    def preset(self, rng):
        """A preset with odd values for one to three of its fields."""
        names = rng.sample(list(Config.__dataclass_fields__), rng.randint(1, 3))
        fields = ", ".join(f"{name}={rng.choice(ODD)!r}" for name in names)
        path, begin = self.folder / "odd.py", "from math import inf, nan\nfrom config import Config\n"
        path.write_text(f"{begin}config = Config({fields})\n", encoding="utf-8", errors="ignore")
        config.load([str(path)])


# ---------------------------------------------------------------------------------------------------------


def outside(folder):
    """A list of the absolute paths that are opened outside of folder, the project and the system."""
    opened, root = [], str(Path(__file__).parents[2])
    allowed = (str(folder), sys.prefix, sys.base_prefix, root, "/proc", "/dev", "/sys", "/usr", "/lib")

    def hook(name, args):
        path = args[0] if name == "open" and isinstance(args[0], str) else ""
        if path.startswith("/") and not path.startswith(allowed):
            opened.append(path)
    sys.addaudithook(hook)
    return opened


def attempt(kinds, name, number, opened):
    """Try mutation `number` of a kind: None, or (kind of failure, its traceback)."""
    rng, (path, read, mutate) = random.Random(f"{name} {number}"), kinds.all[name]
    valid = path.read_bytes() if path else b""
    opened.clear()
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        if path:
            path.write_bytes(kinds.pickles[number] if number < 2 else mutate(valid, rng))
        read(path or rng)
    except UserError as error:
        if len(str(error).splitlines()) > 12:
            return "a long message", str(error)
    except BaseException as error:  # a panic in the tokenizer's library is not an Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:150]}", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if path:
            path.write_bytes(valid)
    if kinds.ran.exists():
        kinds.ran.unlink()
        return "a pickle ran", name
    return ("a file outside of the folder", str(opened)) if opened else None


def too_slow(*_):
    raise TimeoutError("five seconds have passed")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20_000, help="of each kind (default 20,000)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one")
    parser.add_argument("--only", help="one kind")
    args, bad = parser.parse_args(), 0
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_slow)
    with tempfile.TemporaryDirectory() as name:
        kinds = Kinds(Path(name))
        opened = outside(name)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30, -1))
        for kind in [args.only] if args.only else kinds.all:
            failures, example, began = Counter(), {}, time.monotonic()
            for number in tqdm(range(args.first, args.first + args.tries), kind, leave=False, mininterval=1):
                if found := attempt(kinds, kind, number, opened):
                    failures[found[0]] += 1
                    example.setdefault(found[0], (number, found[1]))
            print(f"{kind:<24}{args.tries:>7,} tries {failures.total():>6,} failures   "
                  f"{time.monotonic() - began:.0f} s", flush=True)
            for what, count in failures.most_common():
                number, trace = example[what]
                print(f"    {count:,} times, number {number}: {what}")
                if args.tries == 1:
                    print(trace)
            bad += failures.total()
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()

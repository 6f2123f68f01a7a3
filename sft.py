"""
sft.py: from a model that continues text to one that answers (supervised fine-tuning).

The loop is that of train.py, and so is the loss. The rows differ: they are conversations in the chat
template, and only what the assistant says is a target, its words and the <|im_end|> that follows:

    <|im_start|>user⏎hello<|im_end|>⏎<|im_start|>assistant⏎Hello! How can I help you?<|im_end|>⏎
                                                           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^

So the model learns what to say once it is its turn, and when to stop. The user's words are read but not
learned: it should answer questions, not ask them. Whole documents among the chats, learned as in pretraining,
and a gentle learning rate keep what it knows; fine-tuning can make a model forget within minutes.

Padding every chat to the longest would waste most of the work. Rows are filled like boxes instead, the
longest chats first, each into the first row that still has room (first-fit decreasing, Johnson 1973). Chats
do not see each other:

    row 0   | a long chat about animals          | hello        | 1+1=   |
    row 1   | a story                        | a function            | ..|    .. padding, a few positions

    python sft.py config/demo_sft.py            writes out/demo/sft/step_.../           next: corpus/pairs.py
"""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import numpy as np
import torch
from tqdm import tqdm

import config
from config import Config, UserError
from corpus.conversations import SCHEMAS, conversations
from corpus.hub import Hub
from corpus.sources import READING, Documents, account, changed_code, code_digest, describe, locate
from data import batch_rows, n_steps
from model import IGNORE, SmolLM
from plumbing import checkpoint, disk
from plumbing.processes import command, start
from tokenizer import Tokenizer
from train import fit, loss_fn

PROMPTS = ("hello", "1+1=", "What is the capital of Italy?", "47+38=", "Who are you?")
GROUP = 20_000  # chats that are packed together: so many are in memory at a time

# ---------------------------------------------------------------------------------------------------------
# chats -> rows


def encode_chat(messages: list[dict[str, str]], tok: Tokenizer, T: int,
                train_on_prompts: bool = False) -> tuple[list[tuple[list[int], list[int]]], int]:
    """A chat -> ([(ids, targets)], up to T each, how many answers were lost because they did not fit).

    A question of two ids, and an answer of one with its end E (the template left out):

        q q a E  ->  ids q q a, targets - a E

    A chat that is too long ends with the last answer that fits; [] if not even the first one does. Positions
    after the last target are dropped: nothing is learned there.
    """
    ids, mask = tok.chat(messages)
    ends = [i for i, token in enumerate(ids) if mask[i] and token == tok.im_end_id]  # of the answers
    fitting = [end for end in ends if end <= T]
    if not fitting:
        return [], len(ends)
    targets = [token if is_target or train_on_prompts else IGNORE for token, is_target in zip(ids, mask)]
    last = min(fitting[-1] + 1, T) if train_on_prompts else fitting[-1]  # + 1: its line break
    # shifted by one: position t predicts id t + 1
    return [(ids[:last], targets[1:last + 1])], len(ends) - len(fitting)


def encode_text(text: str, tok: Tokenizer, T: int) -> list[tuple[list[int], list[int]]]:
    """A document, of which everything is a target -> [(ids, targets)] in pieces of up to T."""
    ids = [*tok.encode(text), tok.eos_id]
    inputs, targets = ids[:-1], ids[1:]
    return [(inputs[i:i + T], targets[i:i + T]) for i in range(0, len(inputs), T)]


def first_fit_decreasing(sizes: list[int], T: int) -> list[list[int]]:
    """Which items share a row: ([200, 100, 60, 50], T=256) -> [[0, 3], [1, 2]]."""
    rows: list[list[int]] = []
    room = np.full(len(sizes), T)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = int(np.argmax(room[:len(rows) + 1] >= sizes[i]))  # the first one with room; the last one is new
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        room[row] -= sizes[i]
    return rows


def fill_rows(chats: list[tuple[list[int], list[int]]], T: int) -> np.ndarray:
    """[(ids, targets), ...] -> ids, targets, doc (N, T) in one array (3, N, T)."""
    rows = first_fit_decreasing([len(ids) for ids, _ in chats], T)
    arrays = np.zeros((3, len(rows), T), dtype=np.int32)
    arrays[1] = IGNORE
    for r, row in enumerate(rows):
        start = 0
        for number, i in enumerate(row):
            ids, targets = chats[i]
            arrays[:, r, start:start + len(ids)] = ids, targets, [number] * len(ids)
            start += len(ids)
        arrays[2, r, start:] = len(row)  # padding is a document of its own
    return arrays


class ChatBatches:
    """get_batch(split, i): micro-batch i of this device as (ids, targets, doc), (B, T) each."""

    def __init__(self, folder: Path, cfg: Config, rank: int = 0, world: int = 1) -> None:
        self.folder, self.cfg, self.rank, self.world = folder, cfg, rank, world
        form = {"train rows": int, "val rows": int, "sources": []}
        self.counts = disk.read_json(folder / "counts.json", form)
        self.rows = {}
        for split in ("train", "val"):
            shape = (self.counts[f"{split} rows"], cfg.seq_len)
            files = [folder / f"{split}_{name}.bin" for name in ("ids", "targets", "doc") if shape[0]]
            for file in files:
                if not file.exists() or file.stat().st_size != 4 * shape[0] * shape[1]:
                    raise UserError(f"{file} is damaged: delete {folder}, and it is made again")
            self.rows[split] = [np.memmap(file, np.int32, "r", shape=shape) for file in files]
        if not self.rows["train"]:
            raise UserError("there is no chat to train on:\n" + self.summary())

    def __call__(self, split: str, i: int) -> tuple[torch.Tensor, ...] | None:
        rows = batch_rows(self.cfg, split, i, self.rank, self.world, self.counts[f"{split} rows"])
        arrays = [array[rows].astype(np.int64) for array in self.rows[split]]
        return tuple(map(torch.from_numpy, arrays)) if rows else None

    def summary(self) -> str:
        """What went in, and for each source what was left out, and why."""
        lines = []
        for split in ("train", "val"):
            chats, documents, rows, positions = (self.counts.get(f"{split} {name}", 0) for name in
                                                 ("chats", "documents", "rows", "positions"))
            full = f", {positions / (rows * self.cfg.seq_len):.1%} full" if rows else ""
            lines.append(f"  {split:5}  {chats:,} chats and {documents:,} documents in {rows:,} rows{full}")
        lines += [account(**state) for state in self.counts["sources"]]
        said = changed_code(self.counts.get("code"), CODE, self.folder)
        return "\n".join([*lines, said] if said else lines)


# ---------------------------------------------------------------------------------------------------------
# the chats of a run: files and messages; skip the rest at a first reading


CODE = (*READING, *SCHEMAS, "tokenizer.py", "sft.py")  # what makes rows of records


def rows_folder(cfg: Config, tok: Tokenizer) -> Path:
    """The folder of the packed rows. Its name hashes all they depend on, so stale ones are never read."""
    sources = [[describe(source, cfg), fraction] for source, fraction in cfg.data]
    recipe = json.dumps([sources, tok.digest(), cfg.data_seed, cfg.val_fraction, cfg.seq_len,
                         cfg.train_on_prompts, cfg.ignore, cfg.documents, tok.template])
    return Path(cfg.out_dir) / "data" / f"chats-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}"


def pack(cfg: Config, tok: Tokenizer) -> Path:
    """Write the rows of all chats of a config, unless that is done; returns their folder."""
    folder, T, counts = rows_folder(cfg, tok), cfg.seq_len, Counter({"train rows": 0, "val rows": 0})
    with disk.lock(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():
            return folder
        sources = conversations(cfg)
        items = ((documents, item) for documents in sources for item in documents)
        chats = tqdm(items, "packing chats", unit=" chats", disable=None)
        with disk.new_folder(folder) as new:
            while group := list(islice(chats, GROUP)):
                parts: dict[str, list] = {"train": [], "val": []}
                for documents, item in group:
                    kind = "documents" if isinstance(item, str) else "chats"
                    for split, part in documents.split(item):
                        pieces = encode_item(part, tok, cfg, documents)
                        parts[split] += pieces
                        counts[f"{split} {kind}"] += bool(pieces)
                for split, pieces in parts.items():
                    arrays = fill_rows(pieces, T)
                    counts[f"{split} rows"] += arrays.shape[1]
                    counts[f"{split} positions"] += sum(len(ids) for ids, _ in pieces)
                    for name, array in zip(("ids", "targets", "doc"), arrays):
                        with disk.writable(folder), open(new / f"{split}_{name}.bin", "ab") as file:
                            file.write(array.tobytes())
            states = [documents.state() for documents in sources]
            disk.write_json(new / "counts.json", {**counts, "sources": states, "code": code_digest(*CODE)})
    return folder


def encode_item(item: list | str, tok: Tokenizer, cfg: Config,
                documents: Documents) -> list[tuple[list[int], list[int]]]:
    """The pieces of a chat or document; what does not fit into a row is counted in `documents`."""
    if isinstance(item, str):
        return encode_text(item, tok, cfg.seq_len)
    pieces, lost = encode_chat(item, tok, cfg.seq_len, cfg.train_on_prompts)
    if item[-1]["role"] == "user":
        documents.notes["end with a question, which is not used"] += 1
    if not pieces:
        documents.left_out[f"their first answer ends after seq_len={cfg.seq_len} ids"] += 1
    elif lost:
        documents.notes[f"lost their last answers, which end after seq_len={cfg.seq_len} ids"] += 1
    return pieces


def load_chat_model(cfg: Config, stage: str) -> tuple[Config, SmolLM, Tokenizer]:
    """(cfg, model, tok) of cfg.init_from; from here on <|im_end|> ends what the model says."""
    hint = disk.command_for(Path(cfg.out_dir) / stage)
    if not cfg.fractions:
        raise UserError(f"this config is for train.py: its `data` are weights, and {stage}.py needs "
                        f"fractions of chats or pairs: run {hint}")
    if not cfg.init_from:
        raise UserError(f"{stage}.py continues from a model: name it with --init_from=out/demo/pretrain")
    if cfg.part != "1/1":
        raise UserError(f"--part={cfg.part} is for documents, which machines can share: leave it out")
    start = checkpoint.start_of(cfg, stage)
    tok = Tokenizer.load(start).for_chat()
    tok.with_default_system([])  # an unknown chat template is an error before any chat is read
    loaded, model = checkpoint.initial_model(replace(cfg, init_from=str(start)))
    return replace(loaded, init_from=cfg.init_from), model, tok


def ask(tok: Tokenizer, text: str) -> list[int]:
    """The ids of a question, up to where the answer begins."""
    return tok.chat([{"role": "user", "content": text}], add_generation_prompt=True)[0]


def prepare(cfg: Config) -> None:
    """Pack the chats of a config: python data.py config/smol_135m_sft.py"""
    cfg, _, tok = load_chat_model(cfg, "sft")
    folder = pack(cfg, tok)
    print(f"{folder}\n{ChatBatches(folder, cfg).summary()}")


def main(argv: list[str]) -> None:
    cfg = config.load(argv)
    with start("sft", cfg) as run:
        cfg, model, tok = load_chat_model(cfg, "sft")
        from_hub = [source for source in cfg.sources if isinstance(locate(source), Hub)]
        if from_hub and not rows_folder(cfg, tok).exists():
            raise UserError(f"the chats of {', '.join(from_hub)} are not ready: prepare them with python "
                            f"data.py {' '.join(argv)}, or train on the built-in chats with --data=builtin")
        run.rank_0_first(lambda: pack(cfg, tok))
        batches = ChatBatches(rows_folder(cfg, tok), cfg, run.rank, run.world)
        cfg = replace(cfg, max_steps=cfg.max_steps or n_steps(cfg, batches.counts["train rows"]))
        run.say(f"{batches.summary()}\n{cfg.length} from {cfg.init_from}")
        fit(cfg, run, model, tok, batches, loss_fn, {text: ask(tok, text) for text in PROMPTS})


if __name__ == "__main__":
    command(main)

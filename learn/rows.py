"""
rows.py: which rows did a step of a run see? Part of learn/look.py.

Which rows make up a step is arithmetic (data.py), so nothing has to be trained again for the answer.
"""

import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import dpo
import sft
from config import Config, UserError
from data import Batches, draw_row, n_steps
from model import IGNORE
from plumbing import checkpoint
from tokenizer import Tokenizer, load_or_train

Document = list[tuple[int, bool]]  # its ids, and whether each is a target


def documents_of(ids: list[int], targets: list[int], doc: list[int]) -> Iterator[Document]:
    """The documents of a packed row. Each token is shown once, whether it is read, a target, or both."""
    for _, group in groupby(range(len(ids)), key=doc.__getitem__):
        places = list(group)
        found = [(ids[places[0]], False)]
        for t in places:
            if targets[t] != IGNORE:
                found.append((targets[t], True))
            elif t < places[-1]:
                found.append((ids[t + 1], False))
        if any(is_target for _, is_target in found):  # padding has none
            yield found


def cut_after(ids: list[int], eos_id: int) -> list[Document]:
    """The documents of a row of pretraining, in which all is learned: each ends with eos_id."""
    ends = [t + 1 for t, i in enumerate(ids) if i == eos_id and t + 1 < len(ids)]
    return [[(i, True) for i in ids[start:end]] for start, end in zip([0, *ends], [*ends, len(ids)])]


def rows_of_step(cfg: Config, step: int) -> tuple[Tokenizer, list[tuple[str, list[Document]]]]:
    """The rows that a step, counted from 1 as in the log, saw: (tok, [(what it is, its documents)])."""
    if cfg.fractions:
        return chat_rows(cfg, step)
    if not (cfg.tokenizer or cfg.init_from or (Path(cfg.out_dir) / "tokenizer" / "recipe.json").exists()):
        raise UserError(f"there is no tokenizer in {cfg.out_dir}, so no run has seen rows there: make them "
                        "with data.py and the same preset")
    cfg, _ = checkpoint.initial_model(cfg)
    tok = load_or_train(cfg)
    batches, found = Batches(cfg, tok), []
    for d in draws_of(cfg, step, batches.n_rows()):
        source, row = batches.where("train", d)
        ids = batches.rows["train", source][row].tolist()
        found.append((f"draw {d}: {source}, row {row}", cut_after(ids, tok.eos_id)))
    return tok, found


def chat_rows(cfg: Config, step: int) -> tuple[Tokenizer, list[tuple[str, list[Document]]]]:
    """rows_of_step for sft.py and dpo.py. Packed chats or pairs: whichever were made for this config."""
    cfg, _, tok = sft.load_chat_model(cfg, "sft")
    folder, file, found = sft.rows_folder(cfg, tok), dpo.pairs_file(cfg, tok), []
    if folder.exists():
        rows = sft.ChatBatches(folder, cfg).rows["train"]
        for d, row in drawn(cfg, step, len(rows[0])):
            packed = documents_of(*(array[row].tolist() for array in rows))
            found.append((f"draw {d}: row {row}", list(packed)))
    elif file.exists():
        pairs = dpo.Pairs(cfg, tok).pairs["train"]
        for d, row in drawn(cfg, step, len(pairs)):
            both = [next(documents_of(ids, targets, [0] * len(ids))) for ids, targets in pairs[row]]
            found.append((f"draw {d}: pair {row}, the chosen answer and the rejected one", both))
    else:
        raise UserError(f"no run of this config has rows: neither {folder} nor {file} exists. Give the "
                        "preset and the flags of the run, or train first")
    return tok, found


def drawn(cfg: Config, step: int, n: int) -> Iterator[tuple[int, int]]:
    """(draw, row) of a step that draws from n rows."""
    return ((d, draw_row(d, [n], cfg.data_seed, "train")) for d in draws_of(cfg, step, n))


def draws_of(cfg: Config, step: int, n_rows: int) -> range:
    last = math.inf if cfg.max_seconds else cfg.max_steps or n_steps(cfg, n_rows)
    if not 1 <= step <= last:
        raise UserError(f"--step={step} must be from 1 to {last}, the number of steps of this run")
    return range((step - 1) * cfg.batch, step * cfg.batch)

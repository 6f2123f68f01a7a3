"""python train.py config/demo.py --data=book.txt: own texts need no other command before it."""

import json

import numpy as np
import pyarrow
import pytest
from conftest import WORDS
from pyarrow import parquet

from corpus.sources import split_of
from tokenizer import Tokenizer

FLAGS = ("config/demo.py --vocab_size=300 --n_layer=1 --d_model=32 --d_ff=64 --seq_len=32 --max_steps=2"
         " --batch=4 --micro_batch=4 --eval_batches=1 --sample_every=0 --val_fraction=0.2").split()
BOOK = "\n".join(f"{i}. The {WORDS[i % 17]} and the {WORDS[i * 5 % 17]}." for i in range(400))
PAGES = [f"Page {i}: the {WORDS[i % 17]} saw the {WORDS[i * 5 % 17]}. " * 9 for i in range(60)]


def write(folder, kind):
    """The texts as a user has them: one book, a folder of pages, or a file of pages."""
    path = folder / {"book": "book.txt", "folder": "pages"}.get(kind, f"pages.{kind}")
    if kind == "book":
        path.write_text(BOOK)
    elif kind == "folder":
        path.mkdir()
        for i, page in enumerate(PAGES):
            (path / f"{i:02}.txt").write_text(page)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": page}) + "\n" for page in PAGES))
    else:
        parquet.write_table(pyarrow.table({"text": PAGES}), path)
    return path


def texts_of(out, split):
    """The texts in the shards of a split."""
    tok = Tokenizer.load(out / "tokenizer")
    (shard,) = (out / "data").glob(f"*/{split}_*.bin")
    return tok.decode(np.fromfile(shard, np.uint16).tolist()).split("<|endoftext|>")[:-1]


@pytest.mark.parametrize("kind", ["book", "folder", "jsonl", "parquet"])
def test_training_prepares_what_it_needs_and_keeps_a_part_for_validation(kind, tmp_path, run_here):
    """Of a book its end; of many texts some."""
    source, out = write(tmp_path, kind), tmp_path / "out"
    code, said, err = run_here("train.py", *FLAGS, f"--data={source}", f"--out_dir={out}")
    assert code == 0, err
    assert "training a tokenizer of 300 ids" in said and f"preparing the tokens of {source}" in said
    train, val = texts_of(out, "train"), texts_of(out, "val")
    if kind == "book":
        assert "".join(train + val) == BOOK and len(train) == len(val) == 1
        assert 0.2 <= len(val[0]) / len(BOOK) < 0.25 and train[0].endswith("\n")
    else:
        assert sorted(train + val) == sorted(PAGES)
        assert set(val) == {page for page in PAGES if split_of(page, 0.2) == "val"}
    last = json.loads((out / "pretrain" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and 0 < last["val_bits_per_byte"] < 9


def test_where_something_else_was_learned_nothing_is_touched_and_another_folder_is_named(tmp_path, run_here):
    out = tmp_path / "out"
    argv = [*FLAGS, f"--out_dir={out}"]
    assert run_here("train.py", *argv, f"--data={write(tmp_path, 'jsonl')}")[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, said, err = run_here("train.py", *argv, f"--data={write(tmp_path, 'book')}")
    assert code == 2 and f"Choose another --out_dir, such as --out_dir={out.as_posix()}_book, " in err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert run_here("train.py", *argv, f"--data={tmp_path / 'book.txt'}", f"--out_dir={out}_book")[0] == 0

"""data.py and mixture.py: documents -> shards -> rows -> batches."""

import json
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_texts

import data
from config import UserError
from mixture import Order, shuffled

ROOT = Path(__file__).parent.parent


def counting_shards(folder, tok, sizes):
    """Shards that hold 0, 1, 2, ...: the right answers are visible."""
    folder.mkdir(parents=True)
    first = 0
    for part, size in enumerate(sizes, 1):
        ids = np.arange(first, first + size, dtype=np.uint16)
        ids.tofile(folder / f"train_{part}.bin")
        (folder / f"val_{part}.bin").write_bytes(b"")
        shard = {
            "train": {"file": f"train_{part}.bin", "tokens": size, "documents": 1, "bytes": size},
            "val": {"file": f"val_{part}.bin", "tokens": 0, "documents": 0, "bytes": 0},
        }
        manifest = {"tokenizer": tok.digest(), "complete": True, "shards": [shard]}
        (folder / f"manifest_{part}of{len(sizes)}.json").write_text(json.dumps(manifest))
        first += size
    return folder


def test_a_row_is_a_window_of_T_plus_1_ids_and_the_next_one_begins_T_later(tmp_path, tok):
    rows = data.Rows(counting_shards(tmp_path / "s", tok, [21, 12]), "train", 5, tok)
    assert [row.tolist() for row in map(rows.__getitem__, range(len(rows)))] == [
        [0, 1, 2, 3, 4, 5],
        [5, 6, 7, 8, 9, 10],
        [10, 11, 12, 13, 14, 15],
        [15, 16, 17, 18, 19, 20],
        [21, 22, 23, 24, 25, 26],
        [26, 27, 28, 29, 30, 31],
    ]


def test_every_target_is_the_next_token_and_doc_counts_the_ends_before_a_position(small, tok):
    data.write_shards(small.sources[0], small, tok)
    batches = data.Batches(small, tok)
    for i in range(20):
        ids, targets, doc = batches("train", i)
        assert ids.shape == targets.shape == doc.shape == (4, 32) and ids.dtype == torch.int64
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        for row, numbers in zip(ids.tolist(), doc.tolist(), strict=True):
            assert numbers == [row[:t].count(tok.eos_id) for t in range(32)]


def test_all_documents_are_written_once_each_closed_and_none_is_in_both_splits(small, tok):
    data.write_shards(small.sources[0], small, tok)
    folder = data.shard_folder(small.sources[0], small, tok)
    texts = {}
    for split in ("train", "val"):
        ids = np.fromfile(next(folder.glob(f"{split}_*.bin")), dtype=np.uint16).tolist()
        assert ids[-1] == tok.eos_id
        texts[split] = tok.decode(ids).removesuffix("<|endoftext|>").split("<|endoftext|>")
    lines = Path(small.sources[0]).read_text(encoding="utf-8").splitlines()
    expected = [json.loads(line)["text"] for line in lines]
    assert sorted(texts["train"] + texts["val"]) == sorted(expected)
    assert not set(texts["train"]) & set(texts["val"])
    assert 5 < len(texts["val"]) < 80  # a tenth of 300, give or take


def test_equal_documents_are_on_the_same_side():
    assert {data.split_of(b"twice", 0.5) for _ in range(5)} == {data.split_of(b"twice", 0.5)}
    share = sum(data.split_of(str(i).encode(), 0.25) == "val" for i in range(4000)) / 4000
    assert abs(share - 0.25) < 0.03


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_shuffled_is_a_permutation_and_the_key_changes_it(n):
    assert sorted(shuffled(i, n, 5) for i in range(n)) == list(range(n))
    if n > 7:
        orders = {tuple(shuffled(i, n, key) for i in range(n)) for key in range(4)}
        assert len(orders) == 4 and tuple(range(n)) not in orders


def test_shuffled_rows_are_found_among_300_million_without_an_array():
    assert len({shuffled(i, 300_000_000, 1) for i in range(5000)}) == 5000
    halves = sum(shuffled(i, 300_000_000, 1) < 150_000_000 for i in range(5000)) / 5000
    assert abs(halves - 0.5) < 0.03


def test_every_block_of_1000_draws_gives_each_source_exactly_its_weight():
    order = Order([(0, {"a": 0.7, "b": 0.295, "c": 0.005})], batch=8, seed=1)
    for number in range(3):
        drawn = Counter(order(d)[0] for d in range(1000 * number, 1000 * number + 1000))
        assert drawn == {"a": 700, "b": 295, "c": 5}
    assert [order(d)[0] for d in range(1000)] != [order(d)[0] for d in range(1000, 2000)]


def test_the_number_of_earlier_draws_is_right_also_across_changes_of_the_mixture():
    order = Order(
        [(0, {"a": 0.5, "b": 0.5}), (210, {"a": 0.2, "c": 0.8}), (333, {"b": 1.0})], batch=7, seed=1
    )
    seen = Counter()
    for d in range(5000):
        source, k = order(d)
        assert k == seen[source]
        assert source in (("a", "b") if d < 1470 else ("a", "c") if d < 2331 else ("b",))
        seen[source] += 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_visits_every_row_exactly_once_on_1_2_and_3_ranks(small, tok, world):
    data.write_shards(small.sources[0], small, tok)
    cfg = replace(small, batch=12, micro_batch=2)
    ranks = [data.Batches(cfg, tok, rank, world) for rank in range(world)]
    n = len(ranks[0].rows["train", cfg.sources[0]])
    seen = []
    for i in range(2 * n // (2 * world) + 1):
        for batches in ranks:
            seen += [tuple(row) for row in batches("train", i)[0].tolist()]
    rows = ranks[0].rows["train", cfg.sources[0]]
    everything = sorted(tuple(rows[i][:-1].tolist()) for i in range(n))
    assert sorted(seen[:n]) == everything and sorted(seen[n : 2 * n]) == everything
    assert seen[:n] != seen[n : 2 * n]  # the second epoch has an order of its own


def test_two_sources_of_different_length_each_have_their_own_epochs(tmp_path, small, tok):
    other = write_texts(tmp_path / "other.jsonl", 120, seed=9)
    cfg = replace(small, data=((small.sources[0], 0.25), (other, 0.75)))
    for source in cfg.sources:
        data.write_shards(source, cfg, tok)
    batches = data.Batches(cfg, tok)
    seen = {source: [] for source in cfg.sources}
    for d in range(4000):
        source, row = batches.where("train", d)
        seen[source].append(row)
    assert len(seen[other]) == 3000
    for source, drawn in seen.items():
        n = len(batches.rows["train", source])
        for epoch in range(len(drawn) // n):
            assert sorted(drawn[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_the_order_of_rows_does_not_depend_on_the_number_of_devices(small, tok):
    data.write_shards(small.sources[0], small, tok)

    def step(world, micro):
        cfg = replace(small, batch=12, micro_batch=micro)
        parts = [data.Batches(cfg, tok, rank, world) for rank in range(world)]
        n = cfg.micro_steps(world)
        return torch.cat([batches("train", 5 * n + m)[0] for m in range(n) for batches in parts])

    assert torch.equal(step(1, 12), step(1, 3))
    assert torch.equal(step(1, 12), step(2, 3)) and torch.equal(step(1, 12), step(3, 2))


def test_the_next_item_is_made_while_the_caller_is_busy_but_the_first_by_the_caller_itself():
    """So that Ctrl-C stops a source whose first item takes hours; also where one ahead() is in another."""
    makers, made = [], [threading.Event() for _ in range(4)]

    def items():
        for i in range(4):
            makers.append(threading.get_ident())
            made[i].set()
            yield i

    seen = []
    for i in data.ahead(data.ahead(items())):
        seen.append(i)
        assert all(event.wait(10) for event in made[:i + 2])  # nobody has asked for item i + 1 yet
    assert seen == [0, 1, 2, 3] and list(data.ahead([])) == []
    assert makers[0] == threading.get_ident() and makers[0] not in makers[1:]


def test_an_item_that_cannot_be_made_is_told_to_the_caller_in_its_turn():
    def items():
        yield "good"
        raise UserError("bad")

    seen = data.ahead(items())
    assert next(seen) == "good"
    with pytest.raises(UserError, match="bad"):
        next(seen)


def test_an_interrupted_tokenisation_goes_on_and_gives_the_same_files(small, tok, monkeypatch):
    monkeypatch.setattr(data, "SHARD_TOKENS", 2000)
    monkeypatch.setattr(data, "BATCH_CHARACTERS", 1000)
    whole = replace(small, out_dir=small.out_dir + "_whole")
    data.write_shards(small.sources[0], whole, tok)
    put, calls = data.checkpoint.put, []

    def break_down(temporary, path):
        calls.append(path)
        if len(calls) == 8:
            raise KeyboardInterrupt
        put(temporary, path)

    monkeypatch.setattr(data.checkpoint, "put", break_down)
    with pytest.raises(KeyboardInterrupt):
        data.write_shards(small.sources[0], small, tok)
    folders = [data.shard_folder(small.sources[0], cfg, tok) for cfg in (small, whole)]
    with pytest.raises(UserError, match="still being made"):
        data.Rows(folders[0], "train", 32, tok)
    data.write_shards(small.sources[0], small, tok)
    contents = [{path.name: path.read_bytes() for path in folder.glob("*")} for folder in folders]
    assert contents[0] == contents[1] and len(contents[0]) > 6


def test_parts_made_on_several_machines_are_together_the_whole(small, tok):
    for part in ("1/3", "2/3"):
        data.write_shards(small.sources[0], replace(small, shard=part), tok)
    folder = data.shard_folder(small.sources[0], small, tok)
    with pytest.raises(UserError, match="not whole"):
        data.Rows(folder, "train", 32, tok)
    data.write_shards(small.sources[0], replace(small, shard="3/3"), tok)
    rows = [data.Rows(folder, split, 32, tok) for split in ("train", "val")]
    assert rows[0].documents + rows[1].documents == 300


def test_a_truncated_shard_and_another_tokenizer_are_one_clear_sentence(tmp_path, tok):
    folder = counting_shards(tmp_path / "s", tok, [21])
    manifest = json.loads((folder / "manifest_1of1.json").read_text())
    (folder / "manifest_1of1.json").write_text(json.dumps({**manifest, "tokenizer": "other"}))
    with pytest.raises(UserError, match="made with another tokenizer: other"):
        data.Rows(folder, "train", 5, tok)
    (folder / "manifest_1of1.json").write_text(json.dumps(manifest))
    (folder / "train_1.bin").write_bytes(b"12345")
    with pytest.raises(UserError, match="damaged: it has 5 bytes, and its manifest says 42"):
        data.Rows(folder, "train", 5, tok)


def test_shards_are_found_by_source_and_tokenizer(small, tok):
    bigger = type(tok).train(["the cat"], 280)
    assert data.shard_folder("builtin", small, tok) != data.shard_folder("builtin", small, bigger)
    assert data.shard_folder("builtin", small, tok) != data.shard_folder("builtin-docs", small, tok)


def test_special_tokens_in_documents_stay_text(tmp_path, small, tok):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "a <|endoftext|> b <|im_start|> \ud800"}) + "\n")
    cfg = replace(small, data=((str(path), 1.0),), val_fraction=0.0)
    data.write_shards(str(path), cfg, tok)
    ids = np.fromfile(
        next(data.shard_folder(str(path), cfg, tok).glob("train_*.bin")), dtype=np.uint16
    ).tolist()
    assert [i for i in ids if i < 17] == [tok.eos_id] and ids[-1] == tok.eos_id
    assert "�" in tok.decode(ids)


def test_foreign_data_that_is_not_prepared_names_both_ways_on():
    command = [sys.executable, "train.py", "config/smol_135m.py", "--out_dir=out/not_there"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "python data.py config/smol_135m.py" in done.stderr and "--data=builtin" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the high-water mark of one program")
def test_memory_stays_flat_as_the_input_grows(tmp_path, tok):
    """The high-water mark of tokenising 80 MB is that of 12 MB: neither texts nor ids are kept."""
    tok.save(tmp_path / "tok")
    peaks = []
    for n in (6_000, 40_000):
        source = write_texts(tmp_path / f"{n}.jsonl", n, words=400)
        options = [
            "config/demo.py",
            f"--data={source}",
            f"--tokenizer={tmp_path / 'tok'}",
            f"--out_dir={tmp_path / str(n)}",
        ]
        code = (
            "import sys, data; data.main(sys.argv[1:]); "
            "print(open('/proc/self/status').read())"  # ru_maxrss would include this process, the parent
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split("VmHWM:")[1].split()[0]) / 2**10)
    assert peaks[1] < peaks[0] + 64, f"{peaks} MB"


def test_a_file_too_short_for_a_row_is_said_and_one_without_validation_trains(tmp_path, small, tok, capsys):
    path = tmp_path / "one.txt"
    path.write_text("the cat sat. " * 100)
    cfg = replace(small, data=((str(path), 1.0),))
    data.write_shards(str(path), cfg, tok)
    assert data.Batches(cfg, tok)("val", 0) is None
    assert "no validation" in capsys.readouterr().out
    with pytest.raises(UserError, match="less than one row"):
        data.Batches(replace(cfg, seq_len=5000), tok)


def test_epochs_become_steps(small, tok):
    data.write_shards(small.sources[0], small, tok)
    batches = data.Batches(replace(small, max_steps=0, epochs=2.0), tok)
    assert batches.steps() == -(-2 * len(batches.rows["train", small.sources[0]]) // small.batch)


def test_an_id_beyond_the_vocabulary_is_told_before_it_reaches_the_model(small, tok):
    data.write_shards(small.sources[0], small, tok)
    (shard,) = data.shard_folder(small.sources[0], small, tok).glob("train_*.bin")
    ids = np.fromfile(shard, np.uint16)
    ids[:] = tok.vocab_size
    ids.tofile(shard)
    with pytest.raises(UserError, match="the tokens are damaged: id 300 .* there are 300 ids"):
        data.Batches(small, tok)("train", 0)

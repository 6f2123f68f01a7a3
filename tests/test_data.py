"""data.py: documents -> shards -> rows -> batches, and which row comes next."""

import json
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from conftest import write_preset, write_texts

import config
import data
import dpo
import sft
import train
from config import UserError
from corpus import sources
from corpus.sources import split_of
from data import Order, batch_rows, permute, train_draws
from plumbing import disk, shards
from plumbing.processes import Run

ROOT = Path(__file__).parent.parent


def counting_shards(folder, tok, sizes):
    """Shards of the ids 0, 1, 2, ...: the right answers are visible."""
    folder.mkdir(parents=True)
    first = 0
    for part, size in enumerate(sizes, 1):
        ids = np.arange(first, first + size, dtype=np.uint16)
        ids.tofile(folder / f"train_{part}.bin")
        (folder / f"val_{part}.bin").write_bytes(b"")
        shard = {"train": {"file": f"train_{part}.bin", "tokens": size, "documents": 1, "bytes": size},
                 "val": {"file": f"val_{part}.bin", "tokens": 0, "documents": 0, "bytes": 0}}
        manifest = {"tokenizer": tok.digest(), "complete": True, "shards": [shard],
                    "stops": [{"tokens": 0, "shards": 1}],
                    "reader": {"source": "counting", "read": 1, "bad": 0, "left_out": {}, "notes": {},
                               "files": []}}
        (folder / f"manifest_{part}of{len(sizes)}.json").write_text(json.dumps(manifest))
        first += size
    return folder


def test_the_targets_of_a_row_are_its_ids_one_place_later_and_an_end_belongs_to_what_it_ends():
    rows = torch.tensor([[5, 6, 0, 7, 8], [0, 0, 9, 1, 0]])
    ids, targets, doc = data.inputs_and_targets(rows, eos_id=0)
    assert ids.tolist() == [[5, 6, 0, 7], [0, 0, 9, 1]]
    assert targets.tolist() == [[6, 0, 7, 8], [0, 9, 1, 0]]
    assert doc.tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


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
    shards.write_shards(small.sources[0], small, tok)
    batches = data.Batches(small, tok)
    for i in range(20):
        ids, targets, doc = batches("train", i)
        assert ids.shape == targets.shape == doc.shape == (4, 32) and ids.dtype == torch.int64
        assert torch.equal(ids[:, 1:], targets[:, :-1])
        for row, numbers in zip(ids.tolist(), doc.tolist(), strict=True):
            assert numbers == [row[:t].count(tok.eos_id) for t in range(32)]


def test_all_documents_are_written_once_each_closed_and_none_is_in_both_splits(small, tok):
    shards.write_shards(small.sources[0], small, tok)
    folder = shards.shard_folder(small.sources[0], small, tok)
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
    assert {split_of("twice", 0.5) for _ in range(5)} == {split_of("twice", 0.5)}
    share = sum(split_of(str(i), 0.25) == "val" for i in range(4000)) / 4000
    assert abs(share - 0.25) < 0.03


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_permutation_and_the_key_changes_it(n):
    assert sorted(permute(i, n, 5) for i in range(n)) == list(range(n))
    if n > 7:
        orders = {tuple(permute(i, n, key) for i in range(n)) for key in range(4)}
        assert len(orders) == 4 and tuple(range(n)) not in orders
    for key in range(3):
        assert sorted(data.draw_row(k, [n], 42, key) for k in range(n, 2 * n)) == list(range(n))  # one epoch


def test_permute_sends_indexes_of_300_million_rows_anywhere_without_an_array():
    assert len({permute(i, 300_000_000, 1) for i in range(5000)}) == 5000
    halves = sum(permute(i, 300_000_000, 1) < 150_000_000 for i in range(5000)) / 5000
    assert abs(halves - 0.5) < 0.03


def test_every_block_of_1000_draws_gives_each_source_exactly_its_weight():
    order = Order([(0, {"a": 0.7, "b": 0.295, "c": 0.005})], batch=8, seed=1)
    for number in range(3):
        drawn = Counter(order(d)[0] for d in range(1000 * number, 1000 * number + 1000))
        assert drawn == {"a": 700, "b": 295, "c": 5}
    assert [order(d)[0] for d in range(1000)] != [order(d)[0] for d in range(1000, 2000)]


def test_the_number_of_earlier_draws_is_right_also_across_changes_of_the_mixture():
    mixtures = [(0, {"a": 0.5, "b": 0.5}), (210, {"a": 0.2, "c": 0.8}), (333, {"b": 1.0})]
    order = Order(mixtures, batch=7, seed=1)
    seen = Counter()
    for d in range(5000):
        source, k = order(d)
        assert k == seen[source]
        assert source in (("a", "b") if d < 1470 else ("a", "c") if d < 2331 else ("b",))
        seen[source] += 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_visits_every_row_exactly_once_on_1_2_and_3_ranks(small, tok, world):
    shards.write_shards(small.sources[0], small, tok)
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
        shards.write_shards(source, cfg, tok)
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
    shards.write_shards(small.sources[0], small, tok)

    def step(world, micro):
        cfg = replace(small, batch=12, micro_batch=micro)
        parts = [data.Batches(cfg, tok, rank, world) for rank in range(world)]
        n = cfg.micro_steps(world)
        return torch.cat([batches("train", 5 * n + m)[0] for m in range(n) for batches in parts])

    assert torch.equal(step(1, 12), step(1, 3))
    assert torch.equal(step(1, 12), step(2, 3)) and torch.equal(step(1, 12), step(3, 2))


@pytest.mark.parametrize("second_starts", [1, 4, 1000])
def test_validation_reads_the_first_mixture_only(tmp_path, small, tok, second_starts):
    """Also where the second one begins before as many steps as there are validation batches."""
    other = write_texts(tmp_path / "other.jsonl", 120, seed=9)
    first = small.sources[0]
    cfg = replace(small, data=((first, 1.0), (other, 1.0, second_starts)), eval_batches=20)
    for source in cfg.sources:
        shards.write_shards(source, cfg, tok)
    batches, alone = data.Batches(cfg, tok), data.Batches(small, tok)
    assert {batches.where("val", d)[0] for d in range(20 * cfg.batch)} == {first}
    for i in range(40):
        assert all(map(torch.equal, batches("val", i), alone("val", i)))
    train_sources = [batches.where("train", d)[0] for d in range(20 * cfg.batch)]
    assert train_sources == [first if d < second_starts * cfg.batch else other for d in range(20 * cfg.batch)]
    assert batches.bytes_per_token() == alone.bytes_per_token() > 1
    run, model = Run("pretrain", tmp_path), train.SmolLM(small)
    assert "val_loss" in train.evaluate(cfg, run, model, batches, train.loss_fn)


def test_a_later_source_needs_no_held_out_text_to_validate(tmp_path, small, tok):
    (tmp_path / "one.txt").write_text("the cat sat. " * 100)
    cfg = replace(small, data=((small.sources[0], 1.0), (str(tmp_path / "one.txt"), 1.0, 5)))
    for source in cfg.sources:
        shards.write_shards(source, cfg, tok)
    assert data.Batches(cfg, tok)("val", 0) is not None


def test_a_source_without_held_out_text_is_named_and_validation_goes_on_with_the_others(
        tmp_path, small, tok, capsys):
    """Their weights are 0.2 and 0.1 of the run, so 2/3 and 1/3 of its validation."""
    few, a, b = tmp_path / "few.jsonl", small.sources[0], write_texts(tmp_path / "b.jsonl", 300, seed=9)
    write_texts(few, 25, words=3)
    cfg = replace(small, data=((str(few), 0.7), (a, 0.2), (b, 0.1)))
    for source in cfg.sources:
        shards.write_shards(source, cfg, tok)
    capsys.readouterr()
    batches = data.Batches(cfg, tok)
    said = capsys.readouterr().out
    assert said.startswith("validation is only of other sources: too little held-out text (less than one "
                           f"row) of {few}; raise --val_fraction=")
    assert a not in said and b not in said
    assert Counter(batches.where("val", d)[0] for d in range(1000)) == {a: 667, b: 333}
    assert Counter(batches.where("train", d)[0] for d in range(1000)) == {str(few): 700, a: 200, b: 100}
    alone = [data.Batches(replace(cfg, data=((source, 1.0),)), tok).bytes_per_token() for source in (a, b)]
    assert batches.bytes_per_token() == pytest.approx(0.667 * alone[0] + 0.333 * alone[1])


def test_weights_that_add_up_to_1_stay_as_they_are():
    for preset in config.known_presets():
        for _, weights in config.load_preset(ROOT / preset).mixtures:
            assert data.rescaled(weights) == weights or sum(weights.values()) != pytest.approx(1)
    assert data.rescaled({}) == {}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 11, 12, 13, 36, 37, 91])
def test_validation_counts_every_chat_or_pair_at_most_once(small, n, world):
    cfg = replace(small, batch=12, micro_batch=4)
    seen = []
    for i in range(50):
        parts = [batch_rows(cfg, "val", i, rank, world, n) for rank in range(world)]
        assert len({bool(part) for part in parts}) == 1  # all processes end after the same micro-batch
        seen += [row for part in parts for row in part]
        assert all(len(part) <= cfg.micro_batch for part in parts)
    assert len(seen) == len(set(seen)) and set(seen) <= set(range(n))
    assert n - len(seen) < world  # fewer rows than processes are left out at the end


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_draws_every_row_once_per_epoch_on_any_number_of_devices(small, world):
    cfg = replace(small, batch=12, micro_batch=2)
    seen = [row for i in range(60 // world) for rank in range(world)
            for row in batch_rows(cfg, "train", i, rank, world, 40)]
    assert sorted(seen[:40]) == sorted(seen[40:80]) == sorted(seen[80:120]) == list(range(40))
    assert seen[:40] != seen[40:80]
    assert [d for rank in range(world) for d in train_draws(cfg, 5, rank, world)] == [
        *range(5 * 2 * world, 6 * 2 * world)]


def test_the_next_item_is_made_while_the_caller_is_busy_but_the_first_by_the_caller_itself():
    """So Ctrl-C stops a source whose first item takes hours; also where one prefetch() is in another."""
    makers, made = [], [threading.Event() for _ in range(4)]

    def items():
        for i in range(4):
            makers.append(threading.get_ident())
            made[i].set()
            yield i

    seen = []
    for i in shards.prefetch(shards.prefetch(items())):
        seen.append(i)
        assert all(event.wait(10) for event in made[:i + 2])  # nobody has asked for item i + 1 yet
    assert seen == [0, 1, 2, 3] and list(shards.prefetch([])) == []
    assert makers[0] == threading.get_ident() and makers[0] not in makers[1:]


def test_the_error_of_an_item_that_cannot_be_made_reaches_the_caller_in_its_turn():
    def items():
        yield "good"
        raise UserError("bad")

    seen = shards.prefetch(items())
    assert next(seen) == "good"
    with pytest.raises(UserError, match="bad"):
        next(seen)


def test_an_interrupted_tokenization_resumes_and_gives_the_same_files(small, tok, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2000)
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 1000)
    whole = replace(small, out_dir=small.out_dir + "_whole")
    shards.write_shards(small.sources[0], whole, tok)
    replace_file, calls = disk.replace, []

    def break_down(temporary, path):
        calls.append(path)
        if len(calls) == 8:
            raise KeyboardInterrupt
        replace_file(temporary, path)

    monkeypatch.setattr(disk, "replace", break_down)
    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(small.sources[0], small, tok)
    folders = [shards.shard_folder(small.sources[0], cfg, tok) for cfg in (small, whole)]
    with pytest.raises(UserError, match="still being made"):
        data.Rows(folders[0], "train", 32, tok)
    shards.write_shards(small.sources[0], small, tok)
    contents = [{path.name: path.read_bytes() for path in folder.glob("*")} for folder in folders]
    assert contents[0] == contents[1] and len(contents[0]) > 6


def test_the_parts_of_several_machines_are_complete_together(small, tok):
    for part in ("1/3", "2/3"):
        shards.write_shards(small.sources[0], replace(small, part=part), tok)
    folder = shards.shard_folder(small.sources[0], small, tok)
    with pytest.raises(UserError, match="are incomplete: there are the parts 1of3, 2of3"):
        data.Rows(folder, "train", 32, tok)
    shards.write_shards(small.sources[0], replace(small, part="3/3"), tok)
    rows = [data.Rows(folder, split, 32, tok) for split in ("train", "val")]
    assert rows[0].documents + rows[1].documents == 300


def test_a_truncated_shard_and_another_tokenizer_are_each_one_clear_sentence(tmp_path, tok):
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
    assert shards.shard_folder("builtin", small, tok) != shards.shard_folder("builtin", small, bigger)
    assert shards.shard_folder("builtin", small, tok) != shards.shard_folder("builtin-docs", small, tok)


def test_special_tokens_in_documents_stay_text(tmp_path, small, tok):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "a <|endoftext|> b <|im_start|> \ud800"}) + "\n")
    cfg = replace(small, data=((str(path), 1.0),), val_fraction=0.0)
    shards.write_shards(str(path), cfg, tok)
    (shard,) = shards.shard_folder(str(path), cfg, tok).glob("train_*.bin")
    ids = np.fromfile(shard, dtype=np.uint16).tolist()
    assert [i for i in ids if i < 17] == [tok.eos_id] and ids[-1] == tok.eos_id
    assert "�" in tok.decode(ids)


def test_a_source_of_the_hub_that_is_not_prepared_is_an_error_with_both_ways_out(run_here):
    code, _, err = run_here("train.py", "config/smol_135m.py", "--out_dir=out/not_there")
    assert code == 2 and "Traceback" not in err
    assert "python data.py config/smol_135m.py" in err and "--data=builtin" in err


def test_what_a_run_lacks_is_made_of_local_files_by_itself(small, tok, capsys):
    shards.prepare(small, ["preset.py"])
    assert f"preparing the tokens of {small.sources[0]}" in capsys.readouterr().out
    assert len(data.Batches(small, tok).rows["train", small.sources[0]]) > 0
    shards.prepare(small, ["preset.py"])
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"this config is for sft.py or dpo.py"):
        shards.prepare(replace(small, fractions=True), [])
    with pytest.raises(UserError, match=r"--part=2/3 is for data.py"):
        shards.prepare(replace(small, part="2/3"), [])


MEMORY = """
import sys
from pathlib import Path
import config
from plumbing import shards
from tokenizer import Tokenizer

def most():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10  # MB

shards.BATCH_CHARACTERS = 200_000
cfg = config.load_preset(sys.argv[1])
tok = Tokenizer.load(cfg.tokenizer)
for source in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is in use
    before = most()
    print(shards.write_shards(source, cfg, tok)["reader"]["read"], most() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the high-water mark of one program")
def test_memory_stays_flat_as_the_input_grows(small, tmp_path):
    """Tokenizing 12 MB needs no more than tokenizing 1 MB: neither texts nor ids are kept. The script
    tests/long/memory.py reads larger files."""
    sizes = (500, 500, 6000)  # the first one fills the pools of the allocators
    files = [write_texts(tmp_path / f"{i}.jsonl", n, words=400) for i, n in enumerate(sizes)]
    whole = replace(small, data_tokens=0, max_steps=0)
    done = children.run("-c", MEMORY, write_preset(tmp_path / "preset.py", whole), *files)
    assert done.returncode == 0, done.stderr
    read, grown = zip(*(map(float, line.split()) for line in done.stdout.splitlines()))
    assert read == sizes
    assert grown[2] < grown[1] + 5, f"{grown} MB"


def test_too_little_text_for_a_row_is_an_error_but_none_to_validate_is_not(tmp_path, small, tok, capsys):
    path = tmp_path / "one.txt"
    path.write_text("the cat sat. " * 100)
    cfg = replace(small, data=((str(path), 1.0),), val_fraction=0.01)
    shards.write_shards(str(path), cfg, tok)
    assert data.Batches(cfg, tok)("val", 0) is None
    assert "no validation" in capsys.readouterr().out
    with pytest.raises(UserError, match="less than one row"):
        data.Batches(replace(cfg, seq_len=5000), tok)


def test_epochs_become_steps(small, tok):
    shards.write_shards(small.sources[0], small, tok)
    batches = data.Batches(replace(small, max_steps=0, epochs=2.0), tok)
    n_rows = len(batches.rows["train", small.sources[0]])
    assert batches.n_rows() == n_rows
    assert data.n_steps(batches.cfg, batches.n_rows()) == -(-2 * n_rows // small.batch)


def test_steps_are_rounded_up_in_all_stages(small):
    """The last rows of an epoch are seen, too: 17 rows in batches of 8 take 3 steps."""
    cases = ((17, 1.0, 3), (16, 1.0, 2), (17, 2.0, 5), (1, 1.0, 1), (17, 0.5, 2), (3, 0.1, 1))
    for n_rows, epochs, steps in cases:
        assert data.n_steps(replace(small, batch=8, epochs=epochs), n_rows) == steps, (n_rows, epochs)
    assert sft.n_steps is dpo.n_steps is data.n_steps is train.data.n_steps


def test_an_id_beyond_the_vocabulary_is_an_error_before_it_reaches_the_model(small, tok):
    shards.write_shards(small.sources[0], small, tok)
    (shard,) = shards.shard_folder(small.sources[0], small, tok).glob("train_*.bin")
    ids = np.fromfile(shard, np.uint16)
    ids[:] = tok.vocab_size
    ids.tofile(shard)
    with pytest.raises(UserError, match="the tokens are damaged: id 300 .* there are 300 ids"):
        data.Batches(small, tok)("train", 0)


def test_a_local_source_of_which_only_some_parts_are_made_is_not_made_again_beside_them(small, tok):
    shards.write_shards(small.sources[0], replace(small, part="1/4"), tok)
    with pytest.raises(UserError, match="there are the parts 1of4.*: prepare .* data.py P --lr=1,"):
        shards.prepare(small, ["P", "--lr=1"])
    assert not list(shards.shard_folder(small.sources[0], small, tok).glob("*1of1*"))


def test_the_advice_of_train_py_about_a_missing_part_leads_out(small, tok, tmp_path):
    """data.py --part=1/64, then train.py, then the command that train.py names, then train.py again."""
    preset = write_preset(tmp_path / "preset.py", small)
    data.main([preset, "--part=1/64"])
    with pytest.raises(UserError, match="--part=1/64 is for data.py, .*: leave it out"):
        train.main([preset, "--part=1/64"])
    with pytest.raises(UserError, match=f"parts 1of64.*: prepare them with python data.py {preset}, or"):
        train.main([preset])
    data.main([preset])
    train.main([preset, "--max_steps=1", "--warmup_steps=0", "--decay_steps=0"])


def test_what_other_code_made_is_used_and_a_sentence_names_the_code(small, tok, capsys, monkeypatch):
    """A person who edits a reader expects other tokens."""
    shards.write_shards(small.sources[0], small, tok)
    shards.write_shards(small.sources[0], small, tok)
    assert "another version" not in capsys.readouterr().out
    monkeypatch.setattr(sources, "code_digest", lambda *patterns: "edited")
    shards.write_shards(small.sources[0], small, tok)
    said = capsys.readouterr().out
    assert f"{shards.shard_folder(small.sources[0], small, tok)} was made by another version of" in said
    assert "corpus/files.py" in said and "delete it to make it again" in said

"""A token budget: where a source stops, how it resumes, grows and is shared, and what a stream survives."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import children
import local_hub
import numpy as np
import pyarrow
import pytest
from conftest import WORDS, write_preset, write_texts
from pyarrow import parquet

import data
from config import UserError
from corpus.hub import Hub, hub_records
from plumbing import shards
from plumbing.forecast import forecast


@pytest.fixture
def cfg(small, tmp_path):
    """Two sources of some 66,000 tokens each."""
    files = [write_texts(tmp_path / f"{name}.jsonl", 1000, seed=seed) for seed, name in enumerate("ab")]
    return replace(small, data=((files[0], 0.75), (files[1], 0.25)), data_tokens=40_000)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """A source stops at the end of a batch of texts."""
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 2000)


def manifest_of(cfg, tok, source, part="1of1"):
    return json.loads((shards.shard_folder(source, cfg, tok) / f"manifest_{part}.json").read_text())


def prepare(cfg, tok):
    for source in cfg.sources:
        shards.write_shards(source, cfg, tok)
    return data.Batches(cfg, tok)


# ---------------------------------------------------------------------------------------------------------
# arithmetic


def test_a_source_gets_its_share_of_the_tokens(cfg):
    a, b = cfg.sources
    assert (shards.budget_of(a, cfg), shards.budget_of(b, cfg)) == (30_000, 10_000)
    run = replace(cfg, data_tokens=0, max_steps=1000, warmup_steps=0, decay_steps=0)  # of 8 rows of 32 ids
    assert shards.budget_of(a, run) == math.ceil(1.02 * 0.75 * 1000 * 8 * 32)
    changes = replace(run, data=((a, 1.0), (a, 0.4, 500), (b, 0.6, 500)))  # 1.0 for a half, 0.4 for the other
    assert shards.budget_of(a, changes) == math.ceil(1.02 * 0.7 * 1000 * 8 * 32)
    assert shards.budget_of(b, replace(run, max_steps=1)) == 8 * 32  # at least the ids of a step
    later = replace(run, data=((a, 1.0), (b, 1.0, 500)), max_steps=5)
    assert shards.budget_of(b, later) == 8 * 32


def test_all_of_a_source_is_prepared_where_nobody_knows_how_much_a_run_draws(cfg):
    run = replace(cfg, data_tokens=0)
    for unknown in (replace(run, max_steps=0), replace(run, max_seconds=60.0)):
        assert [shards.budget_of(source, unknown) for source in cfg.sources] == [0, 0]
    built_in = replace(run, data=(("builtin", 1.0),))
    assert shards.budget_of("builtin", built_in) == 0  # all of it: made in seconds
    assert shards.budget_of("builtin", replace(built_in, data_tokens=1000)) == 1000


# ---------------------------------------------------------------------------------------------------------
# stopping, resuming, growing


def test_each_source_stops_at_its_budget_and_the_manifest_says_where(cfg, tok):
    prepare(cfg, tok)
    for source, budget in zip(cfg.sources, (30_000, 10_000)):
        manifest = manifest_of(cfg, tok, source)
        tokens = sum(shard["train"]["tokens"] for shard in manifest["shards"])
        assert budget <= tokens < 1.03 * budget and not manifest["complete"]
        assert manifest["stops"] == [{"tokens": tokens, "shards": 1}]
        assert manifest["reader"]["read"] < 1000


def test_a_source_that_ends_before_its_budget_is_complete(cfg, tok):
    run = replace(cfg, data_tokens=10**6)
    prepare(run, tok)
    manifest = manifest_of(run, tok, cfg.sources[0])
    assert manifest["complete"] and manifest["stops"] == [{"tokens": 0, "shards": 1}]
    assert manifest["reader"]["read"] == 1000


def test_an_interrupted_budget_resumes_with_the_same_bytes(cfg, tok, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 4000)
    a = cfg.sources[0]
    folder, files = shards.shard_folder(a, cfg, tok), {}
    shards.write_shards(a, cfg, tok)
    undisturbed = {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    assert len(undisturbed) > 10
    for path in folder.glob("*"):
        path.unlink()
    written = shards.write_shard
    calls = iter(range(100))

    def interrupted(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return written(*args)

    monkeypatch.setattr(shards, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(a, cfg, tok)
    with pytest.raises(UserError, match="part 1of1 has 1[0-9],[0-9]+ of 30,000 tokens"):
        data.Batches(cfg, tok)
    shards.write_shards(a, cfg, tok)
    files = {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    assert files == undisturbed


def test_a_larger_budget_continues_and_the_rows_of_the_smaller_one_stay_what_they_were(cfg, tok):
    before, a = prepare(cfg, tok), cfg.sources[0]
    folder = shards.shard_folder(a, cfg, tok)
    old = {path: path.read_bytes() for path in folder.glob("*.bin")}
    n = len(before.rows["train", a])
    places = [before.where("train", d) for d in range(2000)]
    validation = [before.where("val", d) for d in range(8)]

    larger = replace(cfg, data_tokens=80_000)
    with pytest.raises(UserError, match=f"has {before.rows['train', a].tokens:,} of 60,000 tokens"):
        data.Batches(larger, tok)
    after = prepare(larger, tok)
    assert shards.shard_folder(a, larger, tok) == folder
    assert {path: path.read_bytes() for path in old} == old  # nothing was made again
    assert [stop["shards"] for stop in manifest_of(cfg, tok, a)["stops"]] == [1, 2]
    ids = np.concatenate([np.fromfile(path, np.uint16) for path in sorted(folder.glob("train_*.bin"))])
    texts = tok.decode(ids.tolist()).split("<|endoftext|>")
    assert len(set(texts)) == len(texts)  # none is there twice

    drawn = [row for source, row in (after.where("train", d) for d in range(3000)) if source == a]
    first = [row for source, row in places if source == a][:n]  # the first epoch of the smaller budget
    assert drawn[:n] == first and sorted(first) == list(range(n))
    assert sorted(drawn[n:len(after.rows["train", a])]) == list(range(n, len(after.rows["train", a])))
    assert drawn[n:n + 100] != sorted(drawn[n:n + 100])  # they are shuffled, too
    assert [after.where("val", d) for d in range(8)] == validation

    again = prepare(cfg, tok)  # the smaller budget finds its own tokens
    assert [again.where("train", d) for d in range(2000)] == places and len(again.rows["train", a]) == n


def test_two_machines_share_a_budget_and_extend_it(cfg, tok):
    a = cfg.sources[0]
    for part in ("1/2", "2/2"):
        shards.write_shards(a, replace(cfg, part=part), tok)
        tokens = manifest_of(cfg, tok, a, part.replace("/", "of"))["stops"][0]["tokens"]
        assert 15_000 <= tokens < 15_700
    folder = shards.shard_folder(a, cfg, tok)
    rows = data.Rows(folder, "train", 32, tok, 30_000)
    assert rows.tokens >= 30_000 and rows.groups == [len(rows)]
    shards.write_shards(a, replace(cfg, part="1/2", data_tokens=60_000), tok)
    with pytest.raises(UserError, match="part 2of2 has 15,[0-9]+ of 22,500 tokens"):
        data.Rows(folder, "train", 32, tok, 45_000)
    shards.write_shards(a, replace(cfg, part="2/2", data_tokens=60_000), tok)
    larger = data.Rows(folder, "train", 32, tok, 45_000)
    assert [larger[i].tolist() for i in range(len(rows))] == [rows[i].tolist() for i in range(len(rows))]
    assert larger.groups[0] == len(rows) < larger.groups[1] == len(larger)


def test_training_extends_the_tokens_of_a_local_source_itself_and_says_that_it_is_not_all(small, tmp_path):
    texts = write_texts(tmp_path / "long.jsonl", 1000)
    preset = write_preset(tmp_path / "preset.py", replace(small, data=((texts, 1.0),), data_tokens=0))
    for steps in (40, 200):
        done = children.run("train.py", preset, f"--max_steps={steps}")
        assert done.returncode == 0, done.stderr
        assert "tokens to train on are enough for this run: the rest was not read" in done.stdout
    (manifest,) = Path(small.out_dir).glob("data/*/manifest_1of1.json")
    tokens = [stop["tokens"] for stop in json.loads(manifest.read_text())["stops"]]
    assert len(tokens) == 2 and tokens[0] >= 1.02 * 40 * 256 and tokens[1] >= 1.02 * 200 * 256


def test_parts_that_are_complete_together_are_used_beside_others_that_are_not(cfg, tok):
    """A short run without --part, or another number of parts, must not make them useless."""
    a = cfg.sources[0]
    for part in ("1/2", "2/2"):
        shards.write_shards(a, replace(cfg, part=part), tok)
    folder = shards.shard_folder(a, cfg, tok)
    before = data.Rows(folder, "train", 32, tok, 30_000)
    shards.write_shards(a, replace(cfg, data_tokens=8000), tok)
    shards.write_shards(a, replace(cfg, part="1/3"), tok)
    assert data.Rows(folder, "train", 32, tok, 30_000).files == before.files
    assert len(data.Rows(folder, "train", 32, tok, 6000).files) == 1  # the whole source, where it is enough
    with pytest.raises(UserError, match="part 1of2 has 15,[0-9]+ of 22,500 tokens; each .* --part=i/2"):
        data.Rows(folder, "train", 32, tok, 45_000)


def test_a_manifest_from_before_there_were_budgets_has_all_of_its_source(cfg, tok):
    run = replace(cfg, data_tokens=10**9)
    now = prepare(run, tok)
    for source in cfg.sources:
        path = shards.shard_folder(source, cfg, tok) / "manifest_1of1.json"
        old = json.loads(path.read_text())
        del old["stops"], old["reader"]["files"]
        path.write_text(json.dumps(old))
    again = prepare(run, tok)
    assert [again.where("train", d) for d in range(99)] == [now.where("train", d) for d in range(99)]
    path.write_text(json.dumps(old | {"stops": [5]}))
    with pytest.raises(UserError, match="is damaged: delete its folder and run data.py again"):
        prepare(run, tok)


def test_too_many_bad_records_stop_a_source_also_where_its_budget_ends(cfg, tok, tmp_path):
    source = Path(write_texts(tmp_path / "bad.jsonl", 1000))
    lines = source.read_text().splitlines()
    source.write_text("\n".join(line if i % 4 else '{"text": ""}' for i, line in enumerate(lines)))
    run = replace(cfg, data=((str(source), 1.0),), data_tokens=9000, on_bad="skip")
    with pytest.raises(UserError, match="records are bad up to where its budget ends"):
        prepare(run, tok)
    prepare(replace(run, max_bad=0.3), tok)


# ---------------------------------------------------------------------------------------------------------
# the forecast


def test_the_forecast_does_not_stop_at_a_bad_record_that_the_run_will_not_read(cfg, tok, tmp_path):
    path = Path(write_texts(tmp_path / "late.jsonl", 500))
    path.write_text(path.read_text() + '{"text": ""}\n')
    late = replace(cfg, data=((str(path), 1.0),), data_tokens=5000)
    assert len(list(forecast(late, tok))) == 2
    prepare(late, tok)


def test_a_source_that_ends_before_its_budget_says_that_the_run_repeats_it(cfg, tok):
    a = cfg.sources[0]
    manifest = shards.write_shards(a, replace(cfg, data_tokens=10**6), tok)
    assert "tokens to train on are all there are, of a budget of 750,000" in shards.summary(manifest, 750_000)
    assert "all there are" not in shards.summary(manifest, 0)


def test_the_forecast_says_what_is_left_to_read_and_to_write(cfg, tok):
    lines = list(forecast(cfg, tok))
    costs = r"about [\d.]+ MB of text to read, 0\.\d MB to write, \d+ s"
    for line, source, budget in zip(lines, cfg.sources, (30_000, 10_000)):
        assert re.fullmatch(f"{re.escape(source)}: {budget:,} tokens, {costs}", line), line
    assert re.fullmatch(rf"together {costs}; [\d.,]+ GB are free", lines[2]), lines[2]
    shards.write_shards(cfg.sources[0], cfg, tok)
    assert [line.split(":")[0] for line in forecast(cfg, tok)][0] == cfg.sources[1]  # the other one is ready
    larger = [line.split()[1] for line in forecast(replace(cfg, data_tokens=80_000), tok)]
    (shard,) = manifest_of(cfg, tok, cfg.sources[0])["shards"]
    assert larger[0] == f"{60_000 - shard['train']['tokens']:,}"
    shards.write_shards(cfg.sources[1], cfg, tok)
    assert list(forecast(cfg, tok)) == list(forecast(replace(cfg, data=(("builtin", 1.0),)), tok)) == []
    whole = replace(cfg, data_tokens=0, max_steps=0)
    assert [": all of its texts, about " in line for line in forecast(whole, tok)] == [True, True]


def test_the_forecast_of_bytes_is_what_was_read(cfg, tok):
    large = replace(cfg, data_tokens=10**11)
    said = next(forecast(large, tok))
    to_read, to_write = (float(number.replace(",", "")) for number in re.findall(r"([\d.,]+) GB", said))
    assert to_write == 166.7  # 75 billion ids of 2 bytes, and a tenth of all is held out
    shards.write_shards(cfg.sources[0], cfg, tok)
    (shard,) = manifest_of(cfg, tok, cfg.sources[0])["shards"]
    assert to_read == pytest.approx(75 / 0.9 * shard["train"]["bytes"] / shard["train"]["tokens"], rel=0.02)


# ---------------------------------------------------------------------------------------------------------
# a stream from the hub


@pytest.fixture
def hub(tmp_path):
    """Three files of smollm-corpus, 1,000 texts each, some 90,000 tokens; a text says which one it is."""
    folder, rng = tmp_path / "hub" / "fineweb-edu-dedup", random.Random(0)
    folder.mkdir(parents=True)
    for n in range(3):
        texts = [f"{n} {i} " + " ".join(rng.choices(WORDS, k=60)) for i in range(1000)]
        table = pyarrow.table({"text": texts, "id": [str(i) for i in range(1000)]})
        parquet.write_table(table, folder / f"train-{n:05}-of-00003.parquet", row_group_size=200,
                            compression="none")
    (folder.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: fineweb-edu-dedup\n  data_files:\n  - split: train\n"
        "    path: fineweb-edu-dedup/train-*\n---\n")
    with local_hub.serve(folder.parent) as server:
        yield server


def test_a_stream_survives_broken_connections_and_continues_where_it_stopped(hub, small, tok, tmp_path):
    first, second = (f"train-{n:05}-of-00003.parquet" for n in range(2))
    cfg = replace(small, data=(("fineweb-edu-dedup", 1.0),), data_tokens=50_000, val_fraction=0.0)
    preset = write_preset(tmp_path / "preset.py", cfg)
    hub.broken += [first]
    done = children.run("data.py", preset, env=hub.env)
    assert done.returncode == 0, done.stderr
    assert hub.broken == []
    assert "50,000 tokens, about 0.1 MB of text to read" in done.stdout

    hub.read.clear()
    hub.broken += [second]
    done = children.run("data.py", preset, "--data_tokens=150000", env=hub.env)
    assert done.returncode == 0, done.stderr
    folder = shards.shard_folder("fineweb-edu-dedup", cfg, tok)
    manifest = manifest_of(cfg, tok, "fineweb-edu-dedup")
    assert manifest["reader"]["files"][:2] == [0, 1000] and len(manifest["stops"]) == 2
    ids = np.concatenate([np.fromfile(path, np.uint16) for path in sorted(folder.glob("train_*.bin"))])
    texts = tok.decode(ids.tolist()).split("<|endoftext|>")[:-1]
    read = manifest["reader"]["read"]
    assert [tuple(map(int, text.split()[:2])) for text in texts] == [divmod(i, 1000) for i in range(read)]


def test_a_resumed_stream_opens_no_file_that_was_read_before(hub, small, tok, tmp_path):
    """What data.py reads first is the beginning of the source, for its forecast; so this asks the reader."""
    code = """
import sys
from itertools import islice
import config
from corpus.sources import Documents
cfg = config.load_preset(sys.argv[1])
documents = Documents("fineweb-edu-dedup", cfg)
texts = list(islice(documents, 1500))
print("now the second", flush=True)
state = documents.state() | {"read": 1200}
for text in islice(Documents("fineweb-edu-dedup", cfg, state=state), 2):
    print(text)
print(documents.state()["files"])
"""
    preset = write_preset(tmp_path / "preset.py", replace(small, data=(("fineweb-edu-dedup", 1.0),)))
    done = children.run("-c", code, preset, env=hub.env)
    assert done.returncode == 0, done.stderr
    read, files = done.stdout.splitlines()[-3:-1], done.stdout.splitlines()[-1]
    assert [text.split()[:2] for text in read] == [["1", "200"], ["1", "201"]] and files == "[0, 1000]"
    assert [name[6:11] for name in hub.read if "train" in name] == ["00000", "00001", "00001"]


class Stream:
    """A stream of some files, as hub_records uses it."""

    def __init__(self, files):
        self.files, self.num_shards = files, len(files)

    def shard(self, n, index):
        return Stream([self.files[index]])

    def skip(self, n):
        return Stream([self.files[0][n:]])

    def __iter__(self):
        return iter(self.files[0])


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_records_that_are_dealt_like_cards_resume_at_any_place_of_any_file(step):
    """Where there are more parts than files. A part may have read its last record of a file long ago."""
    rows = [[{"text": f"{n} {i}"} for i in range(20)] for n in range(3)]
    for part in range(step):
        wanted = [row["text"] for file in rows for row in file][part::step]
        for read in range(len(wanted) + 1):
            files = []
            records = hub_records(Hub("x"), Stream(rows), part, step, True, files)
            assert [next(records)[1]() for _ in range(read)] == wanted[:read]
            rest = hub_records(Hub("x"), Stream(rows), part + read * step, step, True, files)
            assert [make() for _, make in rest] == wanted[read:], (step, part, read)

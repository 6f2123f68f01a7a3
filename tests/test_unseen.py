"""What evaluation calls unseen text is unseen: no stage, and no tokenizer, was trained on it."""

import random
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import config
import dpo
import sft
import tokenizer
from corpus import sources
from corpus.sources import split_of
from plumbing import checkpoint, disk, shards

DEMO = [config.load_preset(path) for path in ("config/demo.py", "config/demo_sft.py", "config/demo_dpo.py")]
EVALUATED = ("code", "docs")  # the kinds of built-in documents of which evaluation reads the unseen ones
MAKERS = dict(sources.MAKERS)


@lru_cache
def made(kind, seed):
    """All documents of the kinds that are evaluated, and some of the others, which are many."""
    return list(islice(MAKERS[kind](seed), None if kind in EVALUATED else 300))


@pytest.fixture
def corpus(monkeypatch):
    for kind in MAKERS:
        monkeypatch.setitem(sources.MAKERS, kind, lambda seed, kind=kind: iter(made(kind, seed)))


def checkpoint_of(stage, cfg):
    """What load and held_out read of a checkpoint of this stage."""
    folder = Path(cfg.out_dir) / stage / "step_0000001"
    disk.write_json(folder / "config.json", checkpoint.to_hf(cfg))
    disk.write_json(folder / "train.json", {"step": 1, **checkpoint.facts_of(cfg)})
    return str(folder)


@pytest.mark.parametrize("fractions", [(), (0.15, 0.3, 0.1), (0.1, 0.15, 0.15)], ids=str)
def test_no_stage_of_the_demo_trains_on_a_text_that_evaluation_calls_unseen(fractions, corpus, tmp_path, tok):
    cfgs = [replace(cfg, out_dir=str(tmp_path), val_fraction=fraction)
            for cfg, fraction in zip(DEMO, fractions or [cfg.val_fraction for cfg in DEMO])]
    pretraining, chats, preferences = cfgs
    start = checkpoint_of("pretrain", pretraining)
    chats = replace(chats, init_from=start)
    preferences = replace(preferences, init_from=checkpoint_of("sft", chats))
    held_out = checkpoint.held_out(checkpoint_of("dpo", preferences))
    unseen = {text for kind in EVALUATED for text in made(kind, pretraining.data_seed)
              if split_of(text, held_out) == "val"}
    assert held_out == min(cfg.val_fraction for cfg in cfgs) and len(unseen) > 20

    assert not unseen & set(tokenizer.training_texts(pretraining))

    pretrained = {"train": set(), "val": set()}
    for source in pretraining.sources:
        shards.write_shards(source, pretraining, tok)
        for path in shards.shard_folder(source, pretraining, tok).glob("*.bin"):
            text = tok.decode(np.fromfile(path, np.uint16))
            pretrained[path.name.partition("_")[0]].update(text.split("<|endoftext|>"))
    assert not unseen & pretrained["train"] and unseen <= pretrained["val"]

    packed = sft.ChatBatches(sft.pack(chats, tok), chats)
    seen = {split: {tuple(ids[doc == number].tolist()) for ids, _, doc in zip(*packed.rows[split])
                    for number in range(doc[-1] + 1)} for split in ("train", "val")}
    pieces = {text: [tuple(ids) for ids, _ in sft.encode_text(text, tok, chats.seq_len)] for text in unseen}
    for text in unseen:
        assert not seen["train"].intersection(pieces[text]), text[:200]
    whole = {text for text in unseen if seen["val"].issuperset(pieces[text])}
    assert whole and all(text in whole for text in unseen & set(made("docs", pretraining.data_seed)))

    rows = disk.read_json(dpo.prepare(preferences, tok))
    answers = {tok.decode(ids) for pair in rows["train"] for ids, _ in pair}
    assert answers and not any(text in answer for text in unseen for answer in answers)


def stage_of(path):
    """The stage of a preset, by its name: config/demo_sft.py -> sft."""
    return next((stage for stage in ("sft", "dpo") if f"_{stage}" in path), "pretrain")


@pytest.mark.parametrize("path", config.known_presets())
def test_the_unseen_texts_of_every_preset_are_unseen_in_all_stages_before_it(path, tmp_path):
    made_by = {f"{cfg.out_dir}/{stage_of(preset)}": (stage_of(preset), cfg)
               for preset, cfg in ((preset, config.load_preset(preset)) for preset in config.known_presets())
               if preset == path or "v2" not in preset}  # the 360M has two presets for sft.py
    chain = [(stage_of(path), config.load_preset(path))]
    while chain[0][1].init_from:
        chain.insert(0, made_by[chain[0][1].init_from])
    folder = None
    for stage, cfg in chain:
        folder = checkpoint_of(stage, replace(cfg, out_dir=str(tmp_path / cfg.out_dir), init_from=folder))
    held_out, fractions = checkpoint.held_out(folder), [cfg.val_fraction for _, cfg in chain]
    assert held_out == min(fractions)
    rng = random.Random(0)
    texts = [str(rng.random()) for _ in range(20_000)]
    unseen = [text for text in texts if split_of(text, held_out) == "val"]
    assert bool(unseen) == bool(held_out)  # the experiment brings its held-out texts as a file of its own
    assert all(split_of(text, fraction) == "val" for text in unseen for fraction in fractions)


def test_a_checkpoint_that_does_not_say_what_it_held_out_counts_only_the_later_stages(small):
    """Released weights: nobody here knows what they were trained on."""
    folder = Path(checkpoint_of("pretrain", small))
    (folder / "train.json").unlink()
    assert checkpoint.held_out(folder) is None
    assert checkpoint.facts_of(replace(small, init_from=str(folder)))["held_out"] == small.val_fraction

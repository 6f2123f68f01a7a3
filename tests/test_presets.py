"""config/stories.py, evening.py, day.py: what they promise, and their way from the hub to preferences."""

import random
from dataclasses import replace

import pyarrow
import pytest
from conftest import ROOT, WORDS
from pyarrow import parquet

import config
import data
import dpo
import sft
import train
from corpus import sources
from corpus.conversations import exchange
from corpus.hub import HUB
from plumbing import checkpoint, disk

NAMES = ("stories", "evening", "day")
PARAMETERS = {"stories": 14_162_304, "evening": 67_392_000, "day": 134_515_008}
SHORT = ["--max_steps=5", "--data=builtin"]


def load(name, *flags):
    return config.load([str(ROOT / f"config/{name}.py"), *flags])


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_and_the_twenty_tokens_for_each_are_as_stated(name):
    cfg = load(name)
    assert cfg.n_params == PARAMETERS[name] and cfg.head_dim == 64
    assert cfg.max_steps * cfg.tokens_per_step / cfg.n_params == pytest.approx(20, abs=0.3)
    assert cfg.init_std == pytest.approx(cfg.d_model**-0.5, rel=0.01)


def test_the_day_has_smollm_135ms_shape_and_its_sft_and_dpo_are_in_smollm2s_lengths():
    assert all(getattr(load("day"), name) == getattr(load("smol_135m"), name) for name in checkpoint.SHAPE)
    for name in NAMES:
        cfg = load(f"{name}_dpo")
        assert 2 * cfg.dpo_max_prompt_length == cfg.dpo_max_length == min(1024, cfg.seq_len)


@pytest.mark.parametrize("stage", ["", "_sft", "_dpo"])
@pytest.mark.parametrize("name", NAMES)
def test_five_steps_on_built_in_data_need_no_other_flag(name, stage):
    cfg = load(name + stage, *SHORT)
    assert cfg.max_steps == 5 and cfg.warmup + cfg.decay < 5 and cfg.micro_steps(1) >= 1


def test_the_day_can_go_on_from_step_6000_as_if_it_had_been_meant_to_be_longer():
    """As its docstring says. Up to there, the rate is the same in a run of 10 billion tokens."""
    cfg, longer = load("day"), load("day", "--max_steps=38147")
    assert longer.max_steps * longer.tokens_per_step == pytest.approx(10e9, rel=1e-4)
    begin = max(cfg.warmup, longer.warmup)
    assert {train.lr_at(step, each) for each in (cfg, longer) for step in range(begin, 6181)} == {cfg.lr}
    assert train.lr_at(6181, cfg) < cfg.lr
    assert 6000 % cfg.save_every == 0 and cfg.keep_checkpoints == 0  # and none of them is removed


# ---------------------------------------------------------------------------------------------------------
# from the hub to preferences, on folders with the layout of the data sets


def sentence(rng):
    return " ".join(rng.choices(WORDS, k=6)).capitalize() + "."


def fill_hub(folder, monkeypatch):
    """What the nine presets read, with the columns and splits that the data sets have."""
    rng = random.Random(0)
    texts = [" ".join(sentence(rng) for _ in range(18)) for _ in range(120)]
    chats = [exchange(f"{i}? {sentence(rng)}", sentence(rng)) for i in range(120)]
    others = [[chat[0], {**chat[1], "content": "No."}] for chat in chats]
    others[7] = [chats[7][0], {**chats[7][1], "content": ""}]  # an empty answer must not stop a run
    asked, scores = [chat[0]["content"] for chat in chats], {"score_chosen": [8.0] * 120,
                                                             "score_rejected": [2.0] * 120}
    tables = {
        "tinystories": {"text": ["", *texts[1:]]},
        "fineweb-edu-dedup": {"text": texts, "id": ["x"] * 120, "metadata": [{"dump": "d"}] * 120},
        "cosmopedia-v2": {"prompt": ["p"] * 120, "text": texts, "token_length": [99] * 120},
        "open-web-math": {"url": ["u"] * 120, "text": texts, "metadata": ["{}"] * 120},
        "smol-smoltalk": {"messages": chats, "source": ["everyday-conversations"] * 120},
        "ultrafeedback-binarized": {"prompt": asked, "prompt_id": ["x"] * 120, "chosen": chats,
                                    "rejected": others, "messages": chats, **scores},
    }
    for name, columns in tables.items():
        path = folder / name / "data" / f"{HUB[name].split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        parquet.write_table(pyarrow.table(columns), path)
        monkeypatch.setitem(sources.HUB, name, replace(HUB[name], path=str(folder / name), config=None))


@pytest.mark.parametrize("name", ["stories", "evening"])
def test_each_stage_reads_its_data_sets_from_the_hub_and_continues_from_the_one_before(
        name, tmp_path, monkeypatch, capsys):
    """In small. A day reads what an evening reads."""
    fill_hub(tmp_path / "hub", monkeypatch)
    preset, out = str(ROOT / "config" / name), tmp_path / "out"
    flags = [f"--out_dir={out}", "--max_steps=2", "--batch=4", "--micro_batch=2", "--vocab_size=300",
             "--n_layer=1", "--n_head=2", "--n_kv_head=1", "--d_model=16", "--d_ff=32", "--seq_len=128",
             "--tokenizer_bytes=9999", "--max_bad=0.05", "--device=cpu", "--dtype=float32", "--compile=False"]
    data.main([f"{preset}.py", *flags])
    train.main([f"{preset}.py", *flags])
    chats = [f"{preset}_sft.py", *flags, f"--init_from={out}/pretrain"]
    data.main(chats)
    sft.main(chats)
    dpo.main([f"{preset}_dpo.py", *flags, f"--init_from={out}/sft", "--dpo_max_length=128",
              "--dpo_max_prompt_length=64"])
    for stage in ("pretrain", "sft", "dpo"):
        assert disk.read_json(checkpoint.find(f"{out}/{stage}") / "train.json", {"step": int})["step"] == 2
    said = capsys.readouterr().out
    assert "left out: empty document" in said or name != "stories"
    assert "left out: an empty message" in said  # among the pairs

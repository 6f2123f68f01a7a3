"""checkpoint.py: whole or not there, and nothing that does not fit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from config import Config, UserError
from model import SmolLM

CFG = Config(vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, seq_len=32)


@pytest.fixture
def folder(tmp_path):
    SmolLM(CFG).save(tmp_path / "m")
    return tmp_path / "m"


def test_a_model_comes_back_as_it_was(tmp_path):
    model = SmolLM(replace(CFG, rope_theta=5000.0, doc_mask=True, init_std=0.03))
    model.save(tmp_path)
    back = SmolLM.load(tmp_path)
    for mine, theirs in zip(model.parameters(), back.parameters()):
        assert torch.equal(mine, theirs) and theirs.requires_grad
    for name in ("n_layer", "n_kv_head", "rope_theta", "doc_mask", "seq_len", "tie_embeddings", "norm_eps"):
        assert getattr(back.cfg, name) == getattr(model.cfg, name)


def test_a_tied_model_holds_its_embedding_once(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_a_file_that_is_cut_off_is_one_sentence(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged or missing"):
        SmolLM.load(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 tensors are missing \['model.norm.weight'\]"),
        (lambda t: t.update(extra=torch.ones(2)), r"1 are unknown \['extra'\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"model.norm.weight has shape \(7,\)"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_named(folder, change, says):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=says):
        SmolLM.load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mistral"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_scaling", {"type": "linear", "factor": 2}),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("head_dim", 64),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(
        UserError, match=str(value.get("rope_type", "rope")) if isinstance(value, dict) else key
    ):
        SmolLM.load(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"model_type": "llama", "vocab_size": "many"}'])
def test_a_config_that_is_none_is_one_sentence(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        SmolLM.load(folder)


def step(stage, number, complete=True):
    path = stage / f"step_{number:07}"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    if complete:
        (path / "train.json").write_text("{}")
    return path


def test_a_stage_stands_for_its_newest_complete_step_by_number(tmp_path):
    step(tmp_path / "pretrain", 900)
    newest = step(tmp_path / "pretrain", 10_000_000)
    step(tmp_path / "pretrain", 9_000_000)
    step(tmp_path / "pretrain", 20_000_000, complete=False)
    (tmp_path / "pretrain" / "step_0000999.tmp").mkdir()
    assert checkpoint.find(tmp_path / "pretrain") == newest
    assert checkpoint.find(newest) == newest
    with pytest.raises(UserError, match="choose .*pretrain"):
        checkpoint.find(tmp_path)


def test_pruning_keeps_the_newest_and_0_keeps_all(tmp_path):
    for number in (5, 10, 15, 20):
        step(tmp_path, number)
    checkpoint.prune(tmp_path, 0)
    assert len(checkpoint.steps(tmp_path)) == 4
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_0000015", "step_0000020"]


def test_a_folder_that_is_interrupted_never_gets_its_name(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with checkpoint.whole_folder(tmp_path / "step_0000001") as new:
            (new / "half").write_text("x")
            raise KeyboardInterrupt
    assert not (tmp_path / "step_0000001").exists() and checkpoint.steps(tmp_path) == []
    with checkpoint.whole_folder(tmp_path / "step_0000001") as new:  # the leftovers are in nobody's way
        (new / "whole").write_text("x")
    assert [path.name for path in (tmp_path / "step_0000001").iterdir()] == ["whole"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.write(tmp_path / "a.json", "old")
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.write(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"

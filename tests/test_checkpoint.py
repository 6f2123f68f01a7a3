"""checkpoint.py: whole or not there, and nothing that does not fit."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plumbing import checkpoint
from config import Config, UserError
from model import SmolLM

ROOT = Path(__file__).parents[1]
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


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_model_holds_its_embedding_once(tmp_path, tied):
    SmolLM(replace(CFG, tie_embeddings=tied)).save(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("lm_head.weight" in names) == (not tied) and "model.embed_tokens.weight" in names
    assert len(names) == 9 * CFG.n_layer + (2 if tied else 3)


def test_a_bfloat16_model_is_written_in_float32(tmp_path):
    SmolLM(CFG).bfloat16().save(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("length", [-100, 1000, 5, 0])
def test_a_file_that_is_cut_off_is_one_sentence(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match="model.safetensors is damaged or missing"):
        SmolLM.load(folder)


def test_a_file_that_is_missing_is_one_sentence(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors is damaged or missing"):
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
        ("rope_parameters", "yarn"),
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


@pytest.mark.parametrize(
    ("key", "file", "value"),
    [
        ("model.norm.weight", "model", torch.ones(7)),
        ("model.norm.weight.exp_avg", "optimizer", torch.ones(7)),
        ("model.norm.bias.exp_avg", "optimizer", torch.ones(32)),
    ],
)
def test_a_step_that_does_not_fit_changes_nothing(folder, key, file, value):
    """The weights of a step are not put in place when its optimizer state is another model's."""
    save_file({"model.norm.weight.step": torch.tensor(3.0)}, folder / "optimizer.safetensors")
    tensors = load_file(folder / f"{file}.safetensors")
    save_file({**tensors, key: value}, folder / f"{file}.safetensors")
    model = SmolLM(CFG)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match=f"{file}.safetensors does not fit this model: .*{key}"):
        checkpoint.load_step(folder, model, [optimizer])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not optimizer.state


@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_a_config_that_is_none_is_one_sentence(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        SmolLM.load(folder)


def test_a_value_that_cannot_be_is_named_with_its_file(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": "many"}))
    with pytest.raises(UserError, match="(?s)config.json: .*vocab_size"):
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
    step(tmp_path / "pretrain", 30_000_000).rename(tmp_path / "pretrain" / "step_30000000.tmp")
    step(tmp_path / "pretrain", 40_000_000).rename(tmp_path / "pretrain" / "step_40000000.old")
    assert checkpoint.find(tmp_path / "pretrain") == newest
    assert checkpoint.find(newest) == newest
    with pytest.raises(UserError, match="choose .*pretrain"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "out/demo/nowhere", "/nowhere"])
def test_a_checkpoint_that_is_nowhere_is_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint.find(name)


@pytest.mark.parametrize("error", [OSError("no network\nsecond line"), TimeoutError()])
def test_a_name_that_the_hub_does_not_deliver_is_one_sentence(tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match="the hub did not deliver it: (no network|TimeoutError)$"):
        checkpoint.find("out/demo")


def test_pruning_keeps_the_newest_and_0_keeps_all(tmp_path):
    for number in (5, 10, 15, 20):
        step(tmp_path, number)
    checkpoint.prune(tmp_path, 0)
    assert len(checkpoint.steps(tmp_path)) == 4
    checkpoint.prune(tmp_path, 3)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step_00000{n}" for n in (10, 15, 20)]


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


def test_an_interrupted_save_leaves_the_old_weights(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename = checkpoint.os.replace
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda a, b: 1 / 0 if "tensors" in str(b) else rename(a, b)
    )
    with pytest.raises(ZeroDivisionError):
        SmolLM(CFG).save(folder)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert SmolLM.load(folder).cfg.n_layer == 2


@pytest.fixture
def stage(tmp_path, tok):
    """A stage with the checkpoints of step 2 and step 4."""
    for step in (2, 4):
        checkpoint.save_step(tmp_path / f"step_{step}", SmolLM(CFG), tok, [], {"step": step, "config": {}})
    return tmp_path


@pytest.mark.parametrize("how", ["removed", "cut off", "one bit"])
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_it_is_the_newest(stage, how):
    for path in sorted((stage / "step_4").iterdir()):
        content = bytearray(path.read_bytes())
        if how == "removed":
            path.unlink()
        elif how == "cut off":
            path.write_bytes(content[:-9])
        else:
            path.write_bytes(content[:9] + bytes([content[9] ^ 4]) + content[10:])
        (said,) = checkpoint.set_aside_damaged(stage)
        assert str(stage / "step_4") in said and "kept as step_4.damaged" in said
        assert [step for step, _ in checkpoint.steps(stage)] == [2]
        (stage / "step_4.damaged").rename(stage / "step_4")
        path.write_bytes(content)
        assert checkpoint.set_aside_damaged(stage) == []


def test_a_renamed_checkpoint_and_an_empty_folder_are_set_aside(stage):
    (stage / "step_4").rename(stage / "step_100")
    (stage / "step_0000200").mkdir()
    empty, renamed = checkpoint.set_aside_damaged(stage)
    assert "kept as step_0000200.damaged" in empty and "tells of another step" in renamed
    assert checkpoint.find(stage).name == "step_2"


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(stage):
    for step in (2, 4):
        (stage / f"step_{step}" / "SHA256SUMS").write_text("")
    with pytest.raises(UserError, match="no checkpoint in .* is whole: .*SHA256SUMS is cut off"):
        checkpoint.set_aside_damaged(stage)
    assert len(checkpoint.steps(stage)) == 2


def test_sha256sum_reads_our_digests(stage):
    if not shutil.which("sha256sum"):
        pytest.skip("there is no sha256sum here")
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(command, cwd=stage / "step_4", capture_output=True).returncode == 0
    (stage / "step_4" / "config.json").write_text("{}")
    assert subprocess.run(command, cwd=stage / "step_4", capture_output=True).returncode == 1


def test_only_one_process_gets_a_lock_and_a_killed_one_gives_it_back(tmp_path):
    code = "import sys, checkpoint\nwith checkpoint.lock(sys.argv[1]): print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    first = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"another process is writing to {tmp_path}: .*--out_dir"):
        with checkpoint.lock(tmp_path / "lock"):
            pass
    first.kill()
    first.communicate()
    with checkpoint.lock(tmp_path / "lock"):
        pass


def test_the_form_of_a_json_file():
    form = {"n": int, "names": [str], "inner": {"ok": bool}}
    right = {"n": 3, "names": ["a"], "inner": {"ok": True}, "more": None}
    assert checkpoint.fits(right, form) and checkpoint.fits({**right, "names": []}, form)
    for wrong in ({"n": -1}, {"n": True}, {"n": 1.0}, {"names": "a"}, {"names": [1]}, {"inner": {}}):
        assert not checkpoint.fits({**right, **wrong}, form)


def test_weights_that_are_no_floating_point_numbers_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight holds I32"):
        SmolLM.load(folder)


def test_a_state_of_the_optimizer_that_lacks_a_part_is_refused_and_nothing_is_changed(tmp_path, tok):
    model = SmolLM(CFG)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).sum().backward()
    optimizer.step()
    checkpoint.save_step(tmp_path / "step_1", model, tok, [optimizer], {"step": 1, "config": {}})
    states = load_file(tmp_path / "step_1" / "optimizer.safetensors")
    del states["model.norm.weight.exp_avg_sq"]
    save_file(states, tmp_path / "step_1" / "optimizer.safetensors")
    other = SmolLM(CFG)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(UserError, match="it lacks a part of what AdamW remembers"):
        checkpoint.load_step(tmp_path / "step_1", other, [torch.optim.AdamW(other.parameters())])
    assert all(torch.equal(old, new) for old, new in zip(before, other.parameters()))

"""checkpoint.py and disk.py: complete or not there, and nothing that does not fit."""

import json
import shutil
import subprocess
import time
from dataclasses import replace

import children
import pytest
import torch
from safetensors.torch import load_file, save_file

import config
from config import Config, UserError
from model import KVCache, RMSNorm, SmolLM
from plumbing import checkpoint, disk
from plumbing.processes import Run

CFG = Config(vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, seq_len=32)


@pytest.fixture
def folder(tmp_path, tok):
    checkpoint.save(tmp_path / "m", SmolLM(CFG), tok)
    return tmp_path / "m"


def save_step(stage, step, model, tok, optimizers=(), keep=0):
    """A complete checkpoint in the folder of a stage; returns its folder."""
    checkpoint.save_step(step, Run(stage.name, stage), model, tok, list(optimizers), {"config": {}}, keep)
    return stage / f"step_{step:07}"


def test_a_model_round_trips(tmp_path, tok):
    model = SmolLM(replace(CFG, rope_theta=5000.0, doc_mask=True, init_std=0.03))
    checkpoint.save(tmp_path, model, tok)
    back, same_tok = checkpoint.load(tmp_path)
    assert same_tok.digest() == tok.digest() and same_tok.stop_ids == tok.stop_ids
    for mine, theirs in zip(model.parameters(), back.parameters()):
        assert torch.equal(mine, theirs) and theirs.requires_grad
    for name in ("n_layer", "n_kv_head", "rope_theta", "doc_mask", "seq_len", "tie_embeddings", "norm_eps"):
        assert getattr(back.cfg, name) == getattr(model.cfg, name)


MODEL = checkpoint.FIELDS[:checkpoint.FIELDS.index("out_dir")]


def another(name):
    """Another value of a field of the model: the next choice, the opposite, or twice as much."""
    value, choices = getattr(CFG, name), config.choices_of(name)
    if choices:
        return choices[choices.index(value) - 1]
    return not value if isinstance(value, bool) else 2 * (value or 1)


def values_of(cfg, names):
    return {name: getattr(cfg, name) for name in names}


@pytest.mark.parametrize("name", MODEL)
def test_every_field_of_the_model_also_one_you_add_is_kept_by_all_that_saves_and_loads(name, tmp_path, tok):
    torch.manual_seed(0)
    cfg = replace(CFG, data=(("builtin-docs", 1.0),), **{name: another(name)})
    model, ids = SmolLM(cfg), torch.randint(17, 300, (2, 20))
    for weight in model.parameters():  # new norms are all 1, which would hide what they do
        torch.nn.init.normal_(weight, std=0.3)
    run = Run("pretrain", tmp_path / "pretrain")
    folder = save_step(run.folder, 1, model, tok)
    back = checkpoint.load_model(folder, checkpoint.read_config(folder))
    assert values_of(back.cfg, MODEL) == values_of(cfg, MODEL)
    doc = torch.arange(20).expand(2, -1) // 9  # three documents in a row
    assert torch.equal(back(ids, doc=doc), model(ids, doc=doc))
    cache = KVCache(cfg, 2, 20)  # as sample.py reads: a prompt, a chunk, then one id after the other
    found = [model.next_logits(part, cache) for part in ids.split([12, 3, 1, 1, 1, 1, 1], dim=1)]
    expected = model(ids)[:, [11, *range(14, 20)]]
    torch.testing.assert_close(torch.stack(found, 1), expected, rtol=1e-5, atol=1e-5)
    started, _ = checkpoint.initial_model(Config(init_from=str(folder)))
    assert values_of(started, checkpoint.SHAPE) == values_of(cfg, checkpoint.SHAPE)
    if name in checkpoint.SHAPE:
        change = rf"is another model \({name} {another(name)} -> {getattr(CFG, name)}\)"
        with pytest.raises(UserError, match=change):
            checkpoint.resume(run, replace(cfg, **values_of(CFG, [name])), SmolLM(CFG), tok, [])


def test_a_model_that_is_no_llama_is_refused_by_other_programs_and_by_name(tmp_path, tok):
    """Two more weights, as QK-norm has; a field that no Llama has is in tests/test_hacking.py."""
    transformers = pytest.importorskip("transformers")
    model = SmolLM(CFG)
    model.model.layers[1].self_attn.q_norm = RMSNorm(CFG)
    checkpoint.save(tmp_path, model, tok)
    with pytest.raises(ValueError, match="smollm_from_scratch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"1 are unknown \['model.layers.1.self_attn.q_norm.weight'\]"):
        checkpoint.load(tmp_path)
    assert checkpoint.not_llama(model) == ["model.layers.1.self_attn.q_norm.weight"]
    del model.model.layers[1].self_attn.q_norm, model.model.layers[1].post_attention_layernorm
    assert checkpoint.not_llama(model) == ["model.layers.1.post_attention_layernorm.weight"]
    assert checkpoint.not_llama(SmolLM(replace(CFG, tie_embeddings=False))) == []


def test_a_field_that_this_model_does_not_know_is_refused_by_name(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {**checkpoint.OURS, "not_llama": {"no_such_field": 16}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"not_llama={.no_such_field.: 16} is not implemented here"):
        checkpoint.load(folder)


def test_who_may_read_one_file_of_a_checkpoint_may_read_all(tmp_path, tok):
    checkpoint.save(tmp_path, SmolLM(CFG), tok)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_model_stores_its_embedding_once(tmp_path, tok, tied):
    checkpoint.save(tmp_path, SmolLM(replace(CFG, tie_embeddings=tied)), tok)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("lm_head.weight" in names) == (not tied) and "model.embed_tokens.weight" in names
    assert len(names) == 9 * CFG.n_layer + (2 if tied else 3)


def test_a_bfloat16_model_is_written_in_float32(tmp_path, tok):
    checkpoint.save(tmp_path, SmolLM(CFG).bfloat16(), tok)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("length", [-100, 1000, 5, 0])
def test_a_file_that_is_cut_off_is_one_sentence(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match="model.safetensors is damaged or missing"):
        checkpoint.load(folder)


def test_a_file_that_is_missing_is_one_sentence(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors is damaged or missing"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 tensors are missing \['model.norm.weight'\]"),
        (lambda t: t.update(extra=torch.ones(2)), r"1 are unknown \['extra'\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"model.norm.weight has shape \(7,\)"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_reported(folder, change, says):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=says):
        checkpoint.load(folder)


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
def test_a_model_that_needs_something_else_is_refused_by_name(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    named = value.get("rope_type", "rope") if isinstance(value, dict) else key
    with pytest.raises(UserError, match=named):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("key", "file", "value"),
    [
        ("model.norm.weight", "model", torch.ones(7)),
        ("model.norm.weight.exp_avg", "optimizer", torch.ones(7)),
        ("model.norm.bias.exp_avg", "optimizer", torch.ones(32)),
    ],
)
def test_a_step_that_does_not_fit_changes_nothing(folder, key, file, value):
    """The weights of a step are not used when its optimizer state belongs to another model."""
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
def test_a_file_that_is_no_config_is_one_sentence(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        checkpoint.load(folder)


def test_an_impossible_value_is_reported_with_its_file(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": "many"}))
    with pytest.raises(UserError, match="(?s)config.json: .*vocab_size"):
        checkpoint.load(folder)


def step(stage, number, complete=True):
    path = stage / f"step_{number:07}"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    if complete:
        (path / "train.json").write_text("{}")
    return path


def test_a_stage_means_its_newest_complete_step_by_number(tmp_path):
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
def test_a_model_that_the_hub_does_not_deliver_is_one_sentence(tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match="the hub did not deliver it: (no network|TimeoutError)$"):
        checkpoint.find("out/demo")


def test_the_newest_checkpoints_are_kept_and_0_keeps_all(tmp_path, tok):
    for number in (5, 10, 15):
        step(tmp_path, number)
    save_step(tmp_path, 20, SmolLM(CFG), tok, keep=0)
    assert len(checkpoint.checkpoints(tmp_path)) == 4
    save_step(tmp_path, 25, SmolLM(CFG), tok, keep=3)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step_00000{n}" for n in (15, 20, 25)]


def test_a_folder_that_is_interrupted_never_gets_its_name(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with disk.new_folder(tmp_path / "step_0000001") as new:
            (new / "half").write_text("x")
            raise KeyboardInterrupt
    assert not (tmp_path / "step_0000001").exists() and checkpoint.checkpoints(tmp_path) == []
    with disk.new_folder(tmp_path / "step_0000001") as new:  # what was left over does not matter
        (new / "complete").write_text("x")
    assert [path.name for path in (tmp_path / "step_0000001").iterdir()] == ["complete"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    disk.write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr(disk.os, "fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        disk.write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"


def test_an_interrupted_save_leaves_the_old_weights(folder, tok, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename = disk.os.replace
    monkeypatch.setattr(disk.os, "replace", lambda a, b: 1 / 0 if "tensors" in str(b) else rename(a, b))
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(folder, SmolLM(CFG), tok)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert checkpoint.load(folder)[0].cfg.n_layer == 2


@pytest.fixture
def stage(tmp_path, tok):
    """A stage with the checkpoints of step 2 and step 4."""
    for number in (2, 4):
        save_step(tmp_path, number, SmolLM(CFG), tok)
    return tmp_path


def set_damaged_aside(stage, capsys):
    """The warnings that resuming in this stage prints."""
    checkpoint.set_damaged_aside(Run(stage.name, stage))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("how", ["removed", "cut off", "one bit"])
def test_a_damaged_checkpoint_is_reported_and_renamed_and_the_one_before_it_is_the_newest(stage, capsys, how):
    for path in sorted((stage / "step_0000004").iterdir()):
        content = bytearray(path.read_bytes())
        if how == "removed":
            path.unlink()
        elif how == "cut off":
            path.write_bytes(content[:-9])
        else:
            path.write_bytes(content[:9] + bytes([content[9] ^ 4]) + content[10:])
        (said,) = set_damaged_aside(stage, capsys)
        assert str(stage / "step_0000004") in said and "kept as step_0000004.damaged" in said
        assert [step for step, _ in checkpoint.checkpoints(stage)] == [2]
        (stage / "step_0000004.damaged").rename(stage / "step_0000004")
        path.write_bytes(content)
        assert set_damaged_aside(stage, capsys) == []


def test_a_renamed_checkpoint_and_an_empty_folder_are_renamed_too(stage, capsys):
    (stage / "step_0000004").rename(stage / "step_100")
    (stage / "step_0000200").mkdir()
    empty, renamed = set_damaged_aside(stage, capsys)
    assert "kept as step_0000200.damaged" in empty and "is of another step" in renamed
    assert checkpoint.find(stage).name == "step_0000002"


def test_where_no_checkpoint_is_intact_training_does_not_start_over(stage, capsys):
    for number in (2, 4):
        (stage / f"step_{number:07}" / "B2SUMS").write_text("")
    with pytest.raises(UserError, match="no checkpoint in .* is intact: .*B2SUMS is cut off"):
        set_damaged_aside(stage, capsys)
    assert len(checkpoint.checkpoints(stage)) == 2


def test_b2sum_reads_our_digests(stage):
    if not shutil.which("b2sum"):
        pytest.skip("there is no b2sum here")
    command = ["b2sum", "--check", "--strict", "B2SUMS"]
    assert subprocess.run(command, cwd=stage / "step_0000004", capture_output=True).returncode == 0
    (stage / "step_0000004" / "config.json").write_text("{}")
    assert subprocess.run(command, cwd=stage / "step_0000004", capture_output=True).returncode == 1


def test_only_one_process_gets_a_lock_and_a_killed_one_releases_it(tmp_path):
    code = ("import sys, time\nfrom plumbing import disk\n"
            "with disk.lock(sys.argv[1]): print('held', flush=True); time.sleep(60)")
    first = children.start("-c", code, tmp_path / "lock", folder=tmp_path)
    while (tmp_path / "stdout").read_text() != "held\n":
        assert first.is_alive(), (tmp_path / "stderr").read_text()
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"another process is writing to {tmp_path}: .*write somewhere else"):
        with disk.lock(tmp_path / "lock"):
            pass
    first.kill()
    first.join()
    with disk.lock(tmp_path / "lock"):
        pass


def test_the_form_of_a_json_file():
    form = {"n": int, "names": [str], "inner": {"ok": bool}}
    right = {"n": 3, "names": ["a"], "inner": {"ok": True}, "more": None}
    assert disk.has_form(right, form) and disk.has_form({**right, "names": []}, form)
    for wrong in ({"n": -1}, {"n": True}, {"n": 1.0}, {"names": "a"}, {"names": [1]}, {"inner": {}}):
        assert not disk.has_form({**right, **wrong}, form)


def test_weights_that_are_whole_numbers_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight contains torch.int32"):
        checkpoint.load(folder)


@pytest.fixture
def one_step(tmp_path, tok):
    """A checkpoint with the state of AdamW after one step."""
    model = SmolLM(CFG)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).sum().backward()
    optimizer.step()
    return save_step(tmp_path, 1, model, tok, [optimizer])


def test_an_optimizer_state_that_lacks_a_part_is_refused_and_nothing_is_changed(one_step):
    states = load_file(one_step / "optimizer.safetensors")
    del states["model.norm.weight.exp_avg_sq"]
    save_file(states, one_step / "optimizer.safetensors")
    other = SmolLM(CFG)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(UserError, match="it lacks some state of AdamW"):
        checkpoint.load_step(one_step, other, [torch.optim.AdamW(other.parameters())])
    assert all(torch.equal(old, new) for old, new in zip(before, other.parameters()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.filterwarnings("ignore:for .*is a no-op")  # copying weights to the device that stores nothing
def test_all_of_the_optimizer_state_is_loaded_to_the_device_of_its_parameter(one_step, device):
    """The count of steps, too: fused optimizers on a GPU need it there. "meta" stands for a GPU here."""
    with torch.device(device):
        model = SmolLM(CFG)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoint.load_step(one_step, model, [optimizer])
    assert len(optimizer.state) == len(list(model.parameters()))
    for parameter, state in optimizer.state.items():
        assert sorted(state) == ["exp_avg", "exp_avg_sq", "step"]
        assert {tensor.device for tensor in state.values()} == {parameter.device} == {torch.device(device)}


def test_a_resumed_dpo_whose_reference_is_gone_says_so_and_sft_continues(tmp_path, one_step):
    for stage in ("dpo", "sft"):
        disk.write_json(tmp_path / stage / "step_0000001" / "train.json",
                        {"config": {"init_from": str(one_step)}, "started_from": str(tmp_path / "gone")})
    cfg = Config(out_dir=str(tmp_path), init_from=str(one_step))
    with pytest.raises(UserError, match="gone, its reference, which is gone: restore it"):
        checkpoint.start_of(cfg, "dpo")
    assert checkpoint.start_of(cfg, "sft") == one_step

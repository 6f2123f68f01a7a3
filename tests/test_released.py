"""Released checkpoints, SmolLM's and SmolLM2's, in the layout of the hub. Nothing is downloaded."""

import json
import shutil
from dataclasses import replace

import children
import pytest
import torch
from hub_layout import (
    RELEASED,
    SMOLLM,
    SMOLLM2,
    change,
    config_of,
    transformers,
    write_instruct,
    write_json,
    write_model,
    write_tokenizer,
)
from safetensors.torch import load_file, save_file
from test_dpo import dpo_cfg  # noqa: F401  a fixture
from test_sft import at_home, chat_cfg, flags  # noqa: F401  fixtures

import dpo
import sample
import sft
from config import UserError
from plumbing import checkpoint, disk
from sft import pack
from tokenizer import Tokenizer


@pytest.fixture
def instruct(tmp_path):
    return write_instruct(tmp_path / "instruct")


# ---------------------------------------------------------------------------------------------------------
# weights


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_has_the_published_number_of_parameters(tmp_path, name):
    theirs, n_params = RELEASED[name]
    write_json(tmp_path / "config.json", theirs)
    cfg = checkpoint.read_config(tmp_path)
    assert cfg.n_params == n_params
    assert (cfg.rope_theta, cfg.seq_len) == (theirs["rope_theta"], theirs["max_position_embeddings"])
    assert disk.read_end_ids(tmp_path) == (2 if "Instruct" in name else 0,)


@pytest.mark.parametrize(
    ("theta", "positions", "dtype", "size"),
    [
        (10000.0, 2048, torch.float32, "5GB"),
        (10000.0, 2048, torch.bfloat16, "5GB"),
        (100000, 8192, torch.bfloat16, "20KB"),
        (130000, 8192, torch.float32, "20KB"),
    ],
    ids=["SmolLM", "SmolLM bf16", "SmolLM2 bf16 in parts", "SmolLM2-1.7B in parts"],
)
def test_the_released_layout_computes_what_transformers_computes(tmp_path, theta, positions, dtype, size):
    write_model(tmp_path, theta, positions, dtype=dtype, size=size)
    write_tokenizer(tmp_path, SMOLLM2)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == (size == "20KB") and (tmp_path / "model.safetensors").exists() == (
        len(files) == 1
    )
    names = [name for file in files for name in load_file(file)]
    assert len(names) == 9 * 2 + 2 and "lm_head.weight" not in names
    ours, _ = checkpoint.load(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(17, 300, (1, 300), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    found = list(sample.generate(ours, ids[0].tolist(), 16, temperature=0))
    mask = torch.ones_like(ids)
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None
    )
    assert found == expected[0, 300:].tolist()
    assert (ours.cfg.rope_theta, ours.cfg.seq_len) == (theta, positions)


def test_files_that_do_not_fit_together_are_named(tmp_path):
    write_model(tmp_path, size="20KB")
    write_tokenizer(tmp_path, SMOLLM2)
    files, index = sorted(tmp_path.glob("*.safetensors")), tmp_path / "model.safetensors.index.json"
    first, second = load_file(files[0]), load_file(files[1])
    shared = next(iter(first))
    save_file({**second, shared: first[shared]}, files[1])
    with pytest.raises(UserError, match=f"{files[1].name} contains {shared}, which another part also"):
        checkpoint.load(tmp_path)
    save_file(dict(list(second.items())[1:]), files[1])
    with pytest.raises(UserError, match="does not fit this model: 1 tensors are missing"):
        checkpoint.load(tmp_path)
    files[1].unlink()
    with pytest.raises(UserError, match=f"{files[1].name} is damaged or missing"):
        checkpoint.load(tmp_path)
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(UserError, match="index.json is damaged"):
            checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=.*SequenceClassification"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"sliding_window": 512}, "sliding_window=512"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config=.*bitsandbytes"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "0.5"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "factor": 8.0}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, "contradict each other"),
        ({"rope_theta": "much"}, "config.json: .*rope_theta='much'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_needs_something_that_is_not_implemented_is_refused(tmp_path, changes, says):
    write_json(tmp_path / "config.json", config_of(2, 4, 2, 32, 48, 10000.0, 2048) | changes)
    with pytest.raises(UserError, match=f"(?s){says}"):
        checkpoint.read_config(tmp_path)


# ---------------------------------------------------------------------------------------------------------
# by name


def cached(home, folder, name, revision):
    """The cache of the hub's library after a model was downloaded."""
    stored = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, stored / "snapshots" / ("0123456789" * 4))
    (stored / "refs").mkdir()
    (stored / "refs" / revision).write_text("0123456789" * 4)


def test_a_model_of_the_hub_has_a_name_and_a_revision(instruct, tmp_path):
    cached(tmp_path / "home", instruct, "HuggingFaceTB/SmolLM-135M-Instruct", "v0.1")
    asked = "HuggingFaceTB/SmolLM-135M-Instruct"

    def run(name):
        env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        return children.run("sample.py", name, "--chat", "hello", "--max_new_tokens=5", env=env)

    done = run(f"{asked}@v0.1")
    assert done.returncode == 0 and done.stdout == run(str(instruct)).stdout, done.stderr
    newest = run(asked)  # the cache has only v0.1
    assert newest.returncode == 2 and "the hub did not deliver it" in newest.stderr
    unfinished = run("a/b@")
    assert unfinished.returncode == 2 and "owner/name@revision" in unfinished.stderr


def test_only_the_files_of_a_checkpoint_are_fetched(monkeypatch, tmp_path):
    wanted = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **more: wanted.update(more, name=name) or tmp_path
    )
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find("a/b@refs/pr/1") == tmp_path
    assert (wanted["name"], wanted["revision"]) == ("a/b", "refs/pr/1")
    from huggingface_hub.utils import filter_repo_objects

    files = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "pytorch_model.bin",
             "onnx/config.json", "onnx/model.onnx", "README.md"]  # fmt: skip
    patterns = {key: wanted[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == files[:3]
    checkpoint.find("a/b")
    assert wanted["revision"] is None


# ---------------------------------------------------------------------------------------------------------
# fine-tuning


def test_fine_tuning_keeps_the_wavelengths_the_context_and_the_template(
    instruct, chat_cfg, dpo_cfg  # noqa: F811
):
    """In rows of 128 ids: SmolLM2 keeps its 8,192 positions, its rope_theta and its system message."""
    cfg = replace(chat_cfg, init_from=str(instruct))
    sft.main(["config/demo_sft.py", *flags(cfg)])
    pairs = replace(dpo_cfg, init_from=f"{cfg.out_dir}/sft")
    dpo.main(["config/demo_dpo.py", *flags(pairs)])
    for stage in ("sft", "dpo"):
        folder = checkpoint.find(f"{cfg.out_dir}/{stage}")
        theirs = json.loads((folder / "config.json").read_text())
        assert (theirs["rope_theta"], theirs["max_position_embeddings"]) == (100000, 8192)
        model, tok = checkpoint.load(folder)
        assert tok.template == SMOLLM2 and tok.is_chat and tok.ends == (2,)
        llama = transformers.AutoModelForCausalLM.from_pretrained(folder)
        ids = torch.arange(20, 290)[None]
        torch.testing.assert_close(model(ids), llama(ids).logits, rtol=0, atol=1e-4)
    log = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_each_template_has_packed_chats_of_its_own(instruct, chat_cfg):  # noqa: F811
    """SmolLM and SmolLM2 share a vocabulary, but their rows differ."""
    tok = Tokenizer.load(instruct)
    folder = pack(chat_cfg, tok)
    assert pack(chat_cfg, Tokenizer(tok.rust, SMOLLM2)) == folder
    assert pack(chat_cfg, Tokenizer(tok.rust, SMOLLM)) != folder


def test_an_unknown_template_stops_fine_tuning_before_any_data_is_read(
    instruct, chat_cfg, dpo_cfg  # noqa: F811
):
    change(instruct / "tokenizer_config.json", chat_template="{{ messages }}")
    for stage, cfg in ((sft, chat_cfg), (dpo, dpo_cfg)):
        cfg = replace(cfg, init_from=str(instruct), data=(("nowhere.jsonl", 1.0),))
        with pytest.raises(UserError, match="neither SmolLM's nor SmolLM2's"):
            stage.main([f"config/demo_{stage.__name__}.py", *flags(cfg)])


# ---------------------------------------------------------------------------------------------------------
# where a text ends


@pytest.mark.parametrize(
    ("in_config", "in_generation", "ids"),
    [(2, None, [2]), (0, 2, [2]), (0, [0, 2], [2, 0]), (0, [2, 17], [2, 17]), (None, [], [0]),
     ([2, 0], None, [2, 0])],
)
def test_generation_config_takes_precedence_on_what_ends_a_text(tmp_path, in_config, in_generation, ids):
    write_model(tmp_path)
    write_tokenizer(tmp_path, SMOLLM2)
    change(tmp_path / "config.json", eos_token_id=in_config)
    change(tmp_path / "generation_config.json", eos_token_id=in_generation)
    model, tok = checkpoint.load(tmp_path)
    assert list(tok.ends) == ids and tok.stop_ids == {*ids, 0} and tok.is_chat == (ids[0] == 2)
    checkpoint.save(tmp_path / "again", model, tok)
    assert list(disk.read_end_ids(tmp_path / "again")) == ids
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer.load(tmp_path).ends[0] == (2 if in_config in (2, [2, 0]) else 0)


@pytest.mark.parametrize("value", ["2", [2, "3"], -1, 1.5, True])
def test_an_end_that_is_not_an_id_is_refused_in_one_sentence(tmp_path, value):
    write_json(tmp_path / "config.json", {"eos_token_id": value})
    with pytest.raises(UserError, match="config.json: eos_token_id=.* must be an id or a list of ids"):
        disk.read_end_ids(tmp_path)

"""
checkpoint.py: what is on disk, and how it gets there whole.

A checkpoint is a Hugging Face model folder. Other programs open it as it is, and we open theirs:

    config.json               the shape of the model, in Hugging Face's words
    model.safetensors         the weights, under Hugging Face's names; a tied output head is not written twice
    generation_config.json    tokenizer.json    tokenizer_config.json    special_tokens_map.json
    optimizer.safetensors     to continue training: tensors named <parameter>.<state>
    train.json                to continue training: step, config, versions

Nothing is ever half there: a file or folder is written under another name, flushed to the disk, and renamed,
which happens completely or not at all.                                                       next: model.py
"""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch

from config import Config, UserError

# ---------------------------------------------------------------------------------------------------------
# writing completely or not at all


def sync(path):
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put(temporary, path):
    """Give a finished file or folder its real name."""
    sync(temporary)
    os.replace(temporary, path)
    sync(Path(path).parent)


def write(path, text):
    """Write a text file completely or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    put(temporary, path)


def write_json(path, value):
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path, tensors):
    """Write {name: tensor} as safetensors, completely or not at all."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    safetensors.torch.save_file(cpu, temporary, metadata={"format": "pt"})
    put(temporary, path)


@contextmanager
def whole_folder(folder):
    """A new folder to write into; it gets its real name when the block has ended well."""
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    put(temporary, folder)


# ---------------------------------------------------------------------------------------------------------
# reading


def read_json(path):
    """The object in a JSON file. Raises UserError when there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_tensors(path, expected=None):
    """{name: tensor} of a safetensors file whose names and shapes are exactly those of `expected`.

    Raises UserError with the first difference, before anything is loaded.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            shapes = found if expected is None else {name: tuple(t.shape) for name, t in expected.items()}
            missing, extra = sorted(shapes.keys() - found), sorted(found.keys() - shapes)
            if missing or extra:
                raise UserError(f"{path} does not fit this model: {len(missing)} tensors are missing "
                                f"{missing[:3]}, {len(extra)} are unknown {extra[:3]}")
            for name, shape in shapes.items():
                if found[name] != shape:
                    raise UserError(f"{path} does not fit this model: {name} has shape {found[name]}, "
                                    f"and the model needs {shape}")
            return {name: file.get_tensor(name) for name in shapes}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged or missing: {error}") from None


def steps(stage):
    """[(step, folder)] of the complete checkpoints of a stage, by number."""
    found = [(int(match[1]), path) for path in Path(stage).glob("step_*")
             if (match := re.fullmatch(r"step_(\d+)", path.name)) and (path / "train.json").is_file()]
    return sorted(found)


def find(name):
    """The folder of a checkpoint: a step folder, a stage folder (its newest step), or a name on the hub."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    if steps(folder):
        return steps(folder)[-1][1]
    if folder.is_dir():
        stages = sorted(path.as_posix() for path in folder.iterdir() if steps(path))
        choice = f": choose {' or '.join(stages)}" if stages else ""
        raise UserError(f"there is no checkpoint in {name}{choice}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise UserError(f"there is no checkpoint {name}: train one, or name a model of the hub as owner/name")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # no network, no such model, no permission: the library has a dozen kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"there is no folder {name}, and the hub did not deliver it: {reason}") from None


# ---------------------------------------------------------------------------------------------------------
# to continue training


def save_step(folder, model, tok, optimizers, facts):
    """A complete checkpoint, from which training can go on. facts: what train.json holds, step and config."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {f"{names[parameter]}.{key}": tensor for optimizer in optimizers
             for parameter, values in optimizer.state.items() for key, tensor in values.items()}
    with whole_folder(folder) as new:
        model.save(new)
        tok.save(new, model.cfg.seq_len, model.stop_id)
        write_tensors(new / "optimizer.safetensors", state)
        write_json(new / "train.json", facts)


def load_step(folder, model, optimizers):
    """Put a checkpoint's weights and optimizer states in place; nothing is changed if one does not fit."""
    weights = read_tensors(folder / "model.safetensors", model.state_dict())
    named, state = dict(model.named_parameters()), {}
    for key, tensor in read_tensors(folder / "optimizer.safetensors").items():
        name, _, what = key.rpartition(".")
        parameter = named.get(name)
        if parameter is None or tensor.shape not in (parameter.shape, ()):  # (): a counter of steps
            raise UserError(f"{folder / 'optimizer.safetensors'} does not fit this model: it holds {key} "
                            f"of shape {tuple(tensor.shape)}")
        state[parameter, what] = tensor
    owner = {parameter: optimizer for optimizer in optimizers
             for group in optimizer.param_groups for parameter in group["params"]}
    model.load_state_dict(weights)
    for (parameter, what), tensor in state.items():
        # AdamW's step counter stays on the CPU unless CUDA counts
        stays = what == "step" and parameter.device.type != "cuda"
        owner[parameter].state[parameter][what] = tensor if stays else tensor.to(parameter.device)


def prune(stage, keep):
    """Remove all but the newest `keep` checkpoints of a stage; 0 keeps all."""
    for _, folder in steps(stage)[:-keep] if keep else []:
        old = folder.with_name(folder.name + ".old")  # renamed first: a half-removed one must not look whole
        os.replace(folder, old)
        shutil.rmtree(old)


# ---------------------------------------------------------------------------------------------------------
# config.json

HF_NAMES = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
            "n_kv_head": "num_key_value_heads", "d_model": "hidden_size", "d_ff": "intermediate_size",
            "seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
            "tie_embeddings": "tie_word_embeddings"}
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
         "rope_scaling": None, "pretraining_tp": 1}


def hf_config(cfg):
    """A Config in Hugging Face's words. rope_theta stands twice: for transformers 4 and for 5."""
    return {"architectures": ["LlamaForCausalLM"], **FIXED, "attention_dropout": 0.0, "use_cache": True,
            **{theirs: getattr(cfg, ours) for ours, theirs in HF_NAMES.items()}, "head_dim": cfg.head_dim,
            "rope_theta": cfg.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
            "initializer_range": cfg.init_std, "doc_mask": cfg.doc_mask, "dtype": "float32",
            "torch_dtype": "float32"}


def end_ids(stop_id):
    """SmolLM's ids of beginning, end and padding: base models say 0 and 0, chat models 1, 2 and 2."""
    chat = stop_id != 0
    return {"bos_token_id": int(chat), "eos_token_id": stop_id, "pad_token_id": stop_id if chat else None}


def stop_id(folder):
    """The id that ends what the model of a folder writes: 0, or 2 for a chat model."""
    found = read_json(Path(folder) / "config.json").get("eos_token_id", 0)
    return found if isinstance(found, int) else 0


def read_config(folder):
    """The Config of a model folder. Raises UserError for a model that this project does not implement."""
    path = Path(folder) / "config.json"
    theirs = read_json(path)
    rope = theirs.get("rope_parameters") or {}
    for key, value in FIXED.items():
        if theirs.get(key, value) != value:
            raise UserError(f"{path}: {key}={theirs[key]!r} is not implemented here, only {value!r}")
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise UserError(f"{path}: rope_parameters={rope!r} is not implemented here, only rope_type 'default'")
    fields = {ours: theirs[name] for ours, name in HF_NAMES.items() if name in theirs}
    if missing := [name for name in HF_NAMES.values() if name not in theirs]:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    theta = theirs.get("rope_theta", rope.get("rope_theta", 10000.0))
    try:
        cfg = Config(**fields, rope_theta=theta, init_std=theirs.get("initializer_range", 0.02),
                     doc_mask=theirs.get("doc_mask", False))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if theirs.get("head_dim") not in (None, cfg.head_dim):
        raise UserError(f"{path}: head_dim={theirs['head_dim']} is not implemented here, only "
                        f"hidden_size / num_attention_heads, {cfg.head_dim}")
    return cfg

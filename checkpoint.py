"""
checkpoint.py: what is on disk, and how it gets there whole.

A checkpoint is a Hugging Face model folder. Other programs open it as it is, and we open theirs:

    config.json               the shape of the model, in Hugging Face's words
    model.safetensors         the weights, under Hugging Face's names; a tied output head is not written twice
                              (large models come in shards, which model.safetensors.index.json names)
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
from contextlib import ExitStack, contextmanager
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


def shards(path):
    """The files of a safetensors file that may have been cut into several, as its index names them."""
    index = Path(f"{path}.index.json")
    if Path(path).exists() or not index.exists():
        return [path]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise UserError(f"{index} is damaged: its weight_map names no files")
    return [index.with_name(Path(name).name) for name in sorted(set(names.values()))]


def read_tensors(path, expected=None):
    """{name: tensor} of a safetensors file whose names and shapes are exactly those of `expected`.

    Where there is no such file but its index, of the shards. Raises UserError with the first difference,
    before anything is loaded.
    """
    owner = {}
    with ExitStack() as stack:
        for part in shards(path):
            try:
                file = stack.enter_context(safetensors.safe_open(part, "pt"))
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{part} is damaged or missing: {error}") from None
            if twice := sorted(owner.keys() & set(file.keys())):
                raise UserError(f"{part} holds {twice[0]}, which another shard holds, too")
            owner |= dict.fromkeys(file.keys(), file)
        found = {name: tuple(file.get_slice(name).get_shape()) for name, file in owner.items()}
        if expected is not None:
            compare(path, found, {name: tuple(tensor.shape) for name, tensor in expected.items()})
        return {name: owner[name].get_tensor(name) for name in expected or found}


def compare(path, found, needed):
    """Raise UserError unless the {name: shape} of a file are those that a model needs."""
    missing, extra = sorted(needed.keys() - found), sorted(found.keys() - needed)
    if missing or extra:
        raise UserError(f"{path} does not fit this model: {len(missing)} tensors are missing {missing[:3]}, "
                        f"{len(extra)} are unknown {extra[:3]}")
    for name, shape in needed.items():
        if found[name] != shape:
            raise UserError(f"{path} does not fit this model: {name} has shape {found[name]}, and the model "
                            f"needs {shape}")


def steps(stage):
    """[(step, folder)] of the complete checkpoints of a stage, by number."""
    found = [(int(match[1]), path) for path in Path(stage).glob("step_*")
             if (match := re.fullmatch(r"step_(\d+)", path.name)) and (path / "train.json").is_file()]
    return sorted(found)


def find(name):
    """The folder of a checkpoint: a step folder, a stage folder (its newest step), or a model of the hub by
    owner/name, and @revision for another state than the newest: HuggingFaceTB/SmolLM-135M-Instruct@v0.1.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    if steps(folder):
        return steps(folder)[-1][1]
    if folder.is_dir():
        stages = sorted(path.as_posix() for path in folder.iterdir() if steps(path))
        choice = f": choose {' or '.join(stages)}" if stages else ""
        raise UserError(f"there is no checkpoint in {name}{choice}")
    if not (on_hub := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(name))):
        raise UserError(f"there is no checkpoint {name}: train one, or name a model of the hub as owner/name "
                        "or owner/name@revision")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(on_hub[1], revision=on_hub[2], ignore_patterns=["*/*"],
                                      allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
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
FIXED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
         "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "rope_scaling": None,
         "pretraining_tp": 1}
UNUSED = {"partial_rotary_factor": 1.0, "rope_interleaved": False, "sliding_window": None,
          "quantization_config": None}  # what others may ask for, and what asks for nothing


def hf_config(cfg):
    """A Config in Hugging Face's words. rope_theta stands twice: for transformers 4 and for 5."""
    return {**FIXED, "use_cache": True,
            **{theirs: getattr(cfg, ours) for ours, theirs in HF_NAMES.items()}, "head_dim": cfg.head_dim,
            "rope_theta": cfg.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
            "initializer_range": cfg.init_std, "doc_mask": cfg.doc_mask, "dtype": "float32",
            "torch_dtype": "float32"}


def end_ids(stop_id):
    """SmolLM's ids of beginning, end and padding: base models say 0 and 0, chat models 1, 2 and 2."""
    chat = stop_id != 0
    return {"bos_token_id": int(chat), "eos_token_id": stop_id, "pad_token_id": stop_id if chat else None}


def stop_ids(folder):
    """The ids that end what the model of a folder writes: [0], or [2] of a chat model; 0 is named last.

    generation_config.json may name several, and has the word before config.json.
    """
    for path in (Path(folder) / "generation_config.json", Path(folder) / "config.json"):
        found = read_json(path).get("eos_token_id") if path.exists() else None
        ids = found if isinstance(found, list) else [found]
        if found is not None and not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"{path}: eos_token_id={found!r} must be an id or a list of ids")
        if found not in (None, []):
            return sorted(ids, key=lambda i: i == 0)
    return [0]


def read_rope_theta(path, theirs):
    """The base of the rotary wavelengths: transformers 4 writes rope_theta, 5 writes rope_parameters."""
    rope = theirs.get("rope_parameters") or {}
    plain = {"rope_type": "default", "partial_rotary_factor": 1.0}
    if not isinstance(rope, dict) or any(plain.get(key) != rope[key] for key in rope if key != "rope_theta"):
        raise UserError(f"{path}: rope_parameters={rope!r} is not implemented here, only rope_type 'default'")
    old, new = theirs.get("rope_theta"), rope.get("rope_theta")
    if None not in (old, new) and old != new:
        raise UserError(f"{path}: rope_theta={old!r} and rope_parameters={rope!r} contradict each other")
    return next((theta for theta in (old, new) if theta is not None), 10000.0)


def read_config(folder):
    """The Config of a model folder. Raises UserError for a model that this project does not implement."""
    path = Path(folder) / "config.json"
    theirs = read_json(path)
    for key, value in (FIXED | UNUSED).items():
        if theirs.get(key) not in (None, value):
            raise UserError(f"{path}: {key}={theirs[key]!r} is not implemented here, only {value!r}")
    fields = {ours: theirs[name] for ours, name in HF_NAMES.items() if name in theirs}
    if missing := [name for name in HF_NAMES.values() if name not in theirs]:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    theta = read_rope_theta(path, theirs)
    try:
        cfg = Config(**fields, rope_theta=theta, init_std=theirs.get("initializer_range", 0.02),
                     doc_mask=theirs.get("doc_mask", False))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if theirs.get("head_dim") not in (None, cfg.head_dim):
        raise UserError(f"{path}: head_dim={theirs['head_dim']} is not implemented here, only "
                        f"hidden_size / num_attention_heads, {cfg.head_dim}")
    return cfg

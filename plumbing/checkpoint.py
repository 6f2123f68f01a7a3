"""
checkpoint.py: what is on disk, and how it gets there whole.

A checkpoint is a Hugging Face model folder. Other programs open it as it is, and we open theirs:

    config.json               the shape of the model, in Hugging Face's words
    model.safetensors         the weights, under Hugging Face's names; a tied output head is not written twice
                              (large models come in shards, which model.safetensors.index.json names)
    generation_config.json    tokenizer.json    tokenizer_config.json    special_tokens_map.json
    optimizer.safetensors     to continue training: tensors named <parameter>.<state>
    train.json                to continue training: step, config, versions
    SHA256SUMS                digests of all of these: sha256sum -c SHA256SUMS

Nothing is ever half there: a file or folder is written under another name, flushed to the disk, and renamed,
which happens completely or not at all.                                                   next: hf_config.py
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

from config import UserError

if TYPE_CHECKING:  # both import this file
    from model import SmolLM
    from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------
# writing completely or not at all


def sync(path: Path | str) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put(temporary: Path | str, path: Path | str) -> None:
    """Give a finished file or folder its real name."""
    sync(temporary)
    os.replace(temporary, path)
    sync(Path(path).parent)


def write(path: Path | str, text: str) -> None:
    """Write a text file completely or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    put(temporary, path)


def write_json(path: Path | str, value: object) -> None:
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path | str, tensors: dict[str, Tensor]) -> None:
    """Write {name: tensor} as safetensors, completely or not at all."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(cpu, temporary, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    put(temporary, path)


@contextmanager
def whole_folder(folder: Path | str) -> Iterator[Path]:
    """A new folder to write into; it gets its real name when the block has ended well."""
    temporary = Path(folder).with_name(Path(folder).name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in temporary.iterdir():
        sync(path)
    put(temporary, folder)


@contextmanager
def lock(path: Path | str) -> Iterator[None]:
    """While this holds, no other process gets the same lock; it ends with the process, however that ends.
    Raises UserError where another one has it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        raise UserError(f"another process is writing to {Path(path).parent}: wait for its end, or choose "
                        "another --out_dir") from None


# ---------------------------------------------------------------------------------------------------------
# reading


def read_json(path: Path | str, form: dict | None = None) -> dict:
    """The object in a JSON file. Raises UserError when there is none, or not one of this form."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    if not fits(value, form or {}):
        raise UserError(f"{path} is damaged: it must have the form {form}")
    return value


def fits(value: Any, form: Any) -> bool:
    """Whether a JSON value has a form: fits({"a": [1]}, {"a": [int]}) -> True. int means from 0 on."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(fits(value.get(key), part) for key, part in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(part, form[0]) for part in value)
    return type(value) is form and (form is not int or value >= 0)


def shards(path: Path | str) -> list[Path | str]:
    """The files of a safetensors file that may have been cut into several, as its index names them."""
    index = Path(f"{path}.index.json")
    if Path(path).exists() or not index.exists():
        return [path]
    files = read_json(index, {"weight_map": {}})["weight_map"].values()
    if not files or not all(isinstance(n, str) and Path(n).name for n in files):
        raise UserError(f"{index} is damaged: its weight_map names no files")
    return [index.with_name(Path(name).name) for name in sorted(set(files))]


def read_tensors(path: Path | str, expected: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """{name: tensor} of a safetensors file whose names and shapes are exactly those of `expected`.

    Where there is no such file but its index, of the shards. Raises UserError with the first difference,
    before anything is loaded.
    """
    owner: dict = {}
    with ExitStack() as stack:
        for part in shards(path):
            try:
                file = stack.enter_context(safetensors.safe_open(part, "pt"))
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                raise UserError(f"{part} is damaged or missing: {error}") from None
            if twice := sorted(owner.keys() & set(file.keys())):
                raise UserError(f"{part} holds {twice[0]}, which another shard holds, too")
            owner |= dict.fromkeys(file.keys(), file)
        found = {name: tuple(file.get_slice(name).get_shape()) for name, file in owner.items()}
        if expected is not None:
            compare(path, found, {name: tuple(tensor.shape) for name, tensor in expected.items()})
        for name, file in owner.items():
            if "F" not in (kind := file.get_slice(name).get_dtype()):  # F32, BF16 ...
                raise UserError(f"{path}: {name} holds {kind}, and must hold floating-point numbers")
        return {name: owner[name].get_tensor(name) for name in expected or found}


def compare(path: Path | str, found: dict[str, tuple], needed: dict[str, tuple]) -> None:
    """Raise UserError unless the {name: shape} of a file are those that a model needs."""
    missing, extra = sorted(needed.keys() - found), sorted(found.keys() - needed)
    if missing or extra:
        raise UserError(f"{path} does not fit this model: {len(missing)} tensors are missing {missing[:3]}, "
                        f"{len(extra)} are unknown {extra[:3]}")
    for name, shape in needed.items():
        if found[name] != shape:
            raise UserError(f"{path} does not fit this model: {name} has shape {found[name]}, and the model "
                            f"needs {shape}")


def steps(stage: Path | str, every: bool = False) -> list[tuple[int, Path]]:
    """[(step, folder)] of the complete checkpoints of a stage, by number; `every`: also of what is none."""
    named = [path for path in Path(stage).glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted((int(path.name[5:]), path) for path in named if every or (path / "train.json").is_file())


def find(name: Path | str) -> Path:
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


def save_step(folder: Path, model: "SmolLM", tok: "Tokenizer", optimizers: list, facts: dict) -> None:
    """A complete checkpoint, from which training can go on. facts: what train.json holds, step and config."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {f"{names[parameter]}.{key}": tensor for optimizer in optimizers
             for parameter, values in optimizer.state.items() for key, tensor in values.items()}
    with whole_folder(folder) as new:
        model.save(new)
        tok.save(new, model.cfg.seq_len, model.stop_id)
        write_tensors(new / "optimizer.safetensors", state)
        write_json(new / "train.json", facts)
        sums = [f"{digest(path)}  {path.name}\n" for path in sorted(new.iterdir())]
        write(new / "SHA256SUMS", "".join(sums))


def digest(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint that save_step wrote, or None."""
    try:
        sums = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        if not sums or not sums[-1].endswith("  train.json"):
            raise ValueError("SHA256SUMS is cut off")
        wrong = [name for line in sums for expected, _, name in [line.partition("  ")]
                 if digest(folder / name) != expected]
        if not wrong and read_json(folder / "train.json").get("step") != int(folder.name[5:]):
            raise ValueError("its train.json tells of another step than its name")
    except (OSError, ValueError) as error:
        return f"{folder} is damaged: {error}"
    return f"{folder / wrong[0]} is damaged: it is not what was written" if wrong else None


def set_aside_damaged(stage: Path | str) -> list[str]:
    """Rename the checkpoints that are newer than the newest whole one; a sentence for each. Raises UserError
    where none is whole."""
    newest_first = [folder for _, folder in reversed(steps(stage, every=True))]
    damaged = list(takewhile(lambda found: found[1], ((folder, damage(folder)) for folder in newest_first)))
    if damaged and len(damaged) == len(newest_first):
        raise UserError(f"no checkpoint in {stage} is whole: {damaged[0][1]}: restore one, or delete all")
    for folder, _ in damaged:
        aside = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    return [f"{found}; it is kept as {folder.name}.damaged" for folder, found in damaged]


def load_step(folder: Path, model: "SmolLM", optimizers: list) -> None:
    """Put a checkpoint's weights and optimizer states in place; nothing is changed if one does not fit."""
    weights = read_tensors(folder / "model.safetensors", model.state_dict())
    path, named = folder / "optimizer.safetensors", dict(model.named_parameters())
    state: dict = {parameter: {} for parameter in named.values()}
    for key, tensor in read_tensors(path).items():
        name, _, what = key.rpartition(".")
        parameter = named.get(name)
        if parameter is None or tensor.shape not in (parameter.shape, ()):  # (): a counter of steps
            raise UserError(f"{path} does not fit this model: it holds {key} of shape {tuple(tensor.shape)}")
        state[parameter][what] = tensor
    owned = [(each, [p for group in each.param_groups for p in group["params"]]) for each in optimizers]
    for optimizer, parameters in owned:
        if len({frozenset(state[parameter]) for parameter in parameters}) > 1:
            raise UserError(f"{path} does not fit: it lacks a part of what {type(optimizer).__name__} "
                            "remembers")
    model.load_state_dict(weights)
    for optimizer, parameters in owned:
        for parameter in parameters:
            for what, tensor in state[parameter].items():
                # AdamW's step counter stays on the CPU unless CUDA counts
                stays = what == "step" and parameter.device.type != "cuda"
                optimizer.state[parameter][what] = tensor if stays else tensor.to(parameter.device)


def prune(stage: Path | str, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a stage; 0 keeps all."""
    for _, folder in steps(stage)[:-keep] if keep else []:
        # renamed first: a half-removed one must not look whole
        os.replace(folder, folder.with_name(folder.name + ".old"))
    for old in Path(stage).glob("step_*.old"):
        shutil.rmtree(old)

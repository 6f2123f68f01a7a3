"""
plumbing/disk.py: how bytes get to the disk whole, and how files are read without trusting them.

No reader ever sees half a file: a file or folder is written under a temporary name, flushed to the disk, and
renamed, which happens completely or not at all.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import tokenizers
from filelock import FileLock, Timeout
from torch import Tensor

from config import AT_MOST, UserError

# ---------------------------------------------------------------------------------------------------------
# writing


def sync(path: Path | str) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(temporary: Path | str, path: Path | str) -> None:
    """Give a finished file or folder its final name, replacing an old file of that name atomically."""
    sync(temporary)
    os.replace(temporary, path)
    sync(Path(path).parent)


@contextmanager
def writable(path: Path | str) -> Iterator[None]:
    """Turn what can go wrong while writing `path` (a full disk, a read-only folder) into a UserError."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="\n")
        replace(temporary, path)


def write_json(path: Path | str, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path | str, tensors: dict[str, Tensor]) -> None:
    """Write {name: tensor} as a safetensors file, atomically."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with writable(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        safetensors.torch.save_file(cpu, temporary, metadata={"format": "pt"})
        os.chmod(temporary, mode)  # safetensors lets only the owner read its files
        replace(temporary, path)


@contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """A new folder to write into. It gets its final name when the block ends without an error."""
    temporary = Path(folder).with_name(Path(folder).name + ".tmp")
    with writable(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    yield temporary
    with writable(folder):
        for path in temporary.iterdir():
            sync(path)
        replace(temporary, folder)


@contextmanager
def lock(path: Path | str) -> Iterator[None]:
    """Hold a lock that no other process can get until this block, or this process, ends.

    Raises UserError if another process holds it.
    """
    with writable(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(path, timeout=0)
        try:
            held.acquire()
        except Timeout:
            raise UserError(f"another process is writing to {Path(path).parent}: wait until it ends, or "
                            "write somewhere else") from None
    try:
        yield
    finally:
        held.release()


# ---------------------------------------------------------------------------------------------------------
# reading


def read_json(path: Path | str, form: dict | None = None) -> dict:
    """The object in a JSON file. Raises UserError if there is none, or if it does not have this form."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must contain a JSON object, not {type(value).__name__}")
    if not has_form(value, form or {}):
        raise UserError(f"{path} is damaged: it must have the form {form}")
    return value


def read_lines(path: Path | str) -> list[dict]:
    """The objects of a .jsonl file, [] if there is no file. A last line that is being written is left out."""
    found = []
    text = Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).exists() else ""
    for line in text.splitlines():
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            break
    return found


def has_form(value: Any, form: Any) -> bool:
    """Whether a JSON value has a form: has_form({"a": [1]}, {"a": [int]}) -> True. int means 0 or more."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(has_form(value.get(key), part) for key, part in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and (not form or all(has_form(part, form[0]) for part in value))
    return type(value) is form and (form is not int or value >= 0)


def tensor_files(path: Path | str) -> list[Path]:
    """The safetensors files of a model: `path`, or without it the parts that path.index.json names."""
    index = Path(f"{path}.index.json")
    if Path(path).exists() or not index.exists():
        return [Path(path)]
    names = read_json(index, {"weight_map": {}})["weight_map"].values()
    if not names or not all(isinstance(name, str) and Path(name).name for name in names):
        raise UserError(f"{index} is damaged: its weight_map names no files")
    return [index.with_name(Path(name).name) for name in sorted(set(names))]


def read_tensors(path: Path | str, expected: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """{name: tensor} of a safetensors file (or of its parts) with exactly the names and shapes of `expected`.

    Raises UserError that names the first difference.
    """
    tensors: dict[str, Tensor] = {}
    for part in tensor_files(path):
        try:
            found = safetensors.torch.load_file(part)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(f"{part} is damaged or missing: {error}") from None
        if twice := sorted(tensors.keys() & found.keys()):
            raise UserError(f"{part} contains {twice[0]}, which another part also contains")
        tensors |= found
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} contains {tensor.dtype}, not floating-point numbers")
    if expected is None:
        return tensors
    missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or extra:
        raise UserError(f"{path} does not fit this model: {len(missing)} tensors are missing {missing[:3]}, "
                        f"{len(extra)} are unknown {extra[:3]}")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise UserError(f"{path} does not fit this model: {name} has shape {tuple(tensors[name].shape)}, "
                            f"and the model needs {tuple(tensor.shape)}")
    return {name: tensors[name] for name in expected}


# ---------------------------------------------------------------------------------------------------------
# the names of checkpoints

STAGES = {"pretrain": ("train.py", ""), "sft": ("sft.py", "_sft"), "dpo": ("dpo.py", "_dpo")}


def command_for(stage: Path | str) -> str:
    """The command that makes a stage folder: out/demo/sft -> python sft.py config/demo_sft.py."""
    script, ending = STAGES[Path(stage).name]
    preset = f"config/{Path(stage).resolve().parent.name}{ending}.py"
    return f"python {script} {preset if Path(preset).exists() else 'PRESET'}"


def checkpoints(stage: Path | str) -> list[tuple[int, Path]]:
    """[(step, folder)] of the complete checkpoints of a stage, by step number."""
    named = [path for path in Path(stage).glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted((int(path.name[5:]), path) for path in named if (path / "train.json").is_file())


def find(name: Path | str) -> Path:
    """The folder of a checkpoint: a step folder, a stage folder (its newest step), or a model of the hub as
    owner/name, with @revision for another state than the newest: HuggingFaceTB/SmolLM-135M-Instruct@v0.1.
    """
    folder = Path(name)
    if os.path.isfile(folder / "config.json"):  # False also for impossible names
        return folder
    if checkpoints(folder):
        return checkpoints(folder)[-1][1]
    if folder.name in STAGES:
        raise UserError(f"there is no checkpoint in {name}: make one with {command_for(folder)}")
    if os.path.isdir(folder):
        stages = sorted(path.as_posix() for path in folder.iterdir() if checkpoints(path))
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
# the files of a tokenizer


def read_tokenizer(file: Path, ours: tokenizers.Tokenizer, needed: list[str]) -> tokenizers.Tokenizer:
    """Open a tokenizer.json that splits text as `ours` does, the same tokenizer without merges.

    Raises UserError if the file is damaged, lacks one of the special tokens `needed`, or would encode
    differently.
    """
    try:
        text = file.read_text(encoding="utf-8")
        for key, value in json.loads(text)["model"].items():  # before the library sees it: some make it crash
            if value and key not in ("type", "vocab", "merges"):  # dropout, for example
                raise ValueError(f"its model has {key}={str(value)[:80]}")
        theirs = tokenizers.Tokenizer.from_str(text)
    except OSError:
        raise UserError(f"there is no tokenizer at {file}: train one with tokenizer.py") from None
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file} is not a tokenizer like SmolLM's: {error}") from None
    theirs.no_truncation()  # transformers stores its last call's truncation and padding in the file
    theirs.no_padding()
    if not theirs.num_special_tokens_to_add(is_pair=False):
        theirs.post_processor = None  # transformers 5 writes one that adds nothing
    if problem := difference(theirs, ours, needed):
        raise UserError(f"{file} is not a tokenizer like SmolLM's: {problem}")
    return theirs


def difference(theirs: tokenizers.Tokenizer, ours: tokenizers.Tokenizer, needed: list[str]) -> str | None:
    """How a tokenizer would encode differently from ours, or None."""
    said, expected = json.loads(theirs.to_str()), json.loads(ours.to_str())
    vocab, added = theirs.get_vocab(), theirs.get_added_tokens_decoder().values()
    if (largest := max(vocab.values(), default=0)) >= AT_MOST["vocab_size"]:
        return f"the id {largest} is not below {AT_MOST['vocab_size']}"
    if len(set(vocab.values())) < len(vocab):
        return "two of its tokens have the same id"
    byte_characters = {token for token in ours.get_vocab() if len(token) == 1}
    if strange := set("".join(vocab.keys() - {token.content for token in added})) - byte_characters:
        return f"its tokens contain {min(strange)!r}, which represents no byte"
    special = {token.content for token in added if token.special}
    same = all(said[key] == expected[key] for key in ("normalizer", "pre_tokenizer", "post_processor"))
    if not same or len(special) < len(added) or not special.issuperset(needed):
        return "its split or special tokens differ"
    return None


def read_template(folder: Path) -> str | None:
    """The Jinja text of a folder's chat template, from where transformers looks for it, or None."""
    jinja, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if jinja.exists():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{jinja} cannot be read: {error}") from None
    text = read_json(settings).get("chat_template") if settings.exists() else None
    if isinstance(text, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in text if isinstance(each, dict)}
        text = named.get("default")
    if not isinstance(text, str | None):
        raise UserError(f"{settings}: chat_template must be a text, not {type(text).__name__}")
    return text


def read_end_ids(folder: Path) -> tuple[int, ...]:
    """The ids that end what the model of a folder writes: (0,), or (2,) of a chat model; 0 comes last.

    generation_config.json takes precedence over config.json, and may list several. () if neither says.
    """
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = read_json(path).get("eos_token_id") if path.exists() else None
        ids = found if isinstance(found, list) else [found]
        if found is not None and not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"{path}: eos_token_id={found!r} must be an id or a list of ids")
        if found not in (None, []):
            return tuple(sorted(ids, key=lambda i: i == 0))
    return ()

"""
plumbing/checkpoint.py: what a checkpoint is: load, save, resume.

A checkpoint is a Hugging Face model folder. Other programs open it without a conversion, and we open theirs:

    config.json               the shape of the model, in Hugging Face's words
    model.safetensors         the weights, under Hugging Face's names; a tied output head is not stored twice
                              (large models come in several files, which model.safetensors.index.json names)
    generation_config.json    tokenizer.json    tokenizer_config.json    special_tokens_map.json
    optimizer.safetensors     to resume training: tensors named <parameter>.<state>
    train.json                to resume training: step, config, what it started from, the machine
    B2SUMS                    digests of all of these: b2sum -c B2SUMS
    README.md                 the card of a finished run (card.py), written afterwards

    model, tok = checkpoint.load("out/demo/dpo")
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.optim import Optimizer

from config import Config, UserError
from corpus.sources import content_of, recipe_of
from model import SmolLM
from plumbing import disk
from plumbing.disk import checkpoints, find
from plumbing.processes import Run
from tokenizer import Tokenizer

__all__ = ["checkpoints", "find", "load", "save", "read_config", "to_hf", "initial_model", "resume", "Log"]

# ---------------------------------------------------------------------------------------------------------
# config.json

HF_NAMES = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
            "n_kv_head": "num_key_value_heads", "d_model": "hidden_size", "d_ff": "intermediate_size",
            "seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
            "tie_embeddings": "tie_word_embeddings"}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
OURS = {"model_type": "smollm_from_scratch", "architectures": ["SmolLMFromScratch"]}  # refused elsewhere
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
         "rope_scaling": None, "pretraining_tp": 1}
UNUSED = {"partial_rotary_factor": 1.0, "rope_interleaved": False, "sliding_window": None,
          "quantization_config": None}  # other models may set these; with these values they change nothing
WEIGHTS = ("input_layernorm post_attention_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj "
           "self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj").split()  # of a Llama's block
FIELDS = list(Config.__dataclass_fields__)
# The first block of Config, and what somebody adds to it, belongs to the weights: other values would need
# other weights, or more training. Only seq_len, init_std and doc_mask may change from run to run. OWN is what
# no Llama has, with defaults that mean a Llama.
SHAPE = [name for name in FIELDS[:FIELDS.index("out_dir")] if name not in ("seq_len", "init_std", "doc_mask")]
OWN = {name: getattr(Config(), name) for name in SHAPE if name not in (*HF_NAMES, "rope_theta")}


def own_fields(cfg: Config) -> dict:
    """The fields that no Llama has, where they are set: {"window": 16}."""
    return {name: getattr(cfg, name) for name, default in OWN.items() if getattr(cfg, name) != default}


def not_llama(model: SmolLM) -> list[str]:
    """What makes a model no Llama, fields and weights: ["window=16", "model.layers.0.mlp.norm.weight"].

    Other programs would ignore both, and compute something else.
    """
    blocks = [f"model.layers.{layer}.{name}.weight" for layer in range(model.cfg.n_layer) for name in WEIGHTS]
    head = [] if model.cfg.tie_embeddings else ["lm_head.weight"]
    expected = {"model.embed_tokens.weight", "model.norm.weight", *blocks, *head}
    return [*(f"{name}={value!r}" for name, value in own_fields(model.cfg).items()),
            *sorted(expected ^ model.state_dict().keys())]


def to_hf(cfg: Config) -> dict:
    """A Config in Hugging Face's words. rope_theta appears twice, for transformers 4 and for 5."""
    return {**FIXED, "use_cache": True, **({"not_llama": own_fields(cfg)} if own_fields(cfg) else {}),
            **{theirs: getattr(cfg, ours) for ours, theirs in HF_NAMES.items()}, "head_dim": cfg.head_dim,
            "rope_theta": cfg.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
            "initializer_range": cfg.init_std, "doc_mask": cfg.doc_mask}


def read_config(folder: Path | str) -> Config:
    """The Config of a model folder. A model that needs something we do not implement is refused by name."""
    path = Path(folder) / "config.json"
    theirs = disk.read_json(path)
    kind = OURS if theirs.get("model_type") == OURS["model_type"] else LLAMA
    for key, value in (kind | FIXED | UNUSED).items():
        if theirs.get(key) not in (None, value):
            raise UserError(f"{path}: {key}={theirs[key]!r} is not implemented here, only {value!r}")
    if missing := [name for name in HF_NAMES.values() if name not in theirs]:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    fields = {ours: theirs[name] for ours, name in HF_NAMES.items()}
    own = theirs.get("not_llama", {})
    if not isinstance(own, dict) or own.keys() - OWN:
        known = ", ".join(OWN) or "plain Llamas"
        raise UserError(f"{path}: not_llama={own!r} is not implemented here, only {known}")
    theta = read_rope_theta(path, theirs)
    try:
        cfg = Config(**fields, **own, rope_theta=theta, init_std=theirs.get("initializer_range", 0.02),
                     doc_mask=theirs.get("doc_mask", False))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if theirs.get("head_dim") not in (None, cfg.head_dim):
        raise UserError(f"{path}: head_dim={theirs['head_dim']} is not implemented here, only "
                        f"hidden_size / num_attention_heads, {cfg.head_dim}")
    return cfg


def read_rope_theta(path: Path, theirs: dict) -> float:
    """The base of the rotary wavelengths: transformers 4 writes rope_theta, 5 writes rope_parameters."""
    rope = theirs.get("rope_parameters") or {}
    plain = {"rope_type": "default", "partial_rotary_factor": 1.0}
    if not isinstance(rope, dict) or any(plain.get(key) != rope[key] for key in rope if key != "rope_theta"):
        raise UserError(f"{path}: rope_parameters={rope!r} is not implemented here, only rope_type 'default'")
    old, new = theirs.get("rope_theta"), rope.get("rope_theta")
    if None not in (old, new) and old != new:
        raise UserError(f"{path}: rope_theta={old!r} and rope_parameters={rope!r} contradict each other")
    return next((theta for theta in (old, new) if theta is not None), 10000.0)


# ---------------------------------------------------------------------------------------------------------
# load and save


def load(name: Path | str) -> tuple[SmolLM, Tokenizer]:
    """Open a step folder, a stage folder (its newest step) or a model of the hub: (model, tok), in float32.

    Raises UserError for a file that is damaged or does not fit.
    """
    folder = find(name)
    return load_model(folder, read_config(folder)).for_decoding(), Tokenizer.load(folder)


def load_llama(name: Path | str) -> tuple[SmolLM, Tokenizer]:
    """load(), for other programs: UserError if the model is more than the Llama that they know."""
    model, tok = load(name)
    if found := not_llama(model):
        more = ", ..." if found[2:] else ""
        raise UserError(f"{name} is no Llama, because of {', '.join(found[:2])}{more}: other programs would "
                        "compute something else")
    return model, tok


def load_model(folder: Path, cfg: Config) -> SmolLM:
    """The model of a folder with a Config of the same shape, laid out in memory as training needs it."""
    with torch.device("meta"):  # shapes without memory: the weights come from the file
        model = SmolLM(cfg)
    weights = disk.read_tensors(folder / "model.safetensors", model.state_dict())
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model


def save(folder: Path | str, model: SmolLM, tok: Tokenizer, dtype: torch.dtype = torch.float32) -> None:
    """Write a model and its tokenizer as a Hugging Face folder."""
    folder, end, chat = Path(folder), tok.ends[0], tok.is_chat
    ids = {"bos_token_id": int(chat), "eos_token_id": end, "pad_token_id": end if chat else None}
    kind = OURS if not_llama(model) else LLAMA
    named = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    disk.write_json(folder / "config.json", kind | to_hf(model.cfg) | named | ids)
    disk.write_json(folder / "generation_config.json",
                    ids | {"eos_token_id": list(tok.ends) if len(tok.ends) > 1 else end})
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    disk.write_tensors(folder / "model.safetensors", weights)
    tok.save(folder, model.cfg.seq_len)


def start_of(cfg: Config, stage: str) -> Path:
    """The step folder that a stage starts from: that of its first run, or else the newest of cfg.init_from.

    init_from may be a stage folder that gets more checkpoints later; a resumed DPO must keep its reference.
    """
    for _, folder in reversed(checkpoints(Path(cfg.out_dir) / stage)):
        try:
            saved = disk.read_json(folder / "train.json", {"config": {}})
        except UserError:
            continue  # a damaged checkpoint: resume() reports it
        start = saved.get("started_from")
        if start and saved["config"].get("init_from") == cfg.init_from:
            if Path(start).is_dir():
                return Path(start)
            if stage == "dpo":
                raise UserError(f"{folder} started from {start}, its reference, which is gone: restore it, "
                                "or choose another --out_dir")
    return find(cfg.init_from)


def initial_model(cfg: Config) -> tuple[Config, SmolLM]:
    """(cfg, model): new weights, or those of cfg.init_from, whose shape the returned cfg then has.

    One field of the shape may change: rows longer than the model's context may bring a larger rope_theta,
    with which far positions turn no further than near ones did before. Shorter rows leave the model its
    context: model.cfg.seq_len is the longer of the two. Raises UserError for a field that was set to
    something else than the checkpoint has.
    """
    torch.manual_seed(cfg.seed)
    if not cfg.init_from:
        return cfg, SmolLM(cfg)
    folder = find(cfg.init_from)
    theirs, default = read_config(folder), Config()
    kept = {name: getattr(theirs, name) for name in SHAPE}
    stretches = cfg.rope_theta > theirs.rope_theta and cfg.rope_theta != default.rope_theta
    if cfg.seq_len > theirs.seq_len and stretches:
        kept["rope_theta"] = cfg.rope_theta
    for name, value in kept.items():
        if getattr(cfg, name) not in (value, getattr(default, name)):
            raise UserError(f"{name}={getattr(cfg, name)} conflicts with {value} of the checkpoint "
                            f"{cfg.init_from}: leave it out, or set --{name}={value}")
    cfg = replace(cfg, **kept)
    return cfg, load_model(folder, replace(cfg, seq_len=max(cfg.seq_len, theirs.seq_len)))


def held_out(folder: Path | str) -> float | None:
    """The fraction of texts that no stage of a checkpoint trained on, or None if it does not say.

    A text is unseen if split_of(text, held_out) == "val". Splits are nested: what a small fraction holds out,
    a larger one holds out too.
    """
    path = Path(folder) / "train.json"
    return disk.read_json(path).get("held_out") if path.exists() else None


# ---------------------------------------------------------------------------------------------------------
# to resume training


def facts_of(cfg: Config) -> dict:
    """What train.json says besides the step."""
    start = find(cfg.init_from) if cfg.init_from else None
    before = held_out(start) if start else None
    return {"config": asdict(cfg), "started_from": str(start) if start else None,
            "held_out": cfg.val_fraction if before is None else min(cfg.val_fraction, before),
            "data": recipe_of(cfg), "start": fingerprint(start) if start else None}


def fingerprint(folder: Path) -> str | None:
    """A digest of a checkpoint's content, or None for a model in several files that we did not write."""
    for path in (folder / "B2SUMS", folder / "model.safetensors"):
        if path.exists():
            return digest(path)[:16]
    return None


def save_step(step: int, run: Run, model: SmolLM, tok: Tokenizer, optimizers: list[Optimizer], facts: dict,
              keep: int) -> None:
    """Rank 0 writes a complete checkpoint, and then removes all but the newest `keep` (0 keeps all)."""
    if run.rank > 0:
        return
    names: dict = {parameter: name for name, parameter in model.named_parameters()}
    state = {f"{names[parameter]}.{key}": tensor for optimizer in optimizers
             for parameter, values in optimizer.state.items() for key, tensor in values.items()}
    with disk.new_folder(run.folder / f"step_{step:07}") as new:
        save(new, model, tok)
        disk.write_tensors(new / "optimizer.safetensors", state)
        disk.write_json(new / "train.json", {"step": step, **facts})
        write_sums(new)
    with disk.writable(run.folder):
        for _, folder in checkpoints(run.folder)[:-keep] if keep else []:
            # renamed first: a half-removed checkpoint must not look complete
            os.replace(folder, folder.with_name(folder.name + ".old"))
        for old in run.folder.glob("step_*.old"):
            shutil.rmtree(old)


def resume(run: Run, cfg: Config, model: SmolLM, tok: Tokenizer,
           optimizers: list[Optimizer]) -> tuple[int, dict]:
    """Load a stage's newest intact checkpoint into model and optimizers: (its step or 0, for train.json).

    Raises UserError if its ids or its weights would get another meaning.
    """
    facts = facts_of(cfg) | run.origin()
    if run.rank == 0:
        set_damaged_aside(run)
    run.wait()
    if not checkpoints(run.folder):
        return 0, facts
    step, folder = checkpoints(run.folder)[-1]
    saved, theirs = disk.read_json(folder / "train.json", {"config": {}}), read_config(folder)
    before, now = saved["config"], json.loads(json.dumps(facts["config"]))
    changed = {name: f"{name} {before[name]} -> {now.get(name)}" for name in before
               if before[name] != now.get(name)}
    if wrong := [f"{name} {getattr(theirs, name)} -> {getattr(cfg, name)}" for name in SHAPE
                 if getattr(theirs, name) != getattr(cfg, name)]:
        raise UserError(f"{folder} is another model ({', '.join(wrong)}): choose another --out_dir")
    if Tokenizer.load(folder).digest() != tok.digest():
        raise UserError(f"{folder} was trained with another tokenizer: continue with --tokenizer={folder}, "
                        "or choose another --out_dir")
    others = sorted(source for source, content in saved.get("data", {}).items()
                    if facts["data"].get(source, content) != content)
    if others:
        names = ", ".join(map(content_of, others))
        raise UserError(f"{folder} was trained on other content of {names}: start from it with "
                        f"--init_from={folder} and another --out_dir, or restore the old content")
    start = Path(saved.get("started_from") or "")
    if saved.get("start") and start.is_dir() and fingerprint(start) != saved["start"]:
        raise UserError(f"{folder} started from {start}, which is another model now: choose another "
                        f"--out_dir to start from it, or delete {run.folder}")
    changes = f", with changes: {', '.join(changed.values())}" if changed else ""
    run.say(f"resuming from {folder}{changes}")
    load_step(folder, model, optimizers)
    kept = {name: saved[name] for name in ("started_from", "start") if name in saved}
    # what either part of the run trained on is not unseen
    return step, facts | kept | {"held_out": min(facts["held_out"], saved.get("held_out", 1.0))}


def load_step(folder: Path, model: SmolLM, optimizers: list[Optimizer]) -> None:
    """Load a checkpoint's weights and optimizer states. Nothing changes if one of them does not fit."""
    weights = disk.read_tensors(folder / "model.safetensors", model.state_dict())
    path, named = folder / "optimizer.safetensors", dict(model.named_parameters())
    state: dict = {parameter: {} for parameter in named.values()}
    for key, tensor in disk.read_tensors(path).items():
        name, _, what = key.rpartition(".")
        parameter = named.get(name)
        if parameter is None or tensor.shape not in (parameter.shape, ()):  # (): AdamW's count of steps
            raise UserError(f"{path} does not fit this model: it has {key} of shape {tuple(tensor.shape)}")
        # a copy, since tensors are mapped from the file; fused AdamW counts steps on the same device
        state[parameter][what] = tensor.to(parameter.device, copy=True)
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if len({frozenset(state[parameter]) for parameter in parameters}) > 1:
            raise UserError(f"{path} does not fit: it lacks some state of {type(optimizer).__name__}")
    model.load_state_dict(weights)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            optimizer.state.update({parameter: state[parameter] for parameter in group["params"]})


def write_sums(folder: Path) -> None:
    """Write B2SUMS, the digests of all files in a folder."""
    sums = [f"{digest(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    disk.write_text(folder / "B2SUMS", "".join(sums))


def digest(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint that save_step wrote, or None."""
    try:
        sums = (folder / "B2SUMS").read_text(encoding="utf-8").splitlines()
        if not sums or not sums[-1].endswith("  train.json"):
            raise ValueError("B2SUMS is cut off")
        for line in sums:
            expected, _, name = line.partition("  ")
            if digest(folder / name) != expected:
                return f"{folder / name} is damaged: it is not what was written"
        if disk.read_json(folder / "train.json").get("step") != int(folder.name[5:]):
            raise ValueError("its train.json is of another step than its name")
    except (OSError, ValueError, UserError) as error:
        return f"{folder} is damaged: {error}"
    return None


def set_damaged_aside(run: Run) -> None:
    """Rename checkpoints newer than the newest intact one. Raises UserError if none is intact."""
    folders = [path for path in run.folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    problems: dict[Path, str] = {}
    for folder in sorted(folders, key=lambda path: -int(path.name[5:])):
        problem = damage(folder)
        if problem is None:
            break
        problems[folder] = problem
    if problems and len(problems) == len(folders):
        first = next(iter(problems.values()))
        raise UserError(f"no checkpoint in {run.folder} is intact: {first}: restore one, or delete them all")
    for folder, problem in problems.items():
        aside = folder.with_name(folder.name + ".damaged")
        with disk.writable(aside):
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
        run.say(f"warning: {problem}; it is kept as {aside.name}")


class Log:
    """log.jsonl: one object per step. On resuming, the lines after the checkpoint are dropped. `elapsed`:
    seconds up to the checkpoint, in rank 0."""

    def __init__(self, run: Run, step: int) -> None:
        self.path, self.elapsed = run.folder / "log.jsonl" if run.rank == 0 else None, 0.0
        if self.path and self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if step_of(line) <= step]
            disk.write_text(self.path, "".join(f"{line}\n" for line in kept))
            last = json.loads(kept[-1]).get("elapsed") if kept else None
            self.elapsed = float(last) if isinstance(last, int | float) else 0.0

    def write(self, line: dict) -> None:
        if self.path:
            with disk.writable(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                    file.write(json.dumps(line) + "\n")


def step_of(line: str) -> float:
    """The step of a line of the log; infinity for a damaged line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")

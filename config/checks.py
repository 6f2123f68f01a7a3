"""config/checks.py: what must hold in every Config? Each function lists the problems it finds."""

import math
import re
import types
import typing
from typing import Any  # a Config is Any here: config imports this file


def types_of(cfg: Any, name: str) -> tuple:
    """The types that a field may hold: "decay_steps" -> (int, NoneType)."""
    hint = cfg.__dataclass_fields__[name].type
    return typing.get_args(hint) or (hint,)


def wrong_types(cfg: Any) -> list[str]:
    """Values that do not have their field's type. A whole number may be given for a float."""
    problems = []
    for name in cfg.__dataclass_fields__:
        value, allowed = getattr(cfg, name), types_of(cfg, name)
        if type(value) is int and value.bit_length() > 63:
            problems.append(f"{name} is a number of {value.bit_length()} bits, and 63 is the limit")
        elif type(value) not in allowed and not (type(value) is int and float in allowed):
            wanted = " or ".join("None" if t is types.NoneType else t.__name__ for t in allowed)
            problems.append(f"{name}={value!r} must be of type {wanted}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name}={value!r} must be a finite number")
    return problems


POSITIVE = ("vocab_size n_layer n_head n_kv_head d_model d_ff seq_len rope_theta norm_eps init_std "
            "tokenizer_bytes epochs batch micro_batch lr grad_clip eval_batches dpo_beta dpo_max_length "
            "dpo_max_prompt_length").split()
NOT_NEGATIVE = ("seed data_seed max_steps warmup_steps decay_steps weight_decay eval_every save_every "
                "keep_checkpoints sample_every").split()
AT_MOST = {"n_layer": 1000, "n_head": 2**16, "d_model": 2**20, "d_ff": 2**20, "seq_len": 2**24,
           "vocab_size": 2**16}  # shards store ids in 16 bits; the other limits only a damaged file exceeds
CHOICES = {"device": ("auto", "cpu", "cuda", "mps"), "dtype": ("bfloat16", "float32"),
           "optimizer": ("adamw", "muon"), "schedule": ("wsd", "cosine"), "on_bad": ("stop", "skip")}


def wrong_values(cfg: Any) -> list[str]:
    """Every value and every combination that cannot work."""
    problems = [f"{name}={getattr(cfg, name)} must be above 0" for name in POSITIVE
                if getattr(cfg, name) <= 0]
    problems += [f"{name}={getattr(cfg, name)} must be at most {limit:,}" for name, limit in AT_MOST.items()
                 if getattr(cfg, name) > limit]
    problems += [f"{name}={getattr(cfg, name)} must not be negative" for name in NOT_NEGATIVE
                 if (getattr(cfg, name) or 0) < 0]
    problems += [f"{name}={getattr(cfg, name)!r} must be one of {', '.join(choices)}"
                 for name, choices in CHOICES.items() if getattr(cfg, name) not in choices]
    if not cfg.out_dir:
        problems.append("out_dir must name a folder")
    problems += [f"{name}={getattr(cfg, name)} must be at least 0 and below 1"
                 for name in ("val_fraction", "warmup_ratio", "beta1", "beta2")
                 if not 0 <= getattr(cfg, name) < 1]
    if problems:
        return problems  # the combinations below divide by these numbers
    if cfg.d_model % cfg.n_head or cfg.head_dim % 2:
        problems.append(f"d_model={cfg.d_model} must be an even multiple of n_head={cfg.n_head}: "
                        "RoPE rotates the channels of a head in pairs")
    if cfg.n_head % cfg.n_kv_head:
        problems.append(f"n_head={cfg.n_head} must be a multiple of n_kv_head={cfg.n_kv_head}")
    if cfg.batch % cfg.micro_batch:
        problems.append(f"batch={cfg.batch} must be a multiple of micro_batch={cfg.micro_batch}")
    if cfg.dpo_max_prompt_length >= cfg.dpo_max_length:
        problems.append(f"dpo_max_prompt_length={cfg.dpo_max_prompt_length} must be below "
                        f"dpo_max_length={cfg.dpo_max_length}: answers need room")
    part = re.fullmatch(r"(\d+)/(\d+)", cfg.part)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        problems.append(f"part={cfg.part!r} must be like 3/64, counted from 1")
    return problems + wrong_schedule(cfg) + wrong_data(cfg)


def wrong_schedule(cfg: Any) -> list[str]:
    """A warm-up that reaches into the decay makes the learning rate jump. Unknown while max_steps is 0."""
    given = f"warmup_steps={cfg.warmup_steps}" if cfg.warmup_steps else f"warmup_ratio={cfg.warmup_ratio}"
    if cfg.max_steps and cfg.schedule == "cosine" and cfg.warmup >= cfg.max_steps:
        return [f"{given} must end before the run of max_steps={cfg.max_steps} does"]
    if cfg.max_steps and cfg.warmup + cfg.decay > cfg.max_steps:
        fifth = " (a fifth of the run)" if cfg.decay_steps is None else ""
        return [f"{given} and decay_steps={cfg.decay_steps}{fifth} are together longer than the run: "
                f"{cfg.warmup} + {cfg.decay} steps are more than max_steps={cfg.max_steps}"]
    return []


def wrong_data(cfg: Any) -> list[str]:
    """What is wrong with `data`: its form, its weights, its first steps."""
    for entry in cfg.data:
        form = [type(value) for value in entry] if isinstance(entry, tuple) else []
        if form not in ([str, float], [str, int], [str, float, int], [str, int, int]) or not entry[0]:
            return [f"data entry {entry!r} must be (source, weight) or (source, weight, first step)"]
    problems = [f"weight {entry[1]} of {entry[0]!r} must be a multiple of 1/1000, above 0 and at most 1"
                for entry in cfg.data
                if not 0 < entry[1] <= 1 or abs(entry[1] * 1000 - round(entry[1] * 1000)) > 1e-9]
    for start, weights in cfg.mixtures:
        total = sum(weights.values())
        if abs(total - 1) > 1e-9 and not cfg.fractions:
            problems.append(f"the weights of the mixture from step {start} add up to {total:g}, not 1")
    if sum(len(weights) for _, weights in cfg.mixtures) < len(cfg.data):
        problems.append("data names a source twice in one mixture: add the two weights")
    if not cfg.data or cfg.mixtures[0][0] != 0:
        problems.append("data must have a mixture that starts at step 0")
    return problems

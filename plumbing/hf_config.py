"""
hf_config.py: what the files of a Hugging Face folder say of a model: its shape, what ends it, its template.

What this project's model cannot do is refused by name, instead of being read past.           next: model.py
"""

from pathlib import Path

from plumbing import checkpoint
from config import Config, UserError

HF_NAMES = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
            "n_kv_head": "num_key_value_heads", "d_model": "hidden_size", "d_ff": "intermediate_size",
            "seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
            "tie_embeddings": "tie_word_embeddings"}
FIXED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
         "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "rope_scaling": None,
         "pretraining_tp": 1}
UNUSED = {"partial_rotary_factor": 1.0, "rope_interleaved": False, "sliding_window": None,
          "quantization_config": None}  # what others may ask for, and what asks for nothing


def to_hf(cfg: Config) -> dict:
    """A Config in Hugging Face's words. rope_theta stands twice: for transformers 4 and for 5."""
    return {**FIXED, "use_cache": True,
            **{theirs: getattr(cfg, ours) for ours, theirs in HF_NAMES.items()}, "head_dim": cfg.head_dim,
            "rope_theta": cfg.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
            "initializer_range": cfg.init_std, "doc_mask": cfg.doc_mask, "dtype": "float32",
            "torch_dtype": "float32"}


def end_ids(stop_id: int) -> dict[str, int | None]:
    """SmolLM's ids of beginning, end and padding: base models say 0 and 0, chat models 1, 2 and 2."""
    chat = stop_id != 0
    return {"bos_token_id": int(chat), "eos_token_id": stop_id, "pad_token_id": stop_id if chat else None}


def stop_ids(folder: Path | str) -> list[int]:
    """The ids that end what the model of a folder writes: [0], or [2] of a chat model; 0 is named last.

    generation_config.json may name several, and has the word before config.json.
    """
    for path in (Path(folder) / "generation_config.json", Path(folder) / "config.json"):
        found = checkpoint.read_json(path).get("eos_token_id") if path.exists() else None
        ids = found if isinstance(found, list) else [found]
        if found is not None and not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"{path}: eos_token_id={found!r} must be an id or a list of ids")
        if found not in (None, []):
            return sorted(ids, key=lambda i: i == 0)
    return [0]


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


def read_config(folder: Path | str) -> Config:
    """The Config of a model folder. Raises UserError for a model that this project does not implement."""
    path = Path(folder) / "config.json"
    theirs = checkpoint.read_json(path)
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


def chat_template(folder: Path) -> str | None:
    """The Jinja text of a model folder's template, from where transformers looks for it, or None."""
    jinja, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if jinja.exists():
        try:
            return jinja.read_text(encoding="utf-8")
        except ValueError as error:
            raise UserError(f"{jinja} cannot be read: {error}") from None
    text = checkpoint.read_json(settings).get("chat_template") if settings.exists() else None
    if isinstance(text, list):  # several, by name
        text = {each.get("name"): each.get("template") for each in text
                if isinstance(each, dict)}.get("default")
    if not isinstance(text, str | None):
        raise UserError(f"{settings}: chat_template must be a text, not {type(text).__name__}")
    return text

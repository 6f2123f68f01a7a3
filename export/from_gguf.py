"""
export/from_gguf.py: the way back, from a GGUF file to a checkpoint.

    python -m export.from_gguf SmolLM2-135M-Instruct.Q4_1.gguf out/smollm2

This is gguf_file.py backwards: the names and the order of rows are Hugging Face's again, and each weight is
scale * q in float32. What rounding to 4 or 8 bits lost stays lost: the folder contains the model that
llama.cpp runs. What our model or tokenizer cannot do is refused. Otherwise the folder would contain another
model.
"""

import argparse
from pathlib import Path
from typing import Any

import plumbing  # noqa: F401  # isort: skip  # before torch: it sets how threads wait

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models
from torch import Tensor

from config import Config, UserError
from export.gguf_file import gguf_name
from model import SmolLM
from plumbing import checkpoint, disk
from plumbing.processes import command
from tokenizer import CHAT_TEMPLATE, SPECIAL, SPLIT, Tokenizer, rust_tokenizer

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def pairs_half_a_head_apart(weight: Tensor, n_head: int) -> Tensor:
    """Undo pairs_side_by_side. Rows of a head: 0 3 1 4 2 5 -> 0 1 2 3 4 5."""
    return weight.reshape(n_head, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def read_shape(facts: dict[str, Any], tensors: dict[str, Any]) -> Config:
    """The Config, from llama.cpp's words. Raises UserError for what our model does not have."""
    def fact(name: str, default: Any = None) -> Any:
        value = facts.get(f"llama.{name}", default)
        if value is None:
            raise UserError(f"it lacks llama.{name}")
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 9.99999975e-06 -> 1e-05

    if facts.get("general.architecture") != "llama":
        raise UserError(f"general.architecture={facts.get('general.architecture')!r} is not 'llama'")
    if scaling := [name for name in facts if "rope.scal" in name and facts[name] not in ("none", 1.0)]:
        raise UserError(f"{scaling[0]}={facts[scaling[0]]!r} is not implemented here")
    cfg = Config(vocab_size=int(tensors["token_embd.weight"].shape[1]), seq_len=fact("context_length"),
                 d_model=fact("embedding_length"), n_layer=fact("block_count"),
                 n_head=fact("attention.head_count"),
                 n_kv_head=fact("attention.head_count_kv", fact("attention.head_count")),
                 d_ff=fact("feed_forward_length"), norm_eps=fact("attention.layer_norm_rms_epsilon"),
                 rope_theta=fact("rope.freq_base", 10000.0), tie_embeddings="output.weight" not in tensors)
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if fact(name, cfg.head_dim) != cfg.head_dim:
            raise UserError(f"llama.{name}={fact(name)} is not embedding_length / head_count, {cfg.head_dim}")
    return cfg


def read_model(cfg: Config, tensors: dict[str, Any]) -> SmolLM:
    """The model. Raises UserError for a tensor that is missing, has another shape or kind, or is not ours."""
    import gguf
    with torch.device("meta"):
        model = SmolLM(cfg)
    expected = {gguf_name(name): name for name in model.state_dict()}
    if different := sorted(expected.keys() ^ tensors.keys()):
        problem = "is missing" if different[0] in expected else "is no weight of this model"
        raise UserError(f"{different[0]} {problem}")
    weights, heads = {}, {"attn_q": cfg.n_head, "attn_k": cfg.n_kv_head}
    for theirs, ours in expected.items():
        tensor, shape = tensors[theirs], model.state_dict()[ours].shape
        if tensor.tensor_type.name not in KINDS:
            raise UserError(f"{theirs} is {tensor.tensor_type.name}, and only {', '.join(KINDS)} are read")
        weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
        if weight.shape != shape:
            raise UserError(f"{theirs} has shape {tuple(weight.shape)}, and the model needs {tuple(shape)}")
        n_head = heads.get(theirs.split(".")[-2])
        weights[ours] = pairs_half_a_head_apart(weight, n_head) if n_head else weight
    model.load_state_dict(weights, assign=True)
    return model


def read_tokenizer(facts: dict[str, Any]) -> Tokenizer:
    """The tokenizer. Raises UserError for one that would split or encode text differently from SmolLM's."""
    from gguf import TokenType
    found = {name: facts.get(f"tokenizer.ggml.{name}") for name in ("model", "pre", "add_bos_token")}
    if (found["model"], found["pre"], bool(found["add_bos_token"])) != ("gpt2", "smollm", False):
        raise UserError(f"its tokenizer is {found}, not gpt2 with the split smollm and no token in front")
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    ids = {token: i for i, token in enumerate(tokens) if kinds[i] != TokenType.UNUSED}
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    rust = tokenizers.Tokenizer(models.BPE(ids, merges))
    rust.pre_tokenizer, rust.decoder = SPLIT, decoders.ByteLevel()
    rust.add_tokens([AddedToken(token, special=kinds[i] == TokenType.CONTROL, normalized=False)
                     for token, i in ids.items() if kinds[i] != TokenType.NORMAL])
    if problem := disk.difference(rust, rust_tokenizer([]), SPECIAL[:3]):
        raise UserError(f"its tokenizer is not SmolLM's: {problem}")
    return Tokenizer(rust, facts.get("tokenizer.chat_template") or CHAT_TEMPLATE,
                     (facts["tokenizer.ggml.eos_token_id"],))


# ---------------------------------------------------------------------------------------------------------
# the command


def contents(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """({key: value}, {name: tensor}) of a GGUF file. Tensors are not read yet."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("this needs the package gguf: pip install gguf") from None
    try:
        reader = GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the library raises a dozen kinds
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as a GGUF file: {reason}") from None
    return facts, {tensor.name: tensor for tensor in reader.tensors}


def read(facts: dict[str, Any], tensors: dict[str, Any]) -> tuple[SmolLM, Tokenizer]:
    return read_model(read_shape(facts, tensors), tensors), read_tokenizer(facts)


def convert(path: Path | str, out: Path | str) -> None:
    """Write the model of a GGUF file as a checkpoint. Raises UserError for one that would not be the same."""
    facts, tensors = contents(path)
    try:
        model, tok = read(facts, tensors)
    except KeyError as error:
        raise UserError(f"{path} cannot be used here: it lacks {error}") from None
    except UserError as error:
        raise UserError(f"{path} cannot be used here: {error}") from None
    with disk.new_folder(out) as folder:
        checkpoint.save(folder, model, tok)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m export.from_gguf", description=__doc__.strip(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a GGUF file of a Llama with SmolLM's tokenizer")
    parser.add_argument("folder", help="the checkpoint to write")
    args = parser.parse_args(argv)
    convert(args.file, args.folder)
    print(f"{args.folder}: python sample.py {args.folder} --prompt='Once upon a time'")


if __name__ == "__main__":
    command(main, own_help=True)

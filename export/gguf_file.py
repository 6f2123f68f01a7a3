"""
gguf_file.py: a checkpoint as one file that llama.cpp runs.

A GGUF file holds everything at once: the shape of the model, the tokenizer, the chat template, the weights.
Two things in it are not as in our folder.

1. The rows of q_proj and k_proj. RoPE turns pairs of numbers. Here and at Hugging Face a pair lies half a
   head apart, (i, i + D/2); in llama.cpp side by side, (2i, 2i + 1), as in the paper. Each row of these
   matrices makes one number of a head, so another order of rows brings every pair to where it is expected:

       rows of a head here    0  1  2  3  4  5  6  7        pairs (0, 4) (1, 5) (2, 6) (3, 7)
       and in the file        0  4  1  5  2  6  3  7        the same pairs, side by side

   A query times a key is a sum over all pairs, in any order. Values have no pairs and stay as they are.

2. The weights. q8_0 and q4_0 store 32 neighbours of a row as one float16 d and 32 whole numbers q, and
   weight = d q:

       q8_0    q from -127 to 127    34 bytes for 32 weights, 8.5 bits each
       q4_0    q from -8 to 7        18 bytes for 32 weights, 4.5 bits each

   One large weight makes its 31 neighbours coarse, and only these: hence blocks, not one d for a matrix.

llama.cpp's own converter knows tokenizers by a fingerprint and refuses one that was trained at home.

                                                                                            next: export.py
"""

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plumbing import checkpoint
from plumbing import hf_config
from config import Config, UserError
from model import SmolLM
from tokenizer import Tokenizer

QUANTS = ("f16", "bf16", "q8_0", "q4_0")
BLOCK = 32
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}

# ---------------------------------------------------------------------------------------------------------
# weights


def gguf_name(name: str) -> str:
    """model.layers.7.self_attn.q_proj.weight -> blk.7.attn_q.weight"""
    layer, module = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name).groups()
    return (f"blk.{layer}." if layer else "") + NAMES[module] + ".weight"


def pairs_side_by_side(weight: Tensor, n_head: int) -> Tensor:
    """The rows of q_proj or k_proj (n_head D, C), each head's halves riffled: 0 1 2 3 -> 0 2 1 3."""
    return weight.reshape(n_head, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 for 0: a block of zeros."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def q8_0(blocks: np.ndarray) -> np.ndarray:
    """(N, 32) float32 -> (N, 34) bytes: d, then q. The largest weight of a block becomes 127 or -127."""
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127                # (N, 1)
    q = np.rint(blocks * inverse(scale)).astype(np.int8)
    return np.concatenate((scale.astype(np.float16).view(np.uint8), q.view(np.uint8)), axis=1)


def q4_0(blocks: np.ndarray) -> np.ndarray:
    """(N, 32) float32 -> (N, 18) bytes: d, then q + 8 of weights i and i + 16 in one byte.

    The largest weight becomes -8, the end that reaches further: so d has the opposite sign of it.
    """
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / -8                                                   # (N, 1)
    q = (blocks * inverse(scale) + 8.5).astype(np.uint8).clip(max=15)      # + 8, rounded: 0 to 15
    return np.concatenate((scale.astype(np.float16).view(np.uint8), q[:, :16] | q[:, 16:] << 4), axis=1)


def packed(weight: Tensor, kind: str) -> np.ndarray:
    """A float32 tensor (rows, columns) -> the array that the file holds; q8_0, q4_0, bf16 as bytes."""
    if kind == "bf16":
        return weight.bfloat16().view(torch.uint8).numpy()
    array = weight.numpy()
    if kind in ("f32", "f16"):
        return array.astype({"f32": np.float32, "f16": np.float16}[kind])
    blocks = {"q8_0": q8_0, "q4_0": q4_0}[kind](array.reshape(-1, BLOCK))
    return blocks.reshape(len(array), -1)


def kind_of(name: str, quant: str) -> str:
    """How a tensor is stored. Norms are few and stay float32.

    With q4_0 the embedding gets 8 bits: tied, it is also the output head, and what is rounded off there is
    in every score. llama.cpp's own tool gives it more bits, too.
    """
    if "norm" in name:
        return "f32"
    return "q8_0" if quant == "q4_0" and ("embed" in name or "lm_head" in name) else quant


def add_weights(writer: Any, model: SmolLM, quant: str) -> None:
    """Put every tensor of the model into the file; a tied head is not written twice, as in our folder."""
    from gguf import GGMLQuantizationType
    heads = {"q_proj": model.cfg.n_head, "k_proj": model.cfg.n_kv_head}
    for name, weight in model.state_dict().items():
        n_head, kind = heads.get(name.split(".")[-2]), kind_of(name, quant)
        if n_head:
            weight = pairs_side_by_side(weight, n_head)
        writer.add_tensor(gguf_name(name), packed(weight, kind), raw_dtype=GGMLQuantizationType[kind.upper()])


# ---------------------------------------------------------------------------------------------------------
# what llama.cpp must know besides


def add_shape(writer: Any, cfg: Config, quant: str) -> None:
    """The Config in llama.cpp's words."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType
    writer.add_type("model")
    writer.add_file_type(LlamaFileType[f"MOSTLY_{quant.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.seq_len)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.n_layer)
    writer.add_feed_forward_length(cfg.d_ff)
    writer.add_head_count(cfg.n_head)
    writer.add_head_count_kv(cfg.n_kv_head)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)


def add_tokenizer(writer: Any, tok: Tokenizer, vocab_size: int) -> None:
    """Tokens by id, and merges by rank.

    "gpt2" is byte-level BPE, and "smollm" the split before it: every digit alone, then GPT-2's pattern. Of
    the types, CONTROL is never found in text unless the caller wants it: typed by a user, it stays text.
    """
    from gguf import TokenType
    special = tok.rust.get_added_tokens_decoder()
    tokens = [*tok.tokens, *[""] * (vocab_size - tok.vocab_size)]  # a model may have more ids than are used
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token or f"[PAD{i}]" for i, token in enumerate(tokens)])  # names must differ
    writer.add_token_types([TokenType.CONTROL if i in special else TokenType.NORMAL if token
                            else TokenType.UNUSED for i, token in enumerate(tokens)])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tok.rust.to_str())["model"]["merges"]])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


# ---------------------------------------------------------------------------------------------------------
# the file


def write(folder: Path | str, path: Path | str, quant: str) -> None:
    """Write the model of a checkpoint folder to `path`, completely or not at all.

    Raises UserError when the package gguf is missing, when the rows of the model's matrices are not whole
    blocks, or when its tokenizer has more ids than the model.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("--format=gguf needs the package gguf: pip install gguf") from None
    model, tok, path = SmolLM.load(folder), Tokenizer.load(folder), Path(path)
    cfg = model.cfg
    if quant in ("q8_0", "q4_0") and (cfg.d_model % BLOCK or cfg.d_ff % BLOCK):
        raise UserError(f"{quant} needs rows of whole blocks: d_model={cfg.d_model} and d_ff={cfg.d_ff} must "
                        f"be multiples of {BLOCK}. Use --quant=f16")
    if tok.vocab_size > cfg.vocab_size:
        raise UserError(f"the tokenizer in {folder} has {tok.vocab_size} ids, and the model {cfg.vocab_size}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    add_shape(writer, cfg, quant)
    add_tokenizer(writer, tok, cfg.vocab_size)
    for name, number in hf_config.end_ids(model.stop_id).items():  # bos_token_id, eos_..., pad_...
        if number is not None:
            getattr(writer, f"add_{name}")(number)
    if template := hf_config.chat_template(Path(folder)):
        writer.add_chat_template(template)
    add_weights(writer, model, quant)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    checkpoint.put(temporary, path)

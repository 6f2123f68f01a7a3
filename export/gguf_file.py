"""
export/gguf_file.py: a checkpoint as one file that llama.cpp runs.

A GGUF file contains everything: the shape of the model, the tokenizer, the chat template, the weights. Two
things differ from our folder.

1. The order of rows in q_proj and k_proj. RoPE rotates pairs of numbers. Here and at Hugging Face a pair is
   half a head apart, (i, i + D/2). In llama.cpp it is side by side, (2i, 2i + 1), as in the paper. Each row
   of these matrices computes one number of a head, so reordering the rows moves every number to where
   llama.cpp expects it:

       rows of a head here    0  1  2  3  4  5  6  7        pairs (0, 4) (1, 5) (2, 6) (3, 7)
       and in the file        0  4  1  5  2  6  3  7        the same pairs, side by side

   The score of a query and a key is a sum over all pairs, so their order does not matter. Values are not
   rotated and keep their order.

2. The weights can be blocks of 32 small integers q with one scale in float16 (blocks.py):

       q8_0    8 bits per q    34 bytes for 32 weights, 8.5 bits each
       q4_0    4 bits per q    18 bytes for 32 weights, 4.5 bits each; some matrices keep q8_0

llama.cpp's own converter recognizes tokenizers by a fingerprint, and refuses one that was trained at home.

    python -m export out/demo/dpo --format=gguf --quant=q8_0
"""

import json
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config, UserError
from export.blocks import BLOCK, KEEP_8_BITS, to_4_bits, to_8_bits
from model import SmolLM
from plumbing import checkpoint, disk
from sample import DEFAULTS
from tokenizer import CHAT_TEMPLATE, SMOLLM2_TEMPLATE, SYSTEM, Tokenizer

# tokenizer.CHAT_TEMPLATE with the prompt for an answer, as a Go template
OLLAMA_TEMPLATE = ("{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
                   "<|im_start|>assistant\n")
QUANTS = ("f16", "bf16", "q8_0", "q4_0")
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
    """Reorder the rows of q_proj or k_proj (n_head D, C) within each head: 0 1 2 3 -> 0 2 1 3."""
    return weight.reshape(n_head, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def q8_0(blocks: np.ndarray) -> np.ndarray:
    """(N, 32) float32 -> (N, 34) bytes: the scale, then 32 q."""
    scale, q = to_8_bits(blocks)
    return np.concatenate((scale.astype(np.float16).view(np.uint8), q.view(np.uint8)), axis=1)


def q4_0(blocks: np.ndarray) -> np.ndarray:
    """(N, 32) float32 -> (N, 18) bytes: the scale, then 16 bytes with the q of weights i and i + 16."""
    scale, q = to_4_bits(blocks)
    return np.concatenate((scale.astype(np.float16).view(np.uint8), q[:, :16] | q[:, 16:] << 4), axis=1)


def to_array(weight: Tensor, kind: str) -> np.ndarray:
    """A float32 tensor (rows, columns) -> the array that the file holds: bytes for q8_0, q4_0 and bf16."""
    weight = weight.contiguous()  # checkpoint.load lays some matrices out by columns
    if kind == "bf16":
        return weight.bfloat16().view(torch.uint8).numpy()
    array = weight.numpy()
    if kind in ("f32", "f16"):
        return array.astype({"f32": np.float32, "f16": np.float16}[kind])
    blocks = {"q8_0": q8_0, "q4_0": q4_0}[kind](array.reshape(-1, BLOCK))
    return blocks.reshape(len(array), -1)


def kind_of(name: str, quant: str) -> str:
    """How a tensor is stored. Norms are small and stay float32. With q4_0, some matrices get 8 bits."""
    if "norm" in name:
        return "f32"
    return "q8_0" if quant == "q4_0" and name.split(".")[-2] in KEEP_8_BITS else quant


def add_weights(writer: Any, model: SmolLM, quant: str) -> None:
    """Add every tensor of the model to the file. A tied head is not stored twice, as in our folder."""
    from gguf import GGMLQuantizationType
    heads = {"q_proj": model.cfg.n_head, "k_proj": model.cfg.n_kv_head}
    for name, weight in model.state_dict().items():
        n_head, kind = heads.get(name.split(".")[-2]), kind_of(name, quant)
        if n_head:
            weight = pairs_side_by_side(weight, n_head)
        writer.add_tensor(gguf_name(name), to_array(weight, kind),
                          raw_dtype=GGMLQuantizationType[kind.upper()])


# ---------------------------------------------------------------------------------------------------------
# what else llama.cpp must know


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
    """Tokens by id, merges by rank, and the ids that begin and end a text.

    "gpt2" is byte-level BPE. "smollm" is the split before it: single digits first, then GPT-2's pattern.
    llama.cpp finds a CONTROL token in text only if the caller asks for it, so what a user types stays text.
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
    writer.add_bos_token_id(tok.im_start_id if tok.is_chat else tok.eos_id)
    writer.add_eos_token_id(tok.ends[0])
    if tok.is_chat:
        writer.add_pad_token_id(tok.ends[0])


def modelfile(file: str, cfg: Config, tok: Tokenizer) -> str:
    """How Ollama runs the file: the chat template again, in Go's words, and how to sample.

    repeat_penalty 1 turns the penalty off: Ollama's default, 1.1, lowers every token already generated, which
    spoils an answer that repeats its question. A chat template that is not ours stays as it is in the file.
    """
    lines = [f"FROM ./{file}"]
    if not tok.is_chat:
        lines.append("TEMPLATE {{ .Prompt }}")
    elif tok.template in (CHAT_TEMPLATE, SMOLLM2_TEMPLATE):
        lines.append(f'TEMPLATE """{OLLAMA_TEMPLATE}"""')
        lines += [f"SYSTEM {SYSTEM}"] if tok.template == SMOLLM2_TEMPLATE else []
    lines += [f'PARAMETER stop "{tok.tokens[i]}"' for i in sorted(tok.stop_ids)]
    settings = {name: DEFAULTS[name] for name in ("temperature", "top_p")}
    settings |= {"repeat_penalty": 1, "num_ctx": cfg.seq_len}
    return "\n".join([*lines, *(f"PARAMETER {name} {value}" for name, value in settings.items()), ""])


# ---------------------------------------------------------------------------------------------------------
# the file


def write(name: Path | str, path: Path | str, quant: str) -> None:
    """Write a checkpoint to `path`, and a Modelfile beside it, atomically.

    Raises UserError if the package gguf is missing, if the rows of the model's matrices do not divide into
    blocks, or if its tokenizer has more ids than the model.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("--format=gguf needs the package gguf: pip install gguf") from None
    folder, path = checkpoint.find(name), Path(path)
    model, tok = checkpoint.load_llama(folder)
    cfg, template = model.cfg, disk.read_template(folder)
    if quant in ("q8_0", "q4_0") and (cfg.d_model % BLOCK or cfg.d_ff % BLOCK):
        raise UserError(f"--quant={quant} needs d_model={cfg.d_model} and d_ff={cfg.d_ff} to be multiples of "
                        f"{BLOCK}: use --quant=f16")
    if tok.vocab_size > cfg.vocab_size:
        raise UserError(f"the tokenizer in {folder} has {tok.vocab_size} ids, but the model has "
                        f"{cfg.vocab_size}")
    with disk.writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with closing(gguf.GGUFWriter(temporary, "llama")) as writer:
            add_shape(writer, cfg, quant)
            add_tokenizer(writer, tok, cfg.vocab_size)
            if template:
                writer.add_chat_template(template)
            add_weights(writer, model, quant)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        disk.replace(temporary, path)
    disk.write_text(path.with_name("Modelfile"), modelfile(path.name, cfg, tok))

"""
export/onnx_file.py: a checkpoint as a graph that ONNX Runtime and transformers.js run without Python.

torch.onnx.export runs the modules of model.py once and records every operation. A graph cannot remember
anything between two calls, so what model.py keeps or counts becomes an input:

    past_key_values.n.key    the cache of layer n goes in; present.n.key, T positions longer, comes out
    attention_mask (B, S)    0 where a shorter text is padded on the left; S = past + T
    position_ids (B, T)      positions count from the beginning of each text, after its padding

    python -m export out/demo/dpo --format=onnx --quant=int8

    onnx/model.onnx         fp32    the numbers of the checkpoint
    onnx/model_fp16.onnx    fp16    half the size; norms stay float32
    onnx/model_int8.onnx    int8    a bit more than a quarter: weights in blocks of 8 bits (blocks.py)
    onnx/model_q4.onnx      q4      blocks of 4 bits; some matrices keep 8 (blocks.py)
"""

# B texts, T new positions, S = past + T, C = d_model, K key/value heads, D = C / n_head

import importlib.util
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, UserError
from export.blocks import BLOCK, KEEP_8_BITS, to_4_bits, to_8_bits
from model import SmolLM
from plumbing import checkpoint, disk

FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx", "q4": "model_q4.onnx"}
BYTES = {"fp32": 4, "fp16": 2, "int8": 1.13, "q4": 1.13}  # per parameter, at most
ONE_FILE = 2_000_000_000  # bytes; larger weights go into a second file, because protobuf ends at 2 GiB
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
             "generation_config.json")

# ---------------------------------------------------------------------------------------------------------
# the graph


class GraphCache:
    """Does what KVCache does, with keys and values that come in and go out of the graph."""

    length = 0  # the graph gets its positions as an input

    def __init__(self, past: list[Tensor]) -> None:
        self.past = past
        self.present: list[Tensor] = []

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        past_k, past_v = self.past[2 * layer:2 * layer + 2]
        k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)             # (B, K, S, D)
        self.present += [k, v]
        return k, v


class Graph(nn.Module):
    """SmolLM with everything it depends on as an input. This changes the model: load it for this purpose."""

    def __init__(self, model: SmolLM, quant: str) -> None:
        super().__init__()
        self.cfg, self.decoder = model.cfg, model.model
        self.dtype = torch.float16 if quant == "fp16" else torch.float32
        self.model = model.to(self.dtype).eval()
        self.blocks = quant in ("int8", "q4")
        if self.blocks:
            embedding = Blocks(model.model.embed_tokens.weight, bits=8)
            self.head = embedding if self.cfg.tie_embeddings else Blocks(model.head, bits=8)
            self.decoder.embed_tokens = Rows(embedding)  # type: ignore[assignment]
            for name, module in list(self.decoder.named_modules()):
                if isinstance(module, nn.Linear):
                    bits = 4 if quant == "q4" and name.split(".")[-1] not in KEEP_8_BITS else 8
                    self.decoder.set_submodule(name, Blocks(module.weight, bits))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor,
                past: list[Tensor]) -> tuple[Tensor, ...]:
        """(logits (B, T, V), then the new keys and values of each layer)"""
        cache = GraphCache(past)
        mask = self.mask(input_ids.shape[1], attention_mask)
        x = self.decoder(input_ids, cache=cache, positions=position_ids[:, None], mask=mask)
        logits = self.head(x) if self.blocks else F.linear(x, self.model.head)
        return logits.float(), *cache.present

    def mask(self, T: int, attention_mask: Tensor) -> Tensor:
        """What is added to the scores (B, 1, T, S): 0 where a new position may look, else a huge negative
        number.

        Not minus infinity: a position of padding may look nowhere, and the softmax of nothing is 0 / 0.
        """
        S = attention_mask.shape[1]
        rows, columns = torch.arange(T) + (S - T), torch.arange(S)
        visible = (rows[:, None] >= columns) & attention_mask.bool()[:, None, None]
        return torch.where(visible, 0.0, torch.finfo(self.dtype).min / 2).to(self.dtype)


class Blocks(nn.Module):
    """A matrix (N, K) in 8 or 4 bits, in the place of a linear layer or an embedding."""

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.shape = {"N": weight.shape[0], "K": weight.shape[1], "bits": bits, "block_size": BLOCK}
        padded = F.pad(weight.detach(), (0, -weight.shape[1] % BLOCK)).reshape(-1, BLOCK).numpy()
        scale, q = to_8_bits(padded) if bits == 8 else to_4_bits(padded)
        # ONNX Runtime wants unsigned numbers, and those of 4 bits in pairs
        q = q.view(np.uint8) + np.uint8(128) if bits == 8 else q[:, 0::2] | q[:, 1::2] << 4
        self.q: Tensor
        self.scale: Tensor
        self.register_buffer("q", torch.from_numpy(q).view(len(weight), -1, q.shape[1]))
        self.register_buffer("scale", torch.from_numpy(scale).view(len(weight), -1))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) times the matrix: (..., N). An operation of ONNX Runtime, so this runs only there."""
        # Level 4 also rounds x to 8 bits, in blocks; level 1 computes in float32. With weights of 8 bits that
        # rounding would be the larger error, because of large numbers in x. Next to 4 bits it is small.
        level = {8: 1, 4: 4}[self.shape["bits"]]
        return torch.onnx.ops.symbolic("com.microsoft::MatMulNBits", (x, self.q, self.scale),
                                       {**self.shape, "accuracy_level": level}, dtype=x.dtype,
                                       shape=(*x.shape[:-1], self.shape["N"]), version=1)


class Rows(nn.Module):
    """An embedding whose matrix is in blocks of 8 bits: ids (B, T) -> its rows (B, T, K)."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, ids: Tensor) -> Tensor:
        rows = (self.blocks.q[ids].float() - 128) * self.blocks.scale[ids][..., None]   # (B, T, K / 32, 32)
        return rows.flatten(2)[..., :self.blocks.shape["K"]]


def record(model: SmolLM, quant: str) -> Any:
    """The graph as an onnx_ir.Model, with the names and shapes that transformers.js expects."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    graph, cfg = Graph(model, quant), model.cfg
    B, T, past = 2, 3, 4  # any example will do, since these sizes are declared variable
    ids, positions, mask = (torch.zeros(B, length, dtype=torch.long) for length in (T, T, past + T))
    names = [f"{layer}.{kind}" for layer in range(cfg.n_layer) for kind in ("key", "value")]
    cache = [torch.zeros(B, cfg.n_kv_head, past, cfg.head_dim, dtype=graph.dtype) for _ in names]
    new, seen = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 1: "total_sequence_length"}
    sizes = (new, seen, new, [{0: "batch_size", 2: "past_sequence_length"} for _ in names])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of two sizes with one name
        program = torch.onnx.export(
            graph, (ids, mask, positions, cache), dynamo=True, dynamic_shapes=sizes, opset_version=18,
            input_names=["input_ids", "attention_mask", "position_ids",
                         *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)], verbose=False)
    return ClearMetadataAndDocStringPass()(program.model).model  # it holds a stack trace for each operation


# ---------------------------------------------------------------------------------------------------------
# files


def is_large(cfg: Config, quant: str) -> bool:
    return cfg.n_params * BYTES[quant] > ONE_FILE


def write_graph(path: Path, graph: Any, large: bool) -> None:
    """Write model.onnx atomically; if it is large, model.onnx_data with the weights comes first."""
    import onnx_ir
    with disk.writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            onnx_ir.save(graph, temporary, external_data=f"{path.name}_data" if large else None)
            if large:
                path.unlink(missing_ok=True)  # an old graph next to new weights would look complete
                disk.replace(f"{temporary}_data", f"{path}_data")
            disk.replace(temporary, path)


def write(name: Path | str, out: Path | str, quant: str) -> Path:
    """Write a checkpoint as out/onnx/model*.onnx, and next to it config.json and the tokenizer's files.

    Several graphs can share `out`. Returns the path of the graph. Raises UserError if a package is missing.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise UserError("--format=onnx needs the package onnxscript: pip install onnxscript")
    folder, out = checkpoint.find(name), Path(out)
    model, _ = checkpoint.load_llama(folder)
    large = {FILES[each]: is_large(model.cfg, each) for each in FILES}
    graph = record(model, quant)
    for file in TOKENIZER:
        if (folder / file).is_file():
            disk.write_text(out / file, (folder / file).read_text(encoding="utf-8"))
    theirs = {"kv_cache_dtype": {"fp16": "float16"}, "use_external_data_format": large}
    settings = disk.read_json(folder / "config.json") | {"transformers.js_config": theirs}
    disk.write_json(out / "config.json", settings)
    path = out / "onnx" / FILES[quant]
    write_graph(path, graph, large[path.name])  # last: with it the folder is complete
    return path

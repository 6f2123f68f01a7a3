"""
onnx_model.py: the decoder once more, as a graph that other runtimes execute.

ONNX describes a computation as a list of nodes, each an operator of the standard with named inputs and one
named output. ONNX Runtime and transformers.js (the browser, Node) run it without Python. Nothing is traced:
the functions below are those of model.py, and write nodes where model.py computes. What differs:

    a batch is flat         N = B T rows, so that every matrix product is plain: (N, C) x (C, out)
    the cache is in sight   past_key_values.n.key goes in, present.n.key, longer by T positions, comes out
    texts of unequal length are padded on the left: attention_mask (B, S) is 0 there, and position_ids (B, T)
                            count from each text's own beginning; S = past + T

    python export.py out/demo/dpo --format=onnx --quant=int8

    onnx/model.onnx         fp32    the numbers of the checkpoint
    onnx/model_fp16.onnx    fp16    half the size; norms, softmax and logits stay in float32
    onnx/model_int8.onnx    int8    a quarter: 8-bit weights and activations, multiplied as whole numbers
    onnx/model_q4.onnx      q4      4 bits, 32 weights share a scale; embedding and head as in int8
"""

# B texts, T new positions, S = past + T, N = B T, C = d_model, H query heads, K key/value heads, D = C / H
import importlib.util
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F

from plumbing import checkpoint
from config import Config, UserError
from model import SmolLM

FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx", "q4": "model_q4.onnx"}
BYTES = {"fp32": 4, "fp16": 2, "int8": 1.1, "q4": 1.1}  # a parameter takes at most so many
ONE_FILE = 2_000_000_000  # bytes; beyond, the weights lie beside the graph: protobuf ends at 2 GiB
FLOAT, UINT8, INT64, BOOL, FLOAT16 = 1, 2, 7, 9, 10  # ONNX's numbers of the types
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
             "generation_config.json")


class Graph:
    """Nodes in the order of their computation, and the tensors they read. A value is known by its name."""

    def __init__(self, weights: dict[str, torch.Tensor], quant: str) -> None:
        self.weights, self.quant, self.type = weights, quant, FLOAT16 if quant == "fp16" else FLOAT
        self.float: type = np.float16 if quant == "fp16" else np.float32
        self.nodes, self.tensors = dict[tuple, tuple](), dict[str, np.ndarray]()

    def node(self, op: str, *inputs: Any, output: str | None = None, domain: str = "",
             **attributes: Any) -> str:
        """Add a node and return its output's name; the same computation asked for twice is one node."""
        names = tuple(value if isinstance(value, str) else self.constant(value) for value in inputs)
        key = (op, names, output, domain, str(attributes))
        new = op, names, output or f"{op}_{len(self.nodes)}", domain, attributes
        return self.nodes.setdefault(key, new)[2]

    def constant(self, value: Any) -> str:
        """A number or a list of whole numbers -> the name of a tensor that holds it."""
        array = np.asarray(value)
        self.tensors[name := f"{array.dtype} {array.tolist()}"] = array
        return name

    def weight(self, name: str, dtype: type | None = None) -> str:
        """A weight of the checkpoint, in the graph's own precision or in dtype."""
        self.tensors[name] = self.weights[name].numpy().astype(dtype or self.float, copy=False)
        return name

    def half(self, x: str, to: int = FLOAT16) -> str:
        """In a graph of half precision, x there or back (to=FLOAT); in any other, x as it is."""
        return self.node("Cast", x, to=to) if self.type == FLOAT16 else x


# ---------------------------------------------------------------------------------------------------------
# weights and what multiplies them, in 32, 16, 8 or 4 bits


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) -> int8 (out, in) and a scale for each row: its largest number becomes 127 or -127."""
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def int4_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) -> uint8 (out, in / 32, 16), two numbers a byte, and a scale for each block (out, in / 32).

    A number is (q - 8) scale, q from 0 to 15. The scale has the sign with which the number furthest from 0
    becomes exactly -8, since -8 exists and 8 does not.
    """
    blocks = F.pad(weight, (0, -weight.shape[1] % 32)).unflatten(1, (-1, 32))
    scale = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True)) / -8
    scale[scale == 0] = 1
    q = ((blocks / scale).round().clamp(-8, 7) + 8).to(torch.uint8)
    return q[..., 0::2] | q[..., 1::2] << 4, scale[..., 0]


def quantised(g: Graph, name: str, function: Any) -> tuple[str, str]:
    """Names of the two tensors that function makes of a weight: whole numbers, and their scales."""
    if name not in g.tensors:
        q, scale = function(g.weights[name])
        g.tensors |= {name: q.numpy(), f"{name}.scale": scale.numpy()}
    return name, f"{name}.scale"


def linear(g: Graph, x: str, name: str) -> str:
    """x (N, in) times a weight of the checkpoint, (out, in): -> (N, out)."""
    if g.quant in ("fp32", "fp16"):
        return g.node("Gemm", x, g.weight(name), transB=1)
    if g.quant == "q4" and name.startswith("model.layers."):
        n_out, n_in = g.weights[name].shape
        q, scale = quantised(g, name, int4_blocks)
        return g.node("MatMulNBits", x, q, scale, domain="com.microsoft", N=n_out, K=n_in, bits=4,
                      block_size=32, accuracy_level=4)  # 4: x may be rounded to 8 bits, several times faster
    return int8_linear(g, x, name)


def int8_linear(g: Graph, x: str, name: str) -> str:
    """The same in whole numbers: (scale_x q_x) . (scale_w q_w) = scale_x scale_w (q_x . q_w).

    Each row of x gets its scale while the graph runs, so no row depends on its neighbours in the batch. q_x
    is held with 128 added, which MatMulInteger takes off again: the fast kernels want x without a sign.
    """
    peak = g.node("ReduceMax", g.node("Abs", x), [-1])                                  # (N, 1)
    scale_x = g.node("Div", g.node("Max", peak, np.float32(1e-12)), np.float32(127))
    q_x = g.node("Add", g.node("Round", g.node("Div", x, scale_x)), np.float32(128))
    q_w, scale_w = quantised(g, name, int8_rows)
    q_x, q_w = g.node("Cast", q_x, to=UINT8), g.node("Transpose", q_w, perm=[1, 0])
    y = g.node("MatMulInteger", q_x, q_w, np.uint8(128))
    return g.node("Mul", g.node("Mul", g.node("Cast", y, to=FLOAT), scale_x), scale_w)


def embed(g: Graph, name: str) -> str:
    """input_ids (B, T) -> their rows of the embedding (N, C). A tied head reads the same tensor."""
    ids = g.node("Reshape", "input_ids", [-1])
    if g.quant in ("fp32", "fp16"):
        return g.node("Gather", g.weight(name), ids)
    q, scale = quantised(g, name, int8_rows)
    scale = g.node("Unsqueeze", g.node("Gather", scale, ids), [1])                      # (N, 1)
    return g.node("Mul", g.node("Cast", g.node("Gather", q, ids), to=FLOAT), scale)


# ---------------------------------------------------------------------------------------------------------
# the decoder, as in model.py


def norm(g: Graph, cfg: Config, x: str, name: str) -> str:
    x = g.half(x, to=FLOAT)
    mean = g.node("ReduceMean", g.node("Pow", x, np.float32(2)), [-1])
    x = g.node("Div", x, g.node("Sqrt", g.node("Add", mean, np.float32(cfg.norm_eps))))
    return g.half(g.node("Mul", x, g.weight(name, np.float32)))


def rope_tables(g: Graph, cfg: Config) -> tuple[str, str]:
    """Cosine and sine for position_ids, 2 x (B, T, 1, D)."""
    speeds = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim)
    positions = g.node("Unsqueeze", g.node("Cast", "position_ids", to=FLOAT), [2, 3])
    g.tensors["rope.speeds"] = speeds.numpy()
    angles = g.node("Mul", positions, "rope.speeds")
    angles = g.node("Concat", angles, angles, axis=-1)
    return g.half(g.node("Cos", angles)), g.half(g.node("Sin", angles))


def rotate(g: Graph, cfg: Config, x: str, rope: tuple[str, str]) -> str:
    cos, sin = rope
    half = cfg.head_dim // 2
    first, second = g.node("Slice", x, [0], [half], [-1]), g.node("Slice", x, [half], [2 * half], [-1])
    turned = g.node("Concat", g.node("Neg", second), first, axis=-1)
    return g.node("Add", g.node("Mul", x, cos), g.node("Mul", turned, sin))


def visible(g: Graph) -> str:
    """True where a new position (row) may look (column): (B, 1, 1, T, S). Not ahead, and not at padding."""
    T, S = (g.node("Gather", g.node("Shape", name), 1) for name in ("input_ids", "attention_mask"))
    columns = g.node("Range", 0, S, 1)
    rows = g.node("Unsqueeze", g.node("Range", g.node("Sub", S, T), S, 1), [1])
    real = g.node("Unsqueeze", g.node("Cast", "attention_mask", to=BOOL), [1, 2, 3])
    return g.node("And", g.node("GreaterOrEqual", rows, columns), real)


def attention(g: Graph, cfg: Config, x: str, layer: int, rope: tuple[str, str], mask: str) -> str:
    H, K, D = cfg.n_head, cfg.n_kv_head, cfg.head_dim
    heads = g.node("Concat", g.node("Shape", "input_ids"), [-1, D], axis=0)
    q, k, v = (g.node("Reshape", linear(g, x, f"model.layers.{layer}.self_attn.{name}_proj.weight"), heads)
               for name in "qkv")                                                       # (B, T, H or K, D)
    q, k = rotate(g, cfg, q, rope), rotate(g, cfg, k, rope)
    k, v = (g.node("Concat", f"past_key_values.{layer}.{name}", g.node("Transpose", new, perm=[0, 2, 1, 3]),
                   axis=2, output=f"present.{layer}.{name}")                            # (B, K, S, D)
            for name, new in (("key", k), ("value", v)))
    q = g.node("Reshape", g.node("Mul", q, g.float(D ** -0.5)), [0, 0, K, H // K, D])
    q = g.node("Transpose", q, perm=[0, 2, 3, 1, 4])                                    # (B, K, H / K, T, D)
    k = g.node("Transpose", g.node("Unsqueeze", k, [2]), perm=[0, 1, 2, 4, 3])          # (B, K, 1, D, S)
    scores = g.half(g.node("MatMul", q, k), to=FLOAT)                                   # (B, K, H / K, T, S)
    # not minus infinity: a padding position sees nothing; its softmax would be 0 / 0, and spoil the others'
    scores = g.node("Where", mask, scores, np.float32(-1e9))
    y = g.node("MatMul", g.half(g.node("Softmax", scores, axis=-1)), g.node("Unsqueeze", v, [2]))
    y = g.node("Reshape", g.node("Transpose", y, perm=[0, 3, 1, 2, 4]), [-1, H * D])    # (N, C)
    return linear(g, y, f"model.layers.{layer}.self_attn.o_proj.weight")


def feed_forward(g: Graph, x: str, layer: int) -> str:
    gate, up = (linear(g, x, f"model.layers.{layer}.mlp.{name}_proj.weight") for name in ("gate", "up"))
    silu = g.node("Mul", gate, g.node("Sigmoid", gate))
    return linear(g, g.node("Mul", silu, up), f"model.layers.{layer}.mlp.down_proj.weight")


def decoder(g: Graph, cfg: Config) -> None:
    """All nodes, from input_ids to logits (B, T, V)."""
    rope, mask = rope_tables(g, cfg), visible(g)
    x = embed(g, "model.embed_tokens.weight")                                           # (N, C)
    for layer in range(cfg.n_layer):
        normed = norm(g, cfg, x, f"model.layers.{layer}.input_layernorm.weight")
        x = g.node("Add", x, attention(g, cfg, normed, layer, rope, mask))
        normed = norm(g, cfg, x, f"model.layers.{layer}.post_attention_layernorm.weight")
        x = g.node("Add", x, feed_forward(g, normed, layer))
    x = norm(g, cfg, x, "model.norm.weight")
    head = "model.embed_tokens.weight" if cfg.tie_embeddings else "lm_head.weight"
    shape = g.node("Concat", g.node("Shape", "input_ids"), [cfg.vocab_size], axis=0)
    g.node("Reshape", g.half(linear(g, x, head), to=FLOAT), shape, output="logits")


# ---------------------------------------------------------------------------------------------------------
# files


def tensor_proto(name: str, array: np.ndarray, data: BinaryIO | None) -> Any:
    """A tensor for the graph; with an open file as data the numbers go there, and the graph says where."""
    from onnx import TensorProto, helper, numpy_helper
    if data is None or array.nbytes < 1024:
        return numpy_helper.from_array(array, name)
    tensor = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL,
                         data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
    place = {"location": Path(data.name).stem, "offset": data.tell(), "length": array.nbytes}  # without .tmp
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    data.write(np.ascontiguousarray(array).data)
    return tensor


def to_proto(g: Graph, cfg: Config, data: BinaryIO | None = None) -> Any:
    """The graph as an onnx.ModelProto, with the names and shapes that transformers.js expects."""
    from onnx import helper
    B, T, past, S = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    inputs: list[tuple] = [("input_ids", INT64, [B, T]), ("attention_mask", INT64, [B, S]),
                           ("position_ids", INT64, [B, T])]
    outputs = [("logits", FLOAT, [B, T, cfg.vocab_size])]
    for name in (f"{layer}.{kind}" for layer in range(cfg.n_layer) for kind in ("key", "value")):
        inputs.append((f"past_key_values.{name}", g.type, [B, cfg.n_kv_head, past, cfg.head_dim]))
        outputs.append((f"present.{name}", g.type, [B, cfg.n_kv_head, S, cfg.head_dim]))
    sides = [[helper.make_tensor_value_info(*entry) for entry in side] for side in (inputs, outputs)]
    nodes = [helper.make_node(op, names, [output], name=output, domain=domain, **attributes)
             for op, names, output, domain, attributes in g.nodes.values()]
    tensors = [tensor_proto(name, array, data) for name, array in g.tensors.items()]
    graph = helper.make_graph(nodes, "SmolLM", *sides, tensors)  # type: ignore[call-arg, arg-type]
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, ir_version=8, opset_imports=versions, producer_name="onnx_model.py")


def is_large(cfg: Config, quant: str) -> bool:
    return cfg.n_params * BYTES[quant] > ONE_FILE


def write_graph(path: Path, g: Graph, cfg: Config) -> None:
    """Write model.onnx, or where that would be too large, first model.onnx_data with the weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    graph, data = (path.with_name(path.name + end) for end in (".tmp", "_data.tmp"))
    if is_large(cfg, g.quant):
        path.unlink(missing_ok=True)  # an old graph beside new weights would look whole
        with open(data, "wb") as file:
            graph.write_bytes(to_proto(g, cfg, file).SerializeToString())
        checkpoint.put(data, data.with_suffix(""))
    else:
        graph.write_bytes(to_proto(g, cfg).SerializeToString())
    checkpoint.put(graph, path)


def write(folder: Path | str, out_folder: Path | str, quant: str) -> Path:
    """Write a checkpoint as onnx/model*.onnx in out_folder, with the settings and the tokenizer beside it.
    quant: fp32, fp16, int8 or q4; several graphs can share an out_folder. Returns the path of the graph.
    Raises UserError for another quant, a checkpoint without a tokenizer, or without the package onnx.
    """
    if quant not in FILES:
        raise UserError(f"--quant={quant} is not known for ONNX: there are {', '.join(FILES)}")
    if importlib.util.find_spec("onnx") is None:
        raise UserError("--format=onnx needs a package that is not installed: pip install onnx")
    folder, out_folder = checkpoint.find(folder), Path(out_folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"there is no tokenizer.json in {folder}: a model of text is of no use without it")
    model = SmolLM.load(folder)
    g = Graph(model.state_dict(), quant)
    decoder(g, model.cfg)
    for name in TOKENIZER:
        if (folder / name).is_file():
            checkpoint.write(out_folder / name, (folder / name).read_text(encoding="utf-8"))
    theirs = {"kv_cache_dtype": {"fp16": "float16"},
              "use_external_data_format": {FILES[q]: is_large(model.cfg, q) for q in FILES}}
    settings = checkpoint.read_json(folder / "config.json") | {"transformers.js_config": theirs}
    checkpoint.write_json(out_folder / "config.json", settings)
    path = out_folder / "onnx" / FILES[quant]
    write_graph(path, g, model.cfg)  # last: with it the folder is whole
    return path

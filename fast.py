"""
fast.py: the decoder once more, as a processor writes text fastest.

To write one token, every weight is read from memory once and meets one row of numbers. What counts is how
many bytes a weight has, how well they are read, and how few operations there are: each costs microseconds.

    float32     4 bytes    stored by columns, which are read side by side
    bfloat16    2 bytes    by oneDNN, or by PyTorch's own kernel, whichever is faster here for one row
    int8        1 byte     weight = scale of its row * whole number from -127 to 127; the input is rounded
                           alike, and whole numbers are multiplied (Dettmers et al. 2022, eq. 4)

Matrices with the same input become one (q, k, v; gate, up). The weights of a norm go into the matrix
behind it, and 1 / rms, one number for a row, into the result: norm(x) W^T = x (W * norm)^T / rms(x).

On a GPU, and for everything but sampling, model.py serves.                                 next: sample.py
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import KVCache, SmolLM, rope_tables

# B rows, T positions, n = B T, C = d_model, H query heads, K key/value heads, D = C / H, N outputs

DTYPES = ("float32", "bfloat16", "int8")


def by_columns(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """W (N, C) -> the function x (n, C) -> x W^T, in float32."""
    columns = weight.T.contiguous()
    return lambda x: x @ columns


def half(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The same with W and x rounded to bfloat16."""
    weight = weight.bfloat16()

    def by_onednn(x):
        return F.linear(x.bfloat16(), weight).float()

    def by_pytorch(x):
        torch._C._set_mkldnn_enabled(False)  # what torch.backends.mkldnn.flags does, without its warnings
        try:
            return F.linear(x.bfloat16(), weight).float()
        finally:
            torch._C._set_mkldnn_enabled(True)

    quicker = quicker_of(by_onednn, by_pytorch, torch.ones(1, weight.shape[1]))
    return lambda x: quicker(x) if len(x) == 1 else by_onednn(x)


def quicker_of(a: Callable, b: Callable, x: Tensor) -> Callable:
    """The one of two functions that needs less time for x, the best of three."""
    seconds: dict[Callable, list[float]] = {a: [], b: []}
    for work in (a, b) * 3:
        began = time.perf_counter()
        work(x)
        seconds[work].append(time.perf_counter() - began)
    return min(seconds, key=lambda work: min(seconds[work]))


def int8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The same with W and x rounded to 8 bits, a scale for each of their rows."""
    weight, weight_scale = rounded(weight)
    weight, weight_scale = weight.T, weight_scale.T / 127**2                              # (C, N), (1, N)

    def product(x):
        x, scale = rounded(x)
        return (torch._int_mm(x, weight) * weight_scale).mul_(scale)

    return product


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, C) -> whole numbers (n, C), and the size (n, 1) of the largest in each row, which became 127."""
    largest = x.abs().amax(dim=1, keepdim=True).clamp_(min=1e-20)
    return (x / largest).mul_(127).round_().to(torch.int8), largest


PRODUCTS = dict(zip(DTYPES, (by_columns, half, int8), strict=True))


class FastLM:
    """What sample.py needs of a SmolLM, on the CPU: next_logits, and what it says about itself."""

    @torch.no_grad()
    def __init__(self, model: SmolLM, dtype: str) -> None:
        self.cfg, self.stop_id, self.other_stop_ids = model.cfg, model.stop_id, model.other_stop_ids
        self.embedding, product = model.model.embed_tokens.weight, PRODUCTS[dtype]
        self.device, self.cache_dtype = "cpu", torch.bfloat16 if dtype == "bfloat16" else torch.float32
        self.eps = torch.tensor(model.cfg.norm_eps)
        self.layers: list[tuple] = []
        self.signs = torch.tensor([-1.0, 1.0]).repeat_interleave(model.cfg.head_dim // 2)  # see model.rotate
        block: Any  # a Block, though nn.ModuleList calls it a Module
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            qkv = torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            self.layers.append((product(qkv * block.input_layernorm.weight), product(attention.o_proj.weight),
                                product(gate_up * block.post_attention_layernorm.weight),
                                product(mlp.down_proj.weight)))
        self.head = product(model.head * model.model.norm.weight)

    def per_rms(self, x: Tensor) -> Tensor:
        """1 / rms of each row of x (n, C) -> (n, 1)."""
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return torch.addcmul(self.eps, length, length, value=1 / self.cfg.d_model).rsqrt_()

    def next_logits(self, ids: Tensor, cache: KVCache) -> Tensor:
        """model.SmolLM.next_logits: ids (B, T), one position or a whole prompt -> (B, V)."""
        B, T = ids.shape
        assert T == 1 or not cache.length, "a prompt is read at once"
        positions = torch.arange(cache.length, cache.length + T)
        cos, sin = rope_tables(positions, self.cfg.head_dim, self.cfg.rope_theta)           # (T, D) each
        cos, sin = cos[:, None], (sin * self.signs)[:, None]                                # (T, 1, D) each
        x = self.embedding[ids.flatten()]                                                   # (n, C)
        for number, (qkv, o, gate_up, down) in enumerate(self.layers):
            y = self.attention(qkv(x).mul_(self.per_rms(x)), B, cos, sin, cache, number)
            x = x + o(y)
            gate, up = gate_up(x).mul_(self.per_rms(x)).chunk(2, dim=1)
            x += down(F.silu(gate).mul_(up))
        cache.length += T
        last = x.view(B, T, -1)[:, -1]
        return self.head(last).mul_(self.per_rms(last))

    def attention(self, qkv: Tensor, B: int, cos: Tensor, sin: Tensor, cache: KVCache, number: int) -> Tensor:
        """Queries, keys and values side by side, (n, (H + 2 K) D) -> what the heads gathered (n, C)."""
        H, K, D = self.cfg.n_head, self.cfg.n_kv_head, self.cfg.head_dim
        qkv = qkv.view(B, len(cos), H + 2 * K, D)
        turned, v = qkv[:, :, :H + K], qkv[:, :, H + K:]
        turned = torch.addcmul(turned * cos, turned.roll(D // 2, dims=-1), sin)  # model.rotate, signs in sin
        heads = turned.to(self.cache_dtype).transpose(1, 2)
        k, v = cache.append(number, heads[:, H:], v.transpose(1, 2))
        q = heads[:, :H]                                                                    # (B, H, T, D)
        if len(cos) == 1:  # the queries of a group stand in one matrix: its keys are read once
            y = F.scaled_dot_product_attention(q.reshape(B, K, H // K, D), k, v).view(q.shape)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
        return y.transpose(1, 2).reshape(len(qkv) * len(cos), -1).float()

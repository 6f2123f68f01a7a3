"""
model.py: the decoder, bottom-up.

A row of ids goes in, and for every position a score for each possible next id comes out:

    ids -> embedding -> [ x + attention(norm(x)) -> x + feed-forward(norm(x)) ] x n_layer -> norm -> head

The residual stream x carries C numbers per position. Attention moves information between positions, the
feed-forward layer works on each position alone. All of it is the Llama architecture; modules bear the names
that Hugging Face gives them, so that released weights fit. How a model is stored: checkpoint.py.

                                                                                             next: sample.py
"""

# B sequences, T positions, C = d_model, H query heads, K key/value heads, D = C / H, V vocabulary

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from plumbing import checkpoint
from plumbing import hf_config
from config import Config
from cross_entropy import IGNORE, target_log_probs  # noqa: F401  whoever makes targets finds IGNORE here


class RMSNorm(nn.Module):
    """Scale each position's vector to mean square 1 (Zhang & Sennrich 2019, eq. 4), in float32."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.eps = cfg.norm_eps
        self.weight = nn.Parameter(torch.ones(cfg.d_model))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of every (position, pair) (Su et al. 2021, eq. 15), float32: 2 x (T, D).

    Pair i turns by theta^(-2i/D) radians a position: the first pairs like a second hand, the last like an
    hour hand. The tables are computed anew in float32 each time, so no cast of the model can blur them.
    """
    speeds = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = torch.outer(positions.float(), speeds).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of queries or keys (B, H, T, D) by their position's angle.

    A product of a query and a key then depends on the distance of their positions only. The pairs are the
    halves of the head, as in the released weights, and not neighbours as in the paper: the order does not
    matter as long as it is always the same.
    """
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of the positions seen so far, so that generating a token reads only that token."""

    def __init__(self, cfg: Config, batch: int, length: int, device: torch.device | str | None = None,
                 dtype: torch.dtype = torch.float32) -> None:
        shape = (cfg.n_layer, batch, cfg.n_kv_head, length, cfg.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, T, D) behind the earlier ones; returns all: (B, K, length + T, D) each."""
        end = self.length + k.shape[2]
        assert end <= self.keys.shape[3], f"the cache holds {self.keys.shape[3]} positions, not {end}"
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H heads ask, and H / K of them share keys and values.

        queries   0 1 2   3 4 5   6 7 8          fewer keys and values to remember while generating:
        keys        0       1       2            a third of the cache with SmolLM-135M's 9 and 3
    """

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.q_proj = nn.Linear(cfg.d_model, cfg.n_head * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.d_model, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.d_model, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.d_model, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        H, K, D = self.cfg.n_head, self.cfg.n_kv_head, self.cfg.head_dim
        q = rotate(self.q_proj(x).view(B, T, H, D).transpose(1, 2), rope)  # (B, H, T, D)
        k = rotate(self.k_proj(x).view(B, T, K, D).transpose(1, 2), rope)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, K, D).transpose(1, 2)                # (B, K, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        causal = mask is None and T > 1  # a single new position may see all that came before it
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=H != K)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))             # heads side by side again


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): one projection opens and closes gates for another."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down_proj = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)                      # (B, T, d_ff)
        if not torch.is_grad_enabled():
            return self.gated(gate, up)
        # kept for the backward pass are these two; their product and silu(gate), as large, are made again
        return recompute_in_backward(self.gated, gate, up, use_reentrant=False, preserve_rng_state=False)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Both layers read a normalised copy of the residual stream and add their result to it."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg)
        self.mlp = FeedForward(cfg)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """ids (B, T) -> the normalised residual stream after the last block (B, T, C)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = RMSNorm(cfg)

    def forward(self, ids: Tensor, doc: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        rope = rope_tables(positions, self.cfg.head_dim, self.cfg.rope_theta)
        mask = self.mask(positions, start, doc)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, rope, mask, cache)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x)

    def mask(self, positions: Tensor, start: int, doc: Tensor | None) -> Tensor | None:
        """True where a position (row) may look (column); None where plain causal attention is meant."""
        T = len(positions)
        if self.cfg.doc_mask and doc is not None:
            same = doc[:, None, :, None] == doc[:, None, None, :]                           # (B, 1, T, T)
            return same & (positions[:, None] >= positions)
        if start and T > 1:  # a chunk of several positions behind a filled cache
            return positions[:, None] >= torch.arange(start + T, device=positions.device)   # (T, start + T)
        return None


class SmolLM(nn.Module):
    """The language model: a decoder, and a head that scores each id of the vocabulary as the next one."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.stop_id = 0  # the id that ends what it writes: <|endoftext|>, or <|im_end|> of a chat model
        self.other_stop_ids: list[int] = []  # more of them, where a checkpoint of others names several
        self.model = Decoder(cfg)
        if not cfg.tie_embeddings:
            self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Normal with std init_std; o_proj and down_proj, which write into the residual stream 2 n_layer
        times, with init_std / sqrt(2 n_layer), so that it does not grow with depth. As nanotron for SmolLM.
        """
        for name, weight in self.named_parameters():
            if "norm" not in name:
                scaled = name.endswith(("o_proj.weight", "down_proj.weight"))
                shrink = (2 * self.cfg.n_layer) ** 0.5 if scaled else 1.0
                nn.init.normal_(weight, std=self.cfg.init_std / shrink)

    @property
    def head(self) -> Tensor:
        """The matrix (V, C) of the output scores; with tie_embeddings it is the embedding itself."""
        return self.model.embed_tokens.weight if self.cfg.tie_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.head.dtype

    def forward(self, ids: Tensor, targets: Tensor | None = None, doc: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V); with targets (B, T) -> the log-probability of each target (B, T).

        Log-probabilities are float32, and 0 where the target is IGNORE. doc (B, T) numbers the documents in
        a row; with cfg.doc_mask they do not see each other. cache: a KVCache with the positions before ids.
        """
        x = self.model(ids, doc, cache)                                    # (B, T, C)
        if targets is None:
            return F.linear(x, self.head)                                  # (B, T, V)
        assert ids.shape == targets.shape, f"{tuple(ids.shape)} ids, but {tuple(targets.shape)} targets"
        return target_log_probs(x.flatten(0, 1), self.head, targets.flatten()).view_as(targets)

    def next_logits(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Scores of the id behind the last one, (B, V): all positions are read, and one goes to the head."""
        return F.linear(self.model(ids, cache=cache)[:, -1], self.head)

    def save(self, folder: Path | str) -> None:
        """Write config.json, generation_config.json and model.safetensors, in float32, as Hugging Face."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        ends: dict = hf_config.end_ids(self.stop_id)
        checkpoint.write_json(f"{folder}/config.json", hf_config.to_hf(self.cfg) | ends)
        if self.other_stop_ids:
            ends = ends | {"eos_token_id": [self.stop_id, *self.other_stop_ids]}
        checkpoint.write_json(f"{folder}/generation_config.json", ends)
        weights = {name: tensor.float() for name, tensor in self.state_dict().items()}
        checkpoint.write_tensors(f"{folder}/model.safetensors", weights)

    @classmethod
    def load(cls, name: Path | str, cfg: Config | None = None) -> "SmolLM":
        """Open a step folder, a stage folder (its newest step) or a model of the hub, in float32.

        cfg: the Config to use instead of the folder's, of the same shape. Raises UserError for a file that
        is damaged or does not fit, before any weight is loaded.
        """
        folder = checkpoint.find(name)
        with torch.device("meta"):  # shapes without memory: the weights come from the file
            model = cls(cfg or hf_config.read_config(folder))
        weights = checkpoint.read_tensors(folder / "model.safetensors", model.state_dict())
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
        model.stop_id, *model.other_stop_ids = hf_config.stop_ids(folder)
        return model

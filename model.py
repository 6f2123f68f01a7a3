"""
model.py: the decoder, from the bottom up.

Token ids go in. For every position, a score (logit) for each possible next token comes out:

    ids -> embedding -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] x n_layer -> norm -> head

The embedding is a table with a row of C numbers for each token; an id selects its row. That row starts the
residual stream x, to which each layer adds what it found out. Because layers add and never replace, nothing
earlier is lost, and the gradient reaches every layer directly. Attention moves information between positions;
the MLP works on each position alone. (A layer, or block, is one attention and one MLP.) The head compares the
final x with every row of the same table: the dot product is the logit of that token. "France" thus has one
row, for reading and for writing it.

The numbers of SmolLM-135M, all of which are learned:

    feed-forward (MLP)   79,626,240   59%        embedding, also the head   28,311,552   21%
    attention            26,542,080   20%        norms                          35,136

All of it is the Llama architecture. Modules carry Hugging Face's names, so that released weights fit without
renaming. Models are saved and loaded in plumbing/checkpoint.py.                             next: train.py
"""

# B sequences, T positions, C = d_model, H query heads, K key/value heads, D = C / H, V vocabulary

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config

IGNORE = -100  # the target of a position that is not learned from
SCORES_AT_ONCE = 2**24  # attention scores per layer, kept for the backward pass: 32 MiB in bfloat16
LOGITS_AT_ONCE = 2**24  # logits in a chunk of the loss: 64 MiB in float32, twice that with their logarithms


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: each position's vector gets root mean square 1, then a learned
    scale per channel, so that a layer can listen more to some channels than to others.

    The residual stream, a sum, grows from layer to layer. Each layer reads a normalized copy of it. Otherwise
    its input would have another size in every layer and at every moment of training, and the scores of
    attention would grow with its square (Zhang & Sennrich 2019). Computed in float32, for the squares.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.eps = cfg.norm_eps
        self.weight = nn.Parameter(torch.ones(cfg.d_model))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------
# attention: each position asks all earlier ones, and itself, for information
#
#     y = softmax(q k^T / sqrt(D)) v
#
# Three matrices turn each position's x into three vectors. Its query q says what it is looking for, its key k
# what it has to offer, its value v what it hands over if asked. When "Its capital is" has been written, the
# last position's query may look for the name of a country, and the key of "France" fits it.
#
# The dot product of a query with every key is a score, large if the two point the same way. Its D products,
# of numbers of size about 1, have both signs and mostly cancel, so their sum has a size of about sqrt(D), not
# D. Without the division, scores would lie so far apart that softmax puts all its weight on one key, and its
# gradient vanishes. Softmax takes exp of each, which is positive and turns differences of scores into
# ratios, and divides by the sum. (To take only the best key would have no gradient: nothing changes if
# another key becomes a little better.) So y is the mean of the values with these weights. Later positions are
# hidden: the model has to predict them. Could it read them, it would learn to copy the next token, and know
# nothing when there is no next token yet.
#
# One softmax takes one mean. So H heads do this side by side, each with D = C / H dimensions and matrices of
# its own: one may look for the country, another for the token just before.


def attend_slowly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: q (B, H, T, D), k and v (B, K, S, D), mask (B, 1, T, S) or (T, S), True
    where a position may look -> (B, H, T, D).

    The formula line by line; the model computes the same faster (Attention.forward). S keys are T, or more
    if a cache holds earlier ones. Each of the K key/value heads serves H / K query heads in a row.
    """
    H, K, D = q.shape[1], k.shape[1], q.shape[3]
    k = k.repeat_interleave(H // K, dim=1)                   # (B, H, S, D)   one for each query head
    v = v.repeat_interleave(H // K, dim=1)
    scores = q @ k.transpose(2, 3) / D**0.5                  # (B, H, T, S)   how well a key fits a query
    scores = scores.masked_fill(~mask, -torch.inf)           # exp(-inf) = 0: no weight on what is hidden
    weights = (scores - scores.amax(dim=3, keepdim=True)).exp()  # minus the largest, or exp may overflow
    weights = weights / weights.sum(dim=3, keepdim=True)     # softmax: weights from 0 to 1 that add up to 1
    return weights @ v                                       # (B, H, T, D)   the weighted mean of values


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """attend_slowly without copies of k and v: the queries of a group become the rows of one matrix. (This is
    for speed alone; skip it at a first reading, like the four cases in Attention.forward.)"""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    q = (q * D**-0.5).reshape(B, K, H // K * T, D)
    scores = (q @ k.mT).view(B, K, H // K, T, S)
    weights = scores.masked_fill(~mask.unsqueeze(-3), -torch.inf).softmax(dim=-1)
    return (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, D)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """RoPE, rotary position embedding: cosine and sine of the angle by which every pair of channels turns at
    each position: positions (..., T) -> 2 x (..., T, D), float32.

    Pair i turns by theta^(-2i/D) radians per position (Su et al. 2021): the first pairs move like a second
    hand, the last like an hour hand. The fast ones tell neighbors apart, but are where they were after a full
    turn; the slow ones tell near from far. Always float32: bfloat16 cannot tell position 2,001 from 2,000.
    """
    speeds = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float()[..., None] * speeds
    angles = torch.cat((angles, angles), dim=-1)  # for both numbers of each pair
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys (B, H, T, D): each pair (first, second) = (x[i], x[i + D/2]) is a point in a
    plane, and turns by its position's angle:

        first, second  ->  first * cos - second * sin,  first * sin + second * cos

    Attention alone does not notice the order of positions. Once rotated, the dot product of a query and a
    key depends on the angle between them, and so on how far apart they are, but not on where in the row.
    Pairs are half a head apart, as in the released weights; the paper pairs neighbors, which is the same up
    to a permutation.
    """
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class KVCache:
    """The KV cache, keys and values of the positions seen so far: a new token needs a forward pass over only
    itself. No position looks at a later one, so what was computed for it stays right."""

    def __init__(self, cfg: Config, batch: int, length: int, device: torch.device | str | None = None,
                 dtype: torch.dtype = torch.float32) -> None:
        shape = (cfg.n_layer, batch, cfg.n_kv_head, length, cfg.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.rope = rope_tables(torch.arange(length, device=device), cfg.head_dim, cfg.rope_theta)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, D) after the earlier ones; returns all, (B, K, length + T, D) each."""
        end = self.length + k.shape[2]
        assert end <= self.keys.shape[3], f"the cache has room for {self.keys.shape[3]} positions, not {end}"
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Queries, keys, values; attention; and o_proj, which mixes what the heads found.

    Grouped-query attention (Ainslie et al. 2023): H / K query heads share one key/value head.

        queries   0 1 2   3 4 5   6 7 8
        keys        0       1       2            with SmolLM-135M's 9 and 3

    While a model writes, the keys and values of everything before are kept in memory and read for every new
    token (KVCache). With a third of the heads there is a third to keep and to read.
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
        # All four compute what attend_slowly does; they differ in speed.
        if T == 1:  # nothing later to hide: a group's H / K queries use the axis of positions, without a mask
            y = F.scaled_dot_product_attention(q.reshape(B, K, H // K, D), k, v).reshape(B, H, 1, D)
        elif mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
        elif x.device.type == "cpu" and torch.is_grad_enabled() and q[..., 0].numel() * T <= SCORES_AT_ONCE:
            y = attend(q, k, v, mask)  # the fused kernel's backward pass is slow on a CPU in bfloat16
        else:  # on a GPU no fast kernel takes both a mask and grouped heads: repeat the keys and values
            k, v = (each.repeat_interleave(H // K, dim=1) for each in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))             # heads side by side again


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)), at each position alone.

    up computes d_ff features of x, and a gate lets each of them through or not: silu(z) = z * sigmoid(z) is
    near 0 for very negative z, and near z for large z. Without such a bend, layers of matrices would be no
    more than one matrix. down writes the result back to C channels. With d_ff = 8/3 C the three matrices have
    as many numbers as the two of the older design without gates, whose d_ff was 4 C.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down_proj = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP each read a normalized copy of the residual stream and add their result to it."""

    def __init__(self, cfg: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None = None,
                cache: KVCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """ids (B, T) -> the normalized residual stream after the last block (B, T, C)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = RMSNorm(cfg)

    def forward(self, ids: Tensor, doc: Tensor | None = None, cache: KVCache | None = None,
                positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """doc (B, T): the document a token belongs to. With cfg.doc_mask documents do not see each other: an
        unrelated text before it teaches a model only accidents. SmolLM was trained without this mask.

        Positions count from the start of a row, and each sees itself and all earlier ones, unless the caller
        says otherwise: positions (B, 1, T), mask (B, 1, T, S), True where a position may look.
        """
        start, T = cache.length if cache is not None else 0, ids.shape[1]
        here = torch.arange(start, start + T, device=ids.device)
        if cache is not None and positions is None:
            rope = cache.rope[0][start:start + T], cache.rope[1][start:start + T]
        else:
            positions = here if positions is None else positions
            rope = rope_tables(positions, self.cfg.head_dim, self.cfg.rope_theta)
        if mask is None and self.cfg.doc_mask and doc is not None:
            mask = (doc[:, None, :, None] == doc[:, None, None, :]).tril()  # (B, 1, T, T)
        elif mask is None and start and T > 1:                              # a chunk after a filled cache
            mask = here[:, None] >= torch.arange(start + T, device=ids.device)
        x = self.embed_tokens(ids)                                          # (B, T, C)
        for layer in self.layers:
            x = layer(x, rope, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------
# head and loss


def plain_log_probs(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """log p(target), 0 where the target is IGNORE: x (N, C), head (V, C), targets (N) -> (N), float32.

    Softmax turns logits into probabilities: p(token) = exp(its logit) / sum of exp(all logits). The loss, the
    cross-entropy, is the mean of -log p(target): how surprised the model was. A target that was certain costs
    0, a guess among all tokens ln 49,152 = 10.8 nats (the unit of the natural logarithm). Two other figures
    say the same: perplexity, exp(loss), is the number of equally likely tokens that would surprise as much;
    bits per byte, loss / ln 2 / bytes per token, divides by the bytes of the text, which every tokenizer
    shares, so that models with different tokenizers can be compared.
    """
    logits = F.linear(x, head).float()                                                  # (N, V)
    return -F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


def log_probs(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The same as plain_log_probs, without holding all logits in memory."""
    if torch.is_grad_enabled():
        return LogProbs.apply(x, head, targets)
    return log_probs_in_chunks(x, head, targets)[0]


def log_probs_in_chunks(x: Tensor, head: Tensor, targets: Tensor,
                        weight: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log p(target) (N), and with weight (N) the gradients of sum(weight * log p): d_x (N, C), d_head (V,
    C). Only positions with a target cost anything: in a chat that is about a half."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # of sums and logarithms
    log_p, d_x, d_head = x.new_zeros(len(x), dtype=dtype), None, None
    if weight is not None:
        d_x, d_head = torch.zeros_like(x), torch.zeros_like(head, dtype=dtype)
    learned = (targets != IGNORE).nonzero()[:, 0]
    for part in learned.split(max(1, LOGITS_AT_ONCE // len(head))):                     # n positions
        target = targets[part, None]                                                    # (n, 1)
        logs = F.linear(x[part], head).to(dtype).log_softmax(dim=1)                     # (n, V)
        log_p[part] = logs.gather(1, target)[:, 0]
        if weight is not None:
            w = weight[part, None]
            d_logits = logs.exp_().mul_(-w).scatter_add_(1, target, w).to(x.dtype)      # w (onehot - softmax)
            d_x[part] = d_logits @ head
            d_head += d_logits.T @ x[part]
    return log_p, d_x, d_head


class LogProbs(torch.autograd.Function):
    """log_probs with a gradient written by hand. (At a first reading plain_log_probs is enough.)

        log p(target) = logits[target] - log sum exp(logits)    its gradient: onehot(target) - softmax(logits)

    A step along it raises the target's logit and lowers every other one by its probability. PyTorch calls the
    forward and the backward of an autograd.Function instead of deriving the gradient itself; ctx carries
    tensors from one to the other.

    All logits together would be the largest tensor of a run: 3.2 GB for 8 rows of 2,048 and 49,152 tokens. So
    a few positions at a time become logits, then in place their gradient, and are discarded. The forward pass
    thus already computes the gradient, assuming that the loss is the plain sum of the log-probabilities. If
    the real loss is that sum times a number (train.py, sft.py), the backward pass scales the gradient. For
    any other loss (dpo.py), it computes the gradient again with the right weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # autocast does not reach into an autograd.Function
            dtype = torch.get_autocast_dtype(x.device.type)
            x, head = x.to(dtype), head.to(dtype)
        weight = torch.ones_like(targets, dtype=torch.promote_types(x.dtype, torch.float32))
        log_p, d_x, d_head = log_probs_in_chunks(x, head, targets, weight)
        ctx.save_for_backward(x, head, targets, d_x, d_head)
        return log_p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_log_p: Tensor) -> tuple[Tensor, Tensor, None]:
        x, head, targets, d_x, d_head = ctx.saved_tensors
        if not any(d_log_p.stride()):  # one number, stored once: a sum's. No GPU is asked what it is
            return d_x * d_log_p[0], d_head * d_log_p[0], None
        _, d_x, d_head = log_probs_in_chunks(x, head, targets, d_log_p)
        return d_x, d_head, None


# ---------------------------------------------------------------------------------------------------------
# the whole model


class SmolLM(nn.Module):
    """The language model: a decoder, and a head that scores every token of the vocabulary as the next one."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        if not cfg.tie_embeddings:
            self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        # 2 n_layer projections write to the residual stream. A sum of n independent numbers is sqrt(n) times
        # as large as one of them. So they start sqrt(2 n_layer) times smaller: before training the stream is
        # then about as large in a deep model as in a shallow one.
        for name, weight in self.named_parameters():
            if "norm" not in name:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=cfg.init_std / ((2 * cfg.n_layer) ** 0.5 if residual else 1))

    @property
    def head(self) -> Tensor:
        """The output matrix (V, C); with tie_embeddings it is the embedding itself."""
        return self.model.embed_tokens.weight if self.cfg.tie_embeddings else self.lm_head.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V); with targets -> log p(target), float32, 0 where IGNORE (B, T)."""
        x = self.model(ids, doc)                                            # (B, T, C)
        if targets is None:
            return F.linear(x, self.head)                                   # (B, T, V)
        assert ids.shape == targets.shape, f"{tuple(ids.shape)} ids, but {tuple(targets.shape)} targets"
        return log_probs(x.flatten(0, 1), self.head, targets.flatten()).view_as(targets)

    def for_decoding(self) -> "SmolLM":
        """Store float32 matrices with at least as many rows as columns by columns, and all others by rows.
        (For speed alone; skip it at a first reading.)

        The numbers stay the same, only their order in memory changes. Returns the model.
        To generate one token, a CPU reads every weight once, and reads such a matrix faster by columns, since
        a column is added to the output as a whole (python -m bench sample).
        """
        for weight in self.parameters():
            if weight.ndim == 2:
                by_columns = weight.dtype == torch.float32 and weight.shape[0] >= weight.shape[1]
                weight.data = weight.data.T.contiguous().T if by_columns else weight.data.contiguous()
        return self

    def next_logits(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Logits of the token after the last one, (B, V): only the last position needs the head."""
        return F.linear(self.model(ids, cache=cache)[:, -1], self.head)

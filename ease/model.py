"""One decoder-only transformer for llama, qwen2, qwen3 and mistral, by their Hugging Face names.

Shapes: N tokens, in B rows of at most T, S cached positions, D width, H query heads, K key/value
heads, d head_dim, F MLP width, V vocabulary.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ease.config import ORIGINAL, ModelConfig
from ease.records import UserError


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, x (N, in) -> (N, out). In fp32 on a CPU, 2 to 16 rows (decoding) are computed as
    (W x^T)^T: the same, but MKL needs half the time.
    """
    few = x.is_cpu and x.dim() == 2 and 2 <= len(x) <= 16 and x.dtype == torch.float32
    if not few or torch.is_grad_enabled() or not torch.backends.mkl.is_available():
        return F.linear(x, weight, bias)
    out = (weight @ x.t()).t().contiguous()
    return out if bias is None else out + bias


class Linear(nn.Linear):
    """nn.Linear by `linear`, and without the initial draw where there is no memory yet (`meta`: a
    checkpoint will fill it): torch's own draw imports sympy there, two seconds.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """nn.Embedding, drawn as Linear is."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean taken in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)  # (..., 1)
        return self.weight * (x32 * scale).to(x.dtype)


def rope_frequencies(rope: dict, head_dim: int, device: torch.device) -> Tensor:
    """Inverse frequencies (d/2,), fp32: theta^(-2i/d), then scaled by rope_type.

    linear: divided by factor. llama3: long waves divided by factor, short ones kept, a linear
    blend in between.
    """
    pairs = torch.arange(0, head_dim, 2, device=device)  # (d/2,)
    inv = 1.0 / rope["rope_theta"] ** (pairs.float() / head_dim)
    if rope["rope_type"] == "linear":
        return inv / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope[ORIGINAL] * inv / (2 * math.pi)  # full turns within that length
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: scale wholly, 1: keep
        return keep * inv + (1 - keep) * inv / rope["factor"]
    return inv


def rope_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple:
    """cos and sin (N, 1, d) of positions (N,). HF's half-split layout: pairs (i, i + d/2)."""
    angles = positions[:, None, None].float() * frequencies  # (N, 1, d/2)
    angles = torch.cat((angles, angles), dim=-1)  # (N, 1, d)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+d/2}) of x (N, heads, d) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class KVCache:
    """Keys and values, a layer (slots, K, length, d). A slot is reused by writing from position 0.
    """

    def __init__(self, c: ModelConfig, slots: int, length: int, dtype: torch.dtype, device):
        shape = (slots, c.num_key_value_heads, length, c.head_dim)
        self.k, self.v = ([torch.zeros(shape, dtype=dtype, device=device)
                           for _ in range(c.num_hidden_layers)] for _ in "kv")

    def write(self, layer: int, slots: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v (N, K, d) at `positions` (N,) of `slots` (N,)."""
        self.k[layer][slots, :, positions] = k
        self.v[layer][slots, :, positions] = v

    def read(self, layer: int, slots: int | slice, span: int) -> tuple[Tensor, Tensor]:
        """The first `span` keys and values of consecutive slots (rows, K, span, d), or of one
        (K, span, d): views, nothing is copied.
        """
        return self.k[layer][slots, :, :span], self.v[layer][slots, :, :span]

    def move(self, source: int, target: int) -> None:
        """Slot target becomes a copy of slot source."""
        for kept in (*self.k, *self.v):
            kept[target] = kept[source]

    def resize(self, slots: int, length: int) -> None:
        """Other sizes; what fits into them stays. A layer at a time: two are never kept whole."""
        for tensors in (self.k, self.v):
            for i, old in enumerate(tensors):
                tensors[i] = old.new_zeros(slots, old.shape[1], length, old.shape[3])
                kept = old[:slots, :, :length]
                tensors[i][: len(kept), :, : kept.shape[2]] = kept


class Rows(NamedTuple):
    """Where the N tokens of a batch stand: B rows, one behind the other, and no padding."""

    lengths: list[int]  # tokens of each row
    starts: list[int] | None  # the position of each row's first token, where rows go on
    positions: Tensor  # (N,)
    cache: KVCache | None
    first: int  # the cache's slot of row 0
    slots: Tensor  # (N,)
    mask: Tensor | None  # decoding, one token a row: (B, 1, 1, S), 0 where it may look, else -inf


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of one row, causal. q (H, n, d): the last n of its S positions;
    k, v (K, S, d) -> (n, H, d).
    """
    n, S = q.shape[1], k.shape[1]
    mask = None if n == S else torch.ones(n, S, dtype=torch.bool, device=q.device).tril(S - n)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, is_causal=n == S,
                                         enable_gqa=len(q) != len(k))
    return out[0].transpose(0, 1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. Only here do rows matter."""

    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        D, d, H, K = c.hidden_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads
        self.layer, self.head_dim = layer, d
        self.q_proj = Linear(D, H * d, bias=c.qkv_bias)
        self.k_proj = Linear(D, K * d, bias=c.qkv_bias)
        self.v_proj = Linear(D, K * d, bias=c.qkv_bias)
        self.o_proj = Linear(H * d, D, bias=c.o_bias)
        self.q_norm = RMSNorm(d, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple, rows: Rows) -> Tensor:
        """x (N, D) -> (N, D); rope: cos and sin (N, 1, d)."""
        by_head = (len(x), -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(by_head)), *rope)  # (N, H, d)
        k = rotate(self.k_norm(self.k_proj(x).view(by_head)), *rope)  # (N, K, d)
        v = self.v_proj(x).view(by_head)  # (N, K, d)
        if rows.cache:
            rows.cache.write(self.layer, rows.slots, rows.positions, k, v)
        out = self.by_row(q, k, v, rows) if rows.mask is None else self.decode(q, rows)
        return self.o_proj(out.flatten(1))

    def by_row(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Every row alone, so that none is padded. (N, H, d)."""
        q, k, v = (t.transpose(0, 1).split(rows.lengths, dim=1) for t in (q, k, v))
        if rows.starts:  # the slots hold what is before these tokens, and them
            kept = [rows.cache.read(self.layer, rows.first + b, start + n)
                    for b, (start, n) in enumerate(zip(rows.starts, rows.lengths))]
            k, v = zip(*kept)
        return torch.cat(list(map(attend, q, k, v)))

    def decode(self, q: Tensor, rows: Rows) -> Tensor:
        """One token a row, all rows at once. (B, H, d)."""
        slots = slice(rows.first, rows.first + len(q))
        k, v = rows.cache.read(self.layer, slots, rows.mask.shape[-1])  # (B, K, S, d)
        # a key head's H/K queries stand as its rows: no key is copied
        q = q.view(len(q), k.shape[1], -1, self.head_dim)  # (B, K, H/K, d)
        return F.scaled_dot_product_attention(q, k, v, rows.mask).flatten(1, 2)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        D, inner = c.hidden_size, c.intermediate_size
        self.gate_proj = Linear(D, inner, bias=c.mlp_bias)
        self.up_proj = Linear(D, inner, bias=c.mlp_bias)
        self.down_proj = Linear(inner, D, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), through F."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope: tuple, rows: Rows) -> Tensor:
        """x (N, D) -> (N, D); rope and rows as in Attention."""
        x = x + self.self_attn(self.input_layernorm(x), rope, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what checkpoints keep under the prefix `model.`."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


def check_length(c: ModelConfig, length: int) -> None:
    """Refuse a sequence that is longer than the model's context."""
    if length > c.context:
        limit = "sliding window" if c.sliding_window == c.context else "max_position_embeddings"
        raise UserError(f"a sequence of {length} tokens exceeds the model's {limit} of {c.context}")


class CausalLM(nn.Module):
    """The whole model. A loss selects its positions between `hidden` and the large `logits`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.model = config, Decoder(config)
        self.gradient_checkpointing = False  # backward: layers again
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    def hidden(self, ids: Tensor, lengths: list[int], cache: KVCache | None = None, first: int = 0,
               starts: list[int] | None = None) -> Tensor:
        """Last hidden states (N, D) of ids (N,): rows of `lengths` tokens, one behind the other.

        With a cache, the keys of row b are kept in slot first + b. starts: row b goes on at
        position starts[b] and looks at what its slot holds before.
        """
        c, B, device = self.config, len(lengths), ids.device
        ends = [start + n for start, n in zip(starts or [0] * B, lengths)]
        check_length(c, max(ends))
        # the host knows all of this: the device is asked nothing
        row = torch.arange(B).repeat_interleave(torch.tensor(lengths))  # (N,)
        from_end = torch.tensor(list(accumulate(lengths)))[row] - torch.arange(len(row))
        positions = (torch.tensor(ends)[row] - from_end).to(device)  # (N,)
        x, mask = self.model.embed_tokens(ids), None  # (N, D)
        if starts and len(row) == B:
            seen = torch.arange(max(ends), device=device) <= positions[:, None, None, None]
            mask = x.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
        rows = Rows(lengths, starts, positions, cache, first, (row + first).to(device), mask)
        # computed anew each time: a stored table would be rounded by model.to(bfloat16)
        rope = rope_tables(positions, rope_frequencies(c.rope, c.head_dim, device), x.dtype)
        for layer in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, rows, use_reentrant=False)
            else:
                x = layer(x, rope, rows)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.lm_head(hidden)

    def last_logits(self, rows: list[list[int]], count: int = 1, **cached) -> Tensor:
        """fp32 logits (B, count, V) behind the last `count` tokens of each of B rows of ids.
        cached: as in hidden.
        """
        lengths = list(map(len, rows))
        ids = torch.tensor([token for row in rows for token in row], device=self.device)  # (N,)
        last = [place for end in accumulate(lengths) for place in range(end - count, end)]
        hidden = self.hidden(ids, lengths, **cached)  # (N, D)
        logits = self.logits(hidden[torch.tensor(last, device=self.device)])  # (B count, V)
        return logits.float().view(len(rows), count, -1)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        B, T = ids.shape
        return self.logits(self.hidden(ids.flatten(), [T] * B)).view(B, T, -1)

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

from ease.config import ORIGINAL, ModelConfig
from ease.records import UserError


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


class Rows:
    """Where the N tokens of a batch stand: B rows of `lengths` tokens lie one behind the other, so
    that no padding is computed. Only attention needs them side by side, as (B, T).

    starts: the position of each row's first token (None: 0).
    """

    def __init__(self, lengths: list[int], starts: list[int] | None, device: torch.device):
        B, T = self.shape = len(lengths), max(lengths)
        self.fresh, starts = starts is None, torch.tensor(starts or [0] * B)
        counts = torch.tensor(lengths)
        row = torch.arange(B).repeat_interleave(counts)  # (N,)
        offset = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        self.span = int((starts + counts).max())  # S: how far the rows reach; all on the host
        table = torch.stack((row, starts[row] + offset, row * T + offset)).to(device)
        self.row, self.positions, self.place = table
        self.even = len(row) == B * T  # nothing to pad

    def pad(self, x: Tensor) -> Tensor:
        """(N, heads, d) -> (B, heads, T, d), zeros behind each row."""
        if not self.even:
            B, T = self.shape
            x = x.new_zeros(B * T, *x.shape[1:]).index_copy(0, self.place, x)
        return x.view(*self.shape, *x.shape[1:]).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """(B, heads, T, d) -> (N, heads, d)."""
        x = x.transpose(1, 2).flatten(0, 1)  # (B T, heads, d)
        return x if self.even else x.index_select(0, self.place)


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

    def read(self, layer: int, first: int, rows: int, span: int) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, K, span, d) of consecutive slots: views, nothing is copied."""
        slots = slice(first, first + rows)
        return self.k[layer][slots, :, :span], self.v[layer][slots, :, :span]

    def move(self, source: int, target: int) -> None:
        """Slot target becomes a copy of slot source."""
        for kept in (*self.k, *self.v):
            kept[target] = kept[source]


class Cached(NamedTuple):
    """What one layer's attention needs to keep keys and values, and to go on from kept ones."""

    cache: KVCache
    layer: int
    first: int  # slot of row 0
    slots: Tensor  # (N,)
    mask: Tensor | None  # (B, 1, T, S), true where a query may look; None: nothing is kept before


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: softmax(q k^T / sqrt(d)) v, causal."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        D, d, H, K = c.hidden_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads
        self.head_dim = d
        self.q_proj = nn.Linear(D, H * d, bias=c.qkv_bias)
        self.k_proj = nn.Linear(D, K * d, bias=c.qkv_bias)
        self.v_proj = nn.Linear(D, K * d, bias=c.qkv_bias)
        self.o_proj = nn.Linear(H * d, D, bias=c.o_bias)
        self.q_norm = RMSNorm(d, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple, rows: Rows, cached: Cached | None = None) -> Tensor:
        """x (N, D) -> (N, D); rope: cos and sin (N, 1, d)."""
        by_head = (len(x), -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(by_head))  # (N, H, d)
        k = self.k_norm(self.k_proj(x).view(by_head))  # (N, K, d)
        v = self.v_proj(x).view(by_head)  # (N, K, d)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cached:
            cached.cache.write(cached.layer, cached.slots, rows.positions, k, v)
        q, grouped = rows.pad(q), q.shape[1] != k.shape[1]  # (B, H, T, d)
        attend = F.scaled_dot_product_attention
        if cached is None or cached.mask is None:
            # padding needs no mask: no token looks to its right
            k, v = rows.pad(k), rows.pad(v)  # (B, K, T, d)
            out = attend(q, k, v, is_causal=True, enable_gqa=grouped)  # (B, H, T, d)
        else:
            k, v = cached.cache.read(cached.layer, cached.first, len(q), rows.span)  # (B, K, S, d)
            if q.shape[2] == 1:  # decoding: a key head's H/K queries as its rows: no key is copied
                q = q.reshape(len(q), k.shape[1], -1, self.head_dim)  # (B, K, H/K, d)
                out = attend(q, k, v, attn_mask=cached.mask).reshape(len(q), -1, 1, self.head_dim)
            else:
                out = attend(q, k, v, attn_mask=cached.mask, enable_gqa=grouped)
        return self.o_proj(rows.unpad(out).flatten(1))  # (N, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        D, inner = c.hidden_size, c.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=c.mlp_bias)
        self.up_proj = nn.Linear(D, inner, bias=c.mlp_bias)
        self.down_proj = nn.Linear(inner, D, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), through F."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope: tuple, rows: Rows, cached: Cached | None = None) -> Tensor:
        """x (N, D) -> (N, D); the others as in Attention."""
        x = x + self.self_attn(self.input_layernorm(x), rope, rows, cached)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what checkpoints keep under the prefix `model.`."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        c, rows = self.config, Rows(lengths, starts, ids.device)
        check_length(c, rows.span)
        x = self.model.embed_tokens(ids)  # (N, D)
        # computed anew each time: a stored table would be rounded by model.to(bfloat16)
        frequencies = rope_frequencies(c.rope, c.head_dim, ids.device)
        rope = rope_tables(rows.positions, frequencies, x.dtype)
        slots, mask = rows.row + first, None
        if not rows.fresh:  # positions (B, 1, T, 1) on the left
            last = rows.pad(rows.positions[:, None, None])
            mask = torch.arange(rows.span, device=ids.device) <= last  # (B, 1, T, S)
        for i, layer in enumerate(self.model.layers):
            cached = None if cache is None else Cached(cache, i, first, slots, mask)
            x = layer(x, rope, rows, cached)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.lm_head(hidden)

    def last_logits(self, rows: list[list[int]], count: int = 1, **cached) -> Tensor:
        """fp32 logits (B, count, V) behind the last `count` tokens of each of B rows of ids; cached:
        as in hidden.
        """
        lengths = list(map(len, rows))
        ids = torch.tensor([token for row in rows for token in row], device=self.device)  # (N,)
        last = [list(range(end - count, end)) for end in accumulate(lengths)]
        hidden = self.hidden(ids, lengths, **cached)  # (N, D)
        return self.logits(hidden[torch.tensor(last, device=self.device)]).float()

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        B, T = ids.shape
        return self.logits(self.hidden(ids.flatten(), [T] * B)).view(B, T, -1)

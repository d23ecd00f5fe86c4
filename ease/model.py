"""One decoder-only transformer for llama, qwen2, qwen3 and mistral, by their Hugging Face names.

Shapes: B rows, T positions, S cached positions, D width, H query heads, K key/value heads,
d head_dim, F MLP width, V vocabulary.
"""

import math
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
    """cos and sin (B, 1, T, d) of positions (B, T). HF's half-split layout: pairs (i, i + d/2)."""
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, d/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, d)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+d/2}) of x (B, heads, T, d) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class KVCache:
    """Keys and values, (L, slots, K, length, d). A slot is reused by writing from position 0."""

    def __init__(self, c: ModelConfig, slots: int, length: int, dtype: torch.dtype, device):
        shape = (c.num_hidden_layers, slots, c.num_key_value_heads, length, c.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer: int, first: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v (B, K, T, d) of slots first .. first + B - 1 at `positions` (B, T)."""
        slots = torch.arange(first, first + len(positions), device=positions.device)[:, None]
        self.k[layer][slots, :, positions] = k.transpose(1, 2)  # indices in front: (B, T, K, d)
        self.v[layer][slots, :, positions] = v.transpose(1, 2)

    def read(self, layer: int, first: int, rows: int, span: int) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, K, span, d) of consecutive slots: views, nothing is copied."""
        slots = slice(first, first + rows)
        return self.k[layer][slots, :, :span], self.v[layer][slots, :, :span]

    def move(self, source: int, target: int) -> None:
        """Slot target becomes a copy of slot source."""
        self.k[:, target], self.v[:, target] = self.k[:, source], self.v[:, source]


class Cached(NamedTuple):
    """What one layer's attention needs to go on from cached keys and values."""

    cache: KVCache
    layer: int
    first: int  # slot of row 0
    positions: Tensor  # (B, T), where this call's keys are written
    mask: Tensor  # (B, 1, T, S), true where a query may look


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

    def forward(self, x: Tensor, rope: tuple, cached: Cached | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); rope: cos and sin (B, 1, T, d)."""
        B, T, _ = x.shape
        by_head = (B, T, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(by_head).transpose(1, 2))  # (B, H, T, d)
        k = self.k_norm(self.k_proj(x).view(by_head).transpose(1, 2))  # (B, K, T, d)
        v = self.v_proj(x).view(by_head).transpose(1, 2)  # (B, K, T, d)
        q, k = rotate(q, *rope), rotate(k, *rope)
        attend, grouped = F.scaled_dot_product_attention, q.shape[1] != k.shape[1]
        if cached is None:  # right padding needs no mask: no real position looks to its right
            out = attend(q, k, v, is_causal=True, enable_gqa=grouped)  # (B, H, T, d)
        else:
            cache, layer, first, positions, mask = cached
            cache.write(layer, first, positions, k, v)
            k, v = cache.read(layer, first, B, mask.shape[-1])  # (B, K, S, d)
            if T == 1:  # decoding: a key head's H/K queries as its rows, so no key is repeated
                q = q.reshape(B, k.shape[1], -1, self.head_dim)  # (B, K, H/K, d)
                out = attend(q, k, v, attn_mask=mask).reshape(B, -1, 1, self.head_dim)
            else:
                out = attend(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


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

    def forward(self, x: Tensor, rope: tuple, cached: Cached | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); rope and cached as in Attention."""
        x = x + self.self_attn(self.input_layernorm(x), rope, cached)
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

    def hidden(self, ids: Tensor, cache: KVCache | None = None, first: int = 0,
               positions: Tensor | None = None, span: int = 0) -> Tensor:
        """Last hidden states (B, T, D) of ids (B, T), right-padded.

        With a cache, row b writes its keys at positions[b] (B, T) of slot first + b and looks at
        the cached positions 0 .. positions[b] of that slot; `span` = S bounds those looked at.
        """
        c = self.config
        check_length(c, max(span, ids.shape[1]))
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        x = self.model.embed_tokens(ids)  # (B, T, D)
        # computed anew each time: a stored table would be rounded by model.to(bfloat16)
        frequencies = rope_frequencies(c.rope, c.head_dim, ids.device)
        rope = rope_tables(positions, frequencies, x.dtype)
        if cache is not None:
            mask = torch.arange(span, device=ids.device) <= positions[:, None, :, None]
        for i, layer in enumerate(self.model.layers):
            cached = None if cache is None else Cached(cache, i, first, positions, mask)
            x = layer(x, rope, cached)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.lm_head(hidden)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        return self.logits(self.hidden(ids))

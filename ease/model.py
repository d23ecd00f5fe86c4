"""One decoder-only transformer for llama, qwen2, qwen3 and mistral checkpoints, under their Hugging Face key names.

Shapes: B rows, T positions, S cached positions, D width, H query heads, K key/value heads, d head_dim, F MLP width, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ease.records import UserError

MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says, checked. Traits come from this file, never from a model's name."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict  # {"rope_type", "rope_theta", and what that type needs}
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # qwen3: RMSNorm on every query and key head
    sliding_window: int  # mistral: 0, or a window that no sequence may exceed (windowed attention is not implemented)
    raw: dict = field(repr=False, compare=False)  # the file as it was, for save_model

    @classmethod
    def from_json(cls, c: dict, where: str = "config.json") -> "ModelConfig":
        """Read a parsed config.json. What is not implemented is refused by name."""
        kind = c.get("model_type")
        if kind not in MODEL_TYPES:
            raise UserError(f"{where}: model_type {kind!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
        if c.get("hidden_act", "silu") != "silu":
            raise UserError(f"{where}: hidden_act {c['hidden_act']!r} is not supported; supported: silu")
        if c.get("use_sliding_window"):
            raise UserError(f"{where}: use_sliding_window is not supported")
        try:
            heads = c["num_attention_heads"]
            bias = kind == "qwen2" or kind in ("llama", "qwen3") and bool(c.get("attention_bias", False))
            head_dim = c.get("head_dim") or (128 if kind == "qwen3" else c["hidden_size"] // heads)  # transformers' defaults
            return cls(
                model_type=kind, vocab_size=c["vocab_size"], hidden_size=c["hidden_size"],
                intermediate_size=c["intermediate_size"], num_hidden_layers=c["num_hidden_layers"], num_attention_heads=heads,
                num_key_value_heads=c.get("num_key_value_heads") or heads,
                head_dim=head_dim, rms_norm_eps=c.get("rms_norm_eps", 1e-6), rope=rope_settings(c, where),
                tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
                qkv_bias=bias, o_bias=bias and kind != "qwen2", mlp_bias=bool(c.get("mlp_bias", False)) and kind == "llama",
                qk_norm=kind == "qwen3", sliding_window=(c.get("sliding_window") or 0) if kind == "mistral" else 0, raw=c)
        except KeyError as e:
            raise UserError(f"{where}: field {e} is missing") from None


def rope_settings(c: dict, where: str) -> dict:
    """The rotary settings in either form: `rope_parameters` (transformers 5) first, else rope_theta + rope_scaling."""
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", c.get("rope_theta") or 10000.0)  # 10000 is both families' documented default
    if rope["rope_type"] not in ROPE_TYPES:
        raise UserError(f"{where}: rope_type {rope['rope_type']!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", c.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported")
    needs = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    for name in needs.get(rope["rope_type"], ()):
        if name not in rope:
            raise UserError(f"{where}: rope_type {rope['rope_type']!r} needs field {name!r}")
    return rope


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean taken in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rope_frequencies(rope: dict, head_dim: int, device: torch.device) -> Tensor:
    """Inverse frequencies (d/2,), fp32: theta^(-2i/d), then scaled by rope_type.

    linear: divided by factor. llama3: long waves divided by factor, short ones kept, a linear blend in between.
    """
    inv = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)  # (d/2,)
    if rope["rope_type"] == "linear":
        return inv / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * inv / (2 * math.pi)  # full turns within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: scale wholly, 1: keep
        return keep * inv + (1 - keep) * inv / rope["factor"]
    return inv


def rope_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, 1, T, d), for positions (B, T). The half-split layout of HF checkpoints: pairs are (i, i + d/2)."""
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, d/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, d)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+d/2}) of x (B, heads, T, d) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class KVCache:
    """Static keys and values of `slots` rows of up to `length` positions. A slot is reused by writing over it from position 0."""

    def __init__(self, config: ModelConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, length, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # (L, slots, K, length, d)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer: int, first: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v (B, K, T, d) of slots first .. first + B - 1 at `positions` (B, T)."""
        slots = torch.arange(first, first + len(positions), device=positions.device)[:, None]  # (B, 1)
        self.k[layer][slots, :, positions] = k.transpose(1, 2)  # advanced indices in front: (B, T, K, d)
        self.v[layer][slots, :, positions] = v.transpose(1, 2)

    def read(self, layer: int, first: int, rows: int, span: int) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, K, span, d) of consecutive slots: views, nothing is copied."""
        return self.k[layer][first : first + rows, :, :span], self.v[layer][first : first + rows, :, :span]

    def move(self, source: int, target: int) -> None:
        """Slot target becomes a copy of slot source."""
        self.k[:, target], self.v[:, target] = self.k[:, source], self.v[:, source]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: softmax(q k^T / sqrt(d)) v, causal."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cached=None) -> Tensor:
        """x (B, T, D) -> (B, T, D). cached: None, or (cache, layer, first slot, positions (B, T), mask (B, 1, T, S))."""
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)  # (B, H, T, d), (B, K, T, d)
        mask = None
        if cached is not None:
            cache, layer, first, positions, mask = cached
            cache.write(layer, first, positions, k, v)
            k, v = cache.read(layer, first, B, mask.shape[-1])  # (B, K, S, d)
        if mask is not None and T == 1:  # decoding: the H / K queries of a key head become its rows, so that no key is repeated
            out = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, self.head_dim), k, v, attn_mask=mask).reshape(B, -1, 1, self.head_dim)
        else:  # right padding needs no mask: a real position never looks to its right
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), through F."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.hidden_size, c.rms_norm_eps), Attention(c)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.hidden_size, c.rms_norm_eps), MLP(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cached=None) -> Tensor:
        """x (B, T, D) -> (B, T, D); rope and cached as in Attention."""
        x = x + self.self_attn(self.input_layernorm(x), rope, cached)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what HF checkpoints keep under the prefix `model.`."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class CausalLM(nn.Module):
    """The whole model. `hidden` and `logits` are apart so that a loss can select its positions before the (large) head."""

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

        With a cache, row b writes its keys at positions[b] (B, T) of slot first + b and looks at the cached positions 0 ..
        positions[b] of that slot; `span` = S bounds the positions looked at.
        """
        if self.config.sliding_window and max(span, ids.shape[1]) > self.config.sliding_window:
            raise UserError(f"a sequence of {max(span, ids.shape[1])} tokens exceeds the model's sliding window of "
                            f"{self.config.sliding_window}, which is not implemented")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        x = self.model.embed_tokens(ids)  # (B, T, D)
        # computed anew each time: a stored table would be rounded by model.to(bfloat16)
        rope = rope_tables(positions, rope_frequencies(self.config.rope, self.config.head_dim, ids.device), x.dtype)
        cached = mask = None
        if cache is not None:
            mask = torch.arange(span, device=ids.device) <= positions[:, None, :, None]  # (B, 1, T, S)
        for i, layer in enumerate(self.model.layers):
            if cache is not None:
                cached = (cache, i, first, positions, mask)
            x = layer(x, rope, cached)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.lm_head(hidden)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        return self.logits(self.hidden(ids))

"""config.json of a llama, qwen2, qwen3 or mistral model -> a checked ModelConfig."""

from dataclasses import dataclass, field

from ease.records import UserError

# Every key of config.json that is read, and transformers' default where it is left out.
SHARED = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": None,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
QWEN = SHARED | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "layer_types": None, "max_window_layers": 28}
DEFAULTS = {
    "llama": SHARED | {
        "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None,
        "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "qwen2": QWEN,
    "qwen3": QWEN | {"head_dim": 128, "attention_bias": False},
    "mistral": SHARED | {
        "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "sliding_window": 4096, "layer_types": None}}
KEPT = ("model_type", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
LAYER_TYPES = ("full_attention", "sliding_attention")
ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES = {  # and the fields each needs beside rope_theta
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)}


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says, checked. Traits come from it, never from a model's name."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    sliding_window: int | None  # of some layer; windowed attention itself is not implemented
    rope: dict  # {"rope_type", "rope_theta", and what that type needs}
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # qwen3: RMSNorm on every query and key head
    raw: dict = field(repr=False, compare=False)  # the file's fields that are known, for save_model

    @property
    def context(self) -> int:
        """The longest sequence the model may see: within its window, a window changes nothing."""
        longest = self.max_position_embeddings
        return min(longest, self.sliding_window or longest)

    @classmethod
    def from_json(cls, stored: dict, where: str = "config.json") -> "ModelConfig":
        """Read a parsed config.json. What is not implemented is refused by name."""
        kind = stored.get("model_type")
        if kind not in tuple(DEFAULTS):
            refuse(where, "model_type", kind, DEFAULTS)
        c = {name: stored.get(name, default) for name, default in DEFAULTS[kind].items()}
        if c.get("use_sliding_window") is False:
            c["sliding_window"] = None
        for name, default in DEFAULTS[kind].items():
            check_value(where, name, c[name], default)
        heads, bias = c["num_attention_heads"], kind == "qwen2" or c.get("attention_bias", False)
        c["num_key_value_heads"] = c["num_key_value_heads"] or heads
        c["head_dim"] = c["head_dim"] or c["hidden_size"] // heads
        c["sliding_window"] = window_of(c, where)
        if heads % c["num_key_value_heads"]:
            refuse(where, f"{heads} heads and num_key_value_heads", c["num_key_value_heads"])
        if c["head_dim"] % 2 or not c["head_dim"]:
            refuse(where, "head_dim", c["head_dim"])
        return cls(
            model_type=kind, rope=rope_settings(stored, c["max_position_embeddings"], where),
            qkv_bias=bias, o_bias=bias and kind != "qwen2", qk_norm=kind == "qwen3",
            raw={n: v for n, v in stored.items() if n in DEFAULTS[kind] or n in KEPT},
            **{"mlp_bias": False} | {n: v for n, v in c.items() if n in cls.__annotations__})


def positive(value) -> bool:
    """Whether a value from a file is a number above 0 (no flag, no nan, no infinity)."""
    return type(value) in (int, float) and 0 < value < 1e15


def refuse(where: str, name: str, value, supported=()) -> None:
    """Raise an error that names file, field and value."""
    hint = f"; supported: {', '.join(supported)}" if supported else ""
    raise UserError(f"{where}: {name} {value!r:.60} is not supported{hint}")


def check_value(where: str, name: str, value, default) -> None:
    """Refuse a value that is not of its default's type; null only where transformers takes it."""
    supported = {"hidden_act": ("silu", "swish"), "layer_types": LAYER_TYPES}.get(name, ())
    if value is None and (default is None or name in ("num_key_value_heads", "sliding_window")):
        return
    if name == "layer_types":
        good = isinstance(value, list) and all(v in supported for v in value)
    elif isinstance(default, str):
        good = value in supported
    elif isinstance(default, bool):
        good = isinstance(value, bool)
    else:
        good = positive(value) and (isinstance(default, float) or isinstance(value, int))
    if not good and (name, value) != ("max_window_layers", 0):
        refuse(where, name, value, supported)


def window_of(c: dict, where: str) -> int | None:
    """The sliding window if a layer has one: by layer_types, or from max_window_layers on."""
    window, types = c.get("sliding_window"), c.get("layer_types")
    if types is None:
        return window if c.get("max_window_layers", 0) < c["num_hidden_layers"] else None
    if "sliding_attention" not in types:
        return None
    if window is None:
        refuse(where, "layer_types with sliding_attention and sliding_window", window)
    return window


def rope_settings(c: dict, longest: int, where: str) -> dict:
    """The rotary settings; rope_scaling goes before rope_parameters, as in transformers. longest:
    max_position_embeddings.
    """
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        refuse(where, "rope_parameters", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in tuple(ROPE_TYPES):
        refuse(where, "rope_type", kind, ROPE_TYPES)
    partial = rope.get("partial_rotary_factor", c.get("partial_rotary_factor"))
    if partial not in (None, 1):
        refuse(where, "partial_rotary_factor", partial)
    rope = {"rope_theta": c.get("rope_theta", 10000.0), ORIGINAL: longest} | rope
    rope[ORIGINAL] = c.get(ORIGINAL) or rope[ORIGINAL]
    needed = ("rope_theta", *ROPE_TYPES[kind])
    for name in needed:
        if not positive(rope.get(name)):
            refuse(where, f"rope_type {kind!r} with {name}", rope.get(name))
    return {"rope_type": kind} | {name: rope[name] for name in needed}

import pytest
import torch

from ease.model import KVCache, ModelConfig, rope_frequencies
from ease.records import UserError
from tests.tiny import SIZES, VOCAB, tiny_model

IDS = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))


def config(**changes) -> ModelConfig:
    return ModelConfig.from_json({**SIZES, "model_type": "llama", **changes})


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gemma"}, "model_type 'gemma' is not supported; supported: llama"),
    ({"model_type": ["llama"]}, "model_type"), ({"model_type": None}, "model_type None"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"), ({"hidden_act": []}, "hidden_act"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}},
     "rope_type 'yarn' is not supported; supported: default, linear, llama3"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope_type 'dynamic'"),
    ({"rope_scaling": {"type": "linear"}}, "needs field 'factor'"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "needs field 'factor'"),
    ({"rope_scaling": {"rope_type": None, "factor": 2}}, "rope_type None"),
    ({"rope_scaling": [2]}, "rope_parameters"), ({"rope_parameters": "linear"}, "rope_parameters"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
    ({"rope_theta": None}, "rope_theta"), ({"rope_theta": -1.0}, "rope_theta"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"num_attention_heads": 5}, "num_key_value_heads 3"), ({"head_dim": 7}, "head_dim 7"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"), ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings"), ({"mlp_bias": 1}, "mlp_bias 1"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window 0"),
    ({"model_type": "qwen2", "use_sliding_window": "no"}, "use_sliding_window 'no'"),
    ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2}, "layer_types"),
    ({"model_type": "qwen3", "layer_types": 2}, "layer_types"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "sliding_window None")])
def test_what_is_not_implemented_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message) as e:
        config(**changes)
    assert "\n" not in str(e.value) and len(str(e.value)) < 200


SIZE_NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")


@pytest.mark.parametrize("name", SIZE_NAMES)
@pytest.mark.parametrize("value", [0, -3, True, "30", 30.0, [30], 10**400, float("inf")])
def test_a_size_is_a_positive_whole_number(name, value):
    with pytest.raises(UserError, match=f"config.json: {name} "):
        config(**{name: value})


@pytest.mark.parametrize("kind, changes, context", [
    ("llama", {}, 256), ("llama", {"sliding_window": 16, "use_sliding_window": True}, 256),
    ("mistral", {"sliding_window": 16}, 16), ("mistral", {"sliding_window": 999}, 256),
    ("mistral", {"sliding_window": None}, 256),
    ("mistral", {"sliding_window": 16, "layer_types": ["full_attention"] * 2}, 256),
    ("mistral", {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]}, 16),
    ("qwen2", {"sliding_window": 16}, 256),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, 256),  # from layer 28 on
    ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, 16),
    ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, 16),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 256),
    ("qwen2", {"max_position_embeddings": 12}, 12)])
def test_context(kind, changes, context):
    """The shorter of max_position_embeddings and of the window, where a layer has one."""
    c = config(model_type=kind, **changes)
    assert c.context == context
    model, limit = tiny_model(kind, **changes), min(context, 16)
    model(IDS[:, :limit])
    if context < 17:
        with pytest.raises(UserError, match=f"17 tokens exceeds the model's .* of {context}"):
            model(IDS)
        cache = KVCache(c, 1, 20, torch.float32, torch.device("cpu"))
        with pytest.raises(UserError, match=f"17 tokens exceeds the model's .* of {context}"):
            model.hidden(IDS[:1, :1], cache, 0, torch.tensor([[16]]), span=17)


def test_which_limit_is_named():
    for changes, limit in (({"sliding_window": 5}, "sliding window of 5"),
                           ({"max_position_embeddings": 5}, "max_position_embeddings of 5")):
        with pytest.raises(UserError, match=limit):
            tiny_model("mistral", **changes)(IDS)


def test_both_rope_forms_and_derived_sizes():
    both = {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}
    assert config(rope_parameters=both, rope_theta=5.0).rope == both  # the inner theta goes first
    assert config(rope_theta=7.0, rope_scaling={"type": "linear", "factor": 2.0}).rope == both
    older = config(rope_parameters=both, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert older.rope == {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    assert config(head_dim=None, hidden_size=24).head_dim == 4
    assert config(num_key_value_heads=None).num_key_value_heads == 6
    assert config(model_type="qwen2").qkv_bias and not config(model_type="qwen2").o_bias
    biased = config(attention_bias=True)
    assert biased.qkv_bias and biased.o_bias and not config().qkv_bias
    assert config(hidden_act="swish") == config()


def test_llama3_frequencies_keep_short_waves_and_stretch_long_ones():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = rope_frequencies({"rope_type": "default", "rope_theta": 500000.0}, 64, "cpu")
    ratio = rope_frequencies(rope, 64, "cpu") / plain
    assert torch.allclose(ratio[:10], torch.ones(10)) and torch.allclose(
        ratio[-5:], torch.full((5,), 1 / 8)
    )
    assert ((ratio[1:] - ratio[:-1]) <= 1e-6).all() and (
        (ratio > 0.2) & (ratio < 0.9)
    ).any()  # a blend in between


def test_causal_and_blind_to_right_padding():
    model = tiny_model()
    full = model(IDS)
    changed = IDS.clone()
    changed[:, 9:] = 0
    assert torch.allclose(model(changed)[:, :9], full[:, :9], atol=1e-5)
    assert not torch.allclose(model(changed)[:, 9:], full[:, 9:], atol=1e-2)


def test_rows_and_positions_matter():
    out = tiny_model()(torch.tensor([[5, 6, 5, 6], [6, 5, 6, 5]]))
    assert not torch.allclose(out[0, 0], out[0, 2], atol=1e-3) and not torch.allclose(
        out[0, -1], out[1, -1], atol=1e-3
    )


def test_cache_equals_full_forward():
    """Prefill of unequal rows into slots 1 to 3, then one token at a time, against the whole
    sequence at once; then slot 3 moves to 0.
    """
    model, full = tiny_model(), tiny_model()(IDS)
    cache = KVCache(model.config, 5, 20, torch.float32, torch.device("cpu"))
    cache.k.fill_(9.0), cache.v.fill_(9.0)  # what an earlier row left behind
    lengths = torch.tensor([7, 3, 5])
    first = model.logits(model.hidden(IDS[:, :7], cache, 1, torch.arange(7).expand(3, 7), span=7))
    for b, n in enumerate(lengths):
        assert torch.allclose(first[b, :n], full[b, :n], atol=1e-4)
    for step in range(6):
        at = lengths + step
        out = model.logits(
            model.hidden(
                IDS[torch.arange(3), at][:, None], cache, 1, at[:, None], span=int(at.max()) + 1
            )
        )
        assert torch.allclose(out[:, 0], full[torch.arange(3), at], atol=1e-4)
    cache.move(3, 0)
    at = lengths[2:] + 6
    out = model.logits(model.hidden(IDS[2:, at], cache, 0, at[:, None], span=int(at) + 1))
    assert torch.allclose(out[0, 0], full[2, at[0]], atol=1e-4)


def test_cache_positions_beyond_the_row_are_not_seen():
    model = tiny_model()
    cache = KVCache(model.config, 1, 20, torch.float32, torch.device("cpu"))
    model.hidden(IDS[:1, :12], cache, 0, torch.arange(12)[None], span=12)
    out = model.hidden(
        IDS[:1, 4:5], cache, 0, torch.tensor([[4]]), span=12
    )  # rewinds to position 4
    assert torch.allclose(out[0, 0], model.hidden(IDS[:1, :5])[0, 4], atol=1e-4)

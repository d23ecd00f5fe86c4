import pytest

from ease.config import ModelConfig
from ease.records import UserError
from tests.tiny import SIZES


def config(**changes) -> ModelConfig:
    return ModelConfig.from_json({**SIZES, "model_type": "llama", **changes})


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gemma"}, "model_type 'gemma' is not supported; supported: llama"),
    ({"model_type": ["llama"]}, "model_type"), ({"model_type": None}, "model_type None"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"), ({"hidden_act": []}, "hidden_act"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}},
     "rope_type 'yarn' is not supported; supported: default, linear, llama3"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope_type 'dynamic'"),
    ({"rope_scaling": {"type": "linear"}}, "factor None is not"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor '2' is not"),
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

import pytest
import torch

from ease.model import KVCache, rope_frequencies
from ease.records import UserError
from tests.tiny import VOCAB, tiny_model

IDS = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))


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
    model, limit = tiny_model(kind, **changes), min(context, 16)
    assert model.config.context == context
    model(IDS[:, :limit])
    if context < 17:
        with pytest.raises(UserError, match=f"17 tokens exceeds the model's .* of {context}"):
            model(IDS)
        cache = KVCache(model.config, 1, 20, torch.float32, torch.device("cpu"))
        with pytest.raises(UserError, match=f"17 tokens exceeds the model's .* of {context}"):
            model.hidden(IDS[:1, :1], cache, 0, torch.tensor([[16]]), span=17)


def test_which_limit_is_named():
    for changes, limit in (({"sliding_window": 5}, "sliding window of 5"),
                           ({"max_position_embeddings": 5}, "max_position_embeddings of 5")):
        with pytest.raises(UserError, match=limit):
            tiny_model("mistral", **changes)(IDS)


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

import pytest
import torch

from ease import model as module
from ease.model import KVCache, rope_frequencies, linear
from ease.records import UserError
from tests.checks import verify
from tests.tiny import VOCAB, tiny_model

IDS = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["RMSNorm.forward", "rotate"])
def test_model(name):
    verify(module, name)


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
            model.hidden(IDS[0, :1], [1], cache, starts=[16])


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
    for kept in (*cache.k, *cache.v):
        kept.fill_(9.0)  # what an earlier row left behind
    lengths = [7, 3, 5]
    prompts = torch.cat([row[:n] for row, n in zip(IDS, lengths)])
    first = model.logits(model.hidden(prompts, lengths, cache, 1))
    for found, wanted, n in zip(first.split(lengths), full, lengths):
        assert torch.allclose(found, wanted[:n], atol=1e-4)
    for n in (1, 2, 3):  # one token a row, then two, then three at once
        ids = torch.cat([row[at : at + n] for row, at in zip(IDS, lengths)])
        out = model.logits(model.hidden(ids, [n] * 3, cache, 1, lengths)).split(n)
        for found, wanted, at in zip(out, full, lengths):
            assert torch.allclose(found, wanted[at : at + n], atol=1e-4)
        lengths = [at + n for at in lengths]
    cache.move(3, 0)
    [at] = lengths[2:]
    out = model.logits(model.hidden(IDS[2, at : at + 1], [1], cache, 0, [at]))
    assert torch.allclose(out[0], full[2, at], atol=1e-4)


def test_rows_that_go_on_at_unequal_lengths():
    """Behind a shared beginning in the cache, as the categories' questions."""
    model, full = tiny_model(), tiny_model()(IDS)
    cache = KVCache(model.config, 3, 20, torch.float32, torch.device("cpu"))
    starts, lengths = [4, 0, 9], [5, 12, 1]
    for slot, start in enumerate(starts):
        if start:
            model.hidden(IDS[slot, :start], [start], cache, slot)
    ids = torch.cat([row[s : s + n] for row, s, n in zip(IDS, starts, lengths)])
    out = model.logits(model.hidden(ids, lengths, cache, 0, starts)).split(lengths)
    for found, wanted, s, n in zip(out, full, starts, lengths):
        assert torch.allclose(found, wanted[s : s + n], atol=1e-4)


def test_cache_positions_beyond_the_row_are_not_seen():
    model = tiny_model()
    cache = KVCache(model.config, 1, 20, torch.float32, torch.device("cpu"))
    model.hidden(IDS[0, :12], [12], cache)
    other = IDS[1, :12]
    model.hidden(other, [12], cache, 0)
    wanted = model.hidden(other[:5], [5])[4]
    assert torch.allclose(model.hidden(other[4:5], [1], cache, 0, [4])[0], wanted, atol=1e-4)
    # beside a longer row, which widens what is looked at
    cache = KVCache(model.config, 2, 20, torch.float32, torch.device("cpu"))
    for slot in (0, 1):
        model.hidden(other, [12], cache, slot)
    out = model.hidden(other[[4, 11]], [1, 1], cache, 0, [4, 11])
    assert torch.allclose(out[0], wanted, atol=1e-4)


def test_only_attention_sees_rows():
    """Any rows in any order: each is what it is alone, its gradients too."""
    model = tiny_model().requires_grad_(True)
    rows = [IDS[0, :7], IDS[1, :1], IDS[2, :12], IDS[1, :4]]
    lengths = [len(r) for r in rows]
    together = model.hidden(torch.cat(rows), lengths)
    weights = torch.rand(together.shape, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad((together * weights).sum(), parameters, allow_unused=True)
    alone = [model.hidden(r, [len(r)]) for r in rows]
    for one, of_all in zip(alone, together.split(lengths), strict=True):
        assert torch.allclose(one, of_all, atol=1e-5)
    loss = sum((h * w).sum() for h, w in zip(alone, weights.split(lengths)))
    wanted = torch.autograd.grad(loss, parameters, allow_unused=True)
    for name, a, b in zip(names, found, wanted):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-4, rtol=1e-5), name


def test_gradient_checkpointing_changes_nothing():
    """The same loss and gradients; a layer keeps its input alone."""
    kept, found = [], []
    for checkpointing in (False, True):
        model = tiny_model().requires_grad_(True)
        model.gradient_checkpointing, sizes = checkpointing, []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            loss = model(IDS).logsumexp(-1).sum()
        loss.backward()
        kept.append(sum(sizes))
        found.append([loss, *(p.grad for p in model.parameters())])
    assert kept[1] < kept[0] / 2
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17])
@pytest.mark.parametrize("biased", [True, False])
def test_linear(dtype, atol, rows, biased):
    """The same product whichever way it is computed."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g).to(dtype) for s in ((rows, 30), (48, 30), (48,)))
    b = b if biased else None
    wanted = torch.nn.functional.linear(x.double(), w.double(), b.double() if biased else None)
    with torch.inference_mode():
        assert torch.allclose(linear(x, w, b).double(), wanted, atol=atol, rtol=0.01)
    assert torch.allclose(linear(x, w, b).double(), wanted, atol=atol, rtol=0.01)

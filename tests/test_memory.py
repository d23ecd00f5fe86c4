import pytest
import torch

from ease.lora import add_lora
from ease.memory import announce, layer_bytes, peak_bytes
from ease.run import LORA_TARGETS
from tests.tiny import tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}


def with_lora(dtype: torch.dtype = torch.float32):
    model = tiny_model("qwen2", **SIZES).to(dtype)
    add_lora(model, 2, 4.0, list(LORA_TARGETS))
    return model


def kept_bytes(model, tokens: int) -> int:
    """What the forward pass keeps for the backward pass, each storage once, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), t)  # held, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model.hidden(torch.arange(tokens) % 20, [tokens // 2, tokens - tokens // 2])
    assert hidden.requires_grad
    return sum(n for place, (n, _) in kept.items() if place not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_a_token(dtype):
    """The formula against what autograd keeps (LoRA's own r numbers are not counted in it)."""
    model = with_lora(dtype)
    found = (kept_bytes(model, 96) - kept_bytes(model, 48)) / 48 / 4
    assert found == pytest.approx(layer_bytes(model), rel=0.2)
    model.gradient_checkpointing = True
    found = (kept_bytes(model, 96) - kept_bytes(model, 48)) / 48 / 4
    assert dtype.itemsize * 64 <= found < layer_bytes(model) / 4  # an input and the last norm


def test_peak():
    model = with_lora()
    numbers = [p.numel() for p in model.parameters()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    vocab, weights = model.config.vocab_size, 4 * sum(numbers) + 12 * trained
    assert peak_bytes(model, 100) == weights + 100 * (4 * layer_bytes(model) + 16 * vocab)
    assert peak_bytes(model, 3000) == weights + 3000 * 4 * layer_bytes(model) + 1024 * 16 * vocab
    teacher = tiny_model()
    assert peak_bytes(model, 100, teacher) - peak_bytes(model, 100) == (
        4 * sum(p.numel() for p in teacher.parameters()) + 800 * teacher.config.vocab_size)
    model.gradient_checkpointing = True
    assert peak_bytes(model, 100) == weights + 100 * (
        4 * 4 * 64 + layer_bytes(model) + 16 * vocab)


def test_what_is_said(capsys):
    announce(with_lora(), [10, 20, 30], [[[0, 1]], [[2]], [[1], [0, 2]]])
    said = capsys.readouterr().out
    assert said.startswith("3 rows, 60 tokens, 3 steps of micro-batches up to 40 tokens; ")
    assert said.endswith("GiB\n")

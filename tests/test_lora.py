import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ease.lora import LoRALinear, add_lora, load_adapter, lora_state, merge_lora, save_adapter
from ease.records import UserError
from tests.checks import check_merge_delta
from tests.mutants import merge_delta__scale_without_rank, merge_delta__square_root_of_rank
from tests.tiny import VOCAB, tiny_model

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(10)[None] % VOCAB


def trained(seed=0, targets=TARGETS, **changes):
    """A tiny model with an adapter whose B is not zero."""
    model = tiny_model(**changes)
    add_lora(model, 3, 6.0, targets, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in lora_state(model).items():
        p.data.normal_(0, 0.3, generator=generator)
    return model


def as_layer(W, A, B, rank, alpha, x):
    linear = nn.Linear(7, 5, bias=False)
    linear.weight.data.copy_(W)
    layer = LoRALinear(linear, rank, alpha / rank)
    layer.lora_A.weight.data.copy_(A), layer.lora_B.weight.data.copy_(B)
    assert torch.allclose(layer(x), (layer.weight + layer.delta()) @ x, atol=1e-5)
    return layer(x)


def test_formula():
    check_merge_delta(as_layer)
    for mutant in (merge_delta__scale_without_rank, merge_delta__square_root_of_rank):
        with pytest.raises(AssertionError):
            check_merge_delta(mutant)


def test_starts_at_the_base_and_trains_only_a_and_b():
    plain, model = tiny_model(), tiny_model()
    add_lora(model, 3, 6.0, TARGETS)
    assert torch.equal(plain(IDS), model(IDS))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == set(lora_state(model)) and len(names) == 2 * 2 * len(TARGETS)
    model(IDS).sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in names)
    a, b = (model.model.layers[0].self_attn.q_proj.lora_A.weight for model in (model, trained(1)))
    assert a.abs().max() <= 30**-0.5 and not torch.equal(a, b)  # Kaiming bound 1 / sqrt(D)


def test_merge_changes_nothing_but_the_form():
    model = trained()
    before = model(IDS)
    assert merge_lora(model) is model and not lora_state(model)
    assert torch.allclose(model(IDS), before, atol=1e-4) and not torch.allclose(tiny_model()(IDS), before, atol=1e-2)
    assert set(model.state_dict()) == set(tiny_model().state_dict())


def test_save_and_load(tmp_path):
    model = trained()
    save_adapter(model, tmp_path, "base")
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in keys and len(keys) == 12
    other = tiny_model()
    load_adapter(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS))


def test_targets_as_peft_reads_them():
    model = tiny_model()
    add_lora(model, 2, 2.0, r".*layers\.0\..*(q|k)_proj")
    assert {n.rsplit(".lora", 1)[0] for n in lora_state(model)} == {f"model.layers.0.self_attn.{x}_proj" for x in "qk"}
    with pytest.raises(UserError, match="qq_proj"):
        add_lora(tiny_model(), 2, 2.0, ["q_proj", "qq_proj"])
    with pytest.raises(UserError, match="untied"):
        add_lora(tiny_model(tie_word_embeddings=True), 2, 2.0, ["lm_head"])


@pytest.mark.parametrize("field, value", [
    ("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "all"), ("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 4}),
    ("layer_replication", [[0, 2]]), ("init_lora_weights", "pissa"), ("peft_type", "IA3")])
def test_unsupported_adapters_are_refused_by_name(tmp_path, field, value):
    save_adapter(trained(), tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=field):
        load_adapter(tiny_model(), tmp_path)


def test_adapters_load_strictly(tmp_path):
    save_adapter(trained(), tmp_path, "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    cases = {"missing": {k: v for k, v in tensors.items() if k != name},
             "unexpected": {**tensors, "base_model.model.extra": torch.zeros(1)},
             "missing.*base_model": {k.removeprefix("base_model.model."): v for k, v in tensors.items()},  # would change nothing
             "shape": {**tensors, name: torch.zeros(3, 5)}}
    for message, changed in cases.items():
        save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match=message):
            load_adapter(tiny_model(), tmp_path)
    with pytest.raises(UserError, match="adapter_config.json"):
        load_adapter(tiny_model(), tmp_path / "nothing")

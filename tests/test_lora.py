import json
from dataclasses import fields

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from ease import lora
from ease.lora import add_lora, load_adapter, lora_state, merge_lora, save_adapter
from ease.records import UserError
from tests.checks import verify
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


@pytest.mark.parametrize("name", ["LoRALinear.forward"])
def test_lora(name):
    verify(lora, name)


def test_delta_is_the_update():
    layer = trained().model.layers[0].mlp.down_proj
    x = torch.linspace(-1, 1, layer.in_features)
    assert torch.allclose(layer(x), (layer.weight + layer.delta()) @ x, atol=1e-5)


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
    assert torch.allclose(model(IDS), before, atol=1e-4) and not torch.allclose(
        tiny_model()(IDS), before, atol=1e-2
    )
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
    assert {n.rsplit(".lora", 1)[0] for n in lora_state(model)} == {
        f"model.layers.0.self_attn.{x}_proj" for x in "qk"
    }
    with pytest.raises(UserError, match="qq_proj"):
        add_lora(tiny_model(), 2, 2.0, ["q_proj", "qq_proj"])
    with pytest.raises(UserError, match="untied"):
        add_lora(tiny_model(tie_word_embeddings=True), 2, 2.0, ["lm_head"])


def saved(folder, **changes):
    """A stored adapter with these settings changed; None: left out."""
    save_adapter(trained(), folder, "base")
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# What each setting of PEFT may be without another result; and a value of it that is not neutral.
HARMLESS = {
    "task_type": None, "auto_mapping": {"a": 1}, "peft_version": "0.1", "revision": "main",
    "base_model_name_or_path": "x", "inference_mode": False, "lora_dropout": 0.5,
    "megatron_core": None, "qalora_group_size": 3, "init_lora_weights": "gaussian"}
READ = ("r", "lora_alpha", "target_modules", "use_rslora")  # tested where they are honoured
NOT_NEUTRAL = {
    "peft_type": "IA3", "bias": "all", "init_lora_weights": "pissa", "layers_to_transform": 0,
    "layers_pattern": "layers", "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4},
    "exclude_modules": "q_proj", "modules_to_save": ["lm_head"], "layer_replication": [[0, 2]]}


def test_settings_by_an_allow_list(tmp_path, capsys):
    """Every field of peft.LoraConfig: honoured, without effect, or refused by name unless off."""
    names = {f.name for f in fields(peft.LoraConfig)}
    assert {*HARMLESS, *READ, *NOT_NEUTRAL} <= names
    for name in [*sorted(names - {*READ} - {*HARMLESS} | {*NOT_NEUTRAL}), "a_later_setting"]:
        values = [NOT_NEUTRAL[name]] if name in NOT_NEUTRAL else [True, 1, 0, "x", ["x"], {"x": 1}]
        for value in values:
            with pytest.raises(UserError, match=f"adapter setting '{name}' = ") as e:
                load_adapter(tiny_model(), saved(tmp_path, **{name: value}))
            assert "\n" not in str(e.value)
    neutral = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS).to_dict()
    neutral |= {"target_modules": TARGETS, "a_later_setting": None, "another": False, "more": {}}
    wanted = trained()(IDS)
    for changes in [neutral, *({name: value} for name, value in HARMLESS.items())]:
        model = tiny_model()
        load_adapter(model, saved(tmp_path, **changes))
        assert torch.equal(model(IDS), wanted), changes
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name, value", [
    *(("r", v) for v in (None, 0, -1, "3", True, 3.0, [3], 10**9)),
    *(("lora_alpha", v) for v in (None, "6", [], float("inf"), float("nan"), 10**400)),
    *(("target_modules", v) for v in (None, 3, {"q_proj": 1}, ["q_proj", None], [["q_proj"]])),
    ("use_rslora", "yes"), ("use_rslora", [1])])
def test_settings_of_a_wrong_type_or_size(tmp_path, name, value):
    with pytest.raises(UserError, match=f"{name}.? = ") as e:
        load_adapter(tiny_model(), saved(tmp_path, **{name: value}))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["[]", "3", '"LORA"', "{", "", "[" * 100_000])
def test_an_adapter_config_that_is_no_object(tmp_path, text):
    (saved(tmp_path) / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="adapter_config.json"):
        load_adapter(tiny_model(), tmp_path)


@pytest.mark.parametrize("pattern, message", [
    (r"([a-z_\d]+\.?)+!", "more than"), (r"(.|.)*!", "more than"), ("[", "unterminated"),
    ("(" * 9999 + ")" * 9999, "recursion"), (r"x\d", "match no linear layer")])
def test_a_regular_expression_that_does_not_do(tmp_path, monkeypatch, pattern, message):
    """One that backtracks for ever, one that is none, one that matches nothing."""
    monkeypatch.setattr(lora, "MATCH_SECONDS", 2)
    with pytest.raises(UserError, match="LoRA targets") as e:
        load_adapter(tiny_model(), saved(tmp_path, target_modules=pattern))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_adapters_load_strictly(tmp_path):
    save_adapter(trained(), tmp_path, "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    cases = {
        "missing": {k: v for k, v in tensors.items() if k != name},
        "unexpected": {**tensors, "base_model.model.extra": torch.zeros(1)},
        "missing.*base_model": {
            k.removeprefix("base_model.model."): v for k, v in tensors.items()
        },  # would change nothing
        "shape": {**tensors, name: torch.zeros(3, 5)},
    }
    for message, changed in cases.items():
        save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match=message):
            load_adapter(tiny_model(), tmp_path)
    with pytest.raises(UserError, match="adapter_config.json"):
        load_adapter(tiny_model(), tmp_path / "nothing")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for content in (pointer, b"junk", b""):
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="a git-lfs pointer" if b"lfs" in content else "header"):
            load_adapter(tiny_model(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors.*only safetensors"):
        load_adapter(tiny_model(), tmp_path)


def test_a_rank_without_numbers(tmp_path):
    """An empty tensor may say that the rank is 10^9: matrices of that size would be made."""
    save_adapter(trained(), tmp_path, "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({n: torch.zeros(10**9, 0) for n in tensors}, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"r": 10**9}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="r = 1000000000 in adapter_config.json is not that of the"):
        load_adapter(tiny_model(), tmp_path)


def test_a_rank_is_positive():
    for rank in (0, -2):
        with pytest.raises(UserError, match=f"positive rank, not {rank}"):
            add_lora(tiny_model(), rank, 2.0, TARGETS)


def test_save_tensors():
    verify(lora, "save_tensors")

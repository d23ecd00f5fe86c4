"""What an evaluation compares."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ease import systems
from ease.loading import Place
from ease.lora import LoRALinear
from ease.policies import POLICY
from ease.records import UserError


def test_a_plus_inside_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m+1", "a"):
        Path(name).mkdir()
    found = systems.parse_systems(["x=m+1", "y=m+1+a", "z=someone/tiny+a", "w=someone/tiny",
                                    "v=responses:m+2"])
    assert [s[:2] for s in found.values()] == [
        ("m+1", ""), ("m+1", "a"), ("someone/tiny", "a"), ("someone/tiny", ""),
        ("responses:m+2", "")]


@pytest.mark.parametrize("specs", [[], ["m"], ["a="], ["a=responses:"], ["a b=m"], ["a=m", "a=n"]])
def test_no_system(specs):
    with pytest.raises(UserError, match="--systems"):
        systems.parse_systems(specs)


def test_the_policy_is_a_system_turn():
    told = systems.System("m", "", True).messages("hi")
    assert systems.System("m", "").messages("hi") == told[1:] == [
        {"role": "user", "content": "hi"}]
    assert all(text in told[0]["content"] for text in POLICY.texts.values())


def test_merged_in_float32_alone(runs, world):
    """bf16 would round the update away."""
    system = systems.System(world.base, str(runs.out / "ease/adapter"))
    ids, logits = torch.tensor([[3, 5, 7, 9]]), []
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = systems.load_system(system, Place(dtype, "cpu"))
        adapted = any(isinstance(m, LoRALinear) for m in model.modules())
        assert adapted == (dtype == torch.bfloat16)
        logits.append(model(ids).float())
    assert torch.allclose(*logits, atol=0.5) and not torch.equal(*logits)


def test_an_adapter_of_other_code_is_evaluated_with_a_warning(runs, tmp_path, capsys):
    run = tmp_path / "refusal"
    shutil.copytree(runs.out / "refusal", run)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["code"]["ease/losses.py"] = "another"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert systems.training_of(str(run / "adapter"))[0]["steps"] == 3
    assert "was trained by other code (ease/losses.py changed since)" in capsys.readouterr().out

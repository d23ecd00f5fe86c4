"""A stopped run goes on: 3 + 3 steps equal 6 steps, bit for bit on the CPU, in both training scripts and both ways to train."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file

import distill
import train
from ease import run as run_module
from tests.test_scripts import rows, runs  # noqa: F401  (the fixture)


class Stop(Exception):
    pass


def interrupted(module, cfg, monkeypatch, after):
    """Run, stop as a kill would in the middle of step `after` + 1, and run the same command again."""
    calls, real = [], module.optimizer_step

    def step(*args):
        calls.append(1)
        if len(calls) > after:
            raise Stop
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "optimizer_step", step)
        with pytest.raises(Stop):
            module.main(cfg)
    calls.clear()
    module.main(cfg)


@pytest.mark.parametrize("script, rank, after", [(train, 16, 4), (train, 0, 4), (distill, 16, 4), (distill, 16, 1)])
def test_resume_is_exact(runs, tmp_path, monkeypatch, script, rank, after):  # noqa: F811
    """Stopped in the step `after` + 1: steps beyond the checkpoint at 3 are lost and done again; before it, all of them."""
    base = runs.ease if script is train else runs.phase1
    base = replace(base, steps=6, save_every=3, lora_rank=rank, **({"init": ""} if script is train and not rank else {"merged": False}))
    whole, parts = replace(base, out=str(tmp_path / "whole")), replace(base, out=str(tmp_path / "parts"))
    script.main(whole)
    interrupted(script, parts, monkeypatch, after)
    name = "adapter/adapter_model.safetensors" if rank else "model/model.safetensors"
    for file in (name, "checkpoints/step-6/trainer.safetensors"):
        a, b = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a), file
    assert rows(tmp_path / "whole/metrics.jsonl") == rows(tmp_path / "parts/metrics.jsonl")
    assert not any(p.name == "step-3" for p in run_module.newest_first(tmp_path / "parts"))


def test_a_changed_flag_is_not_resumed(runs, tmp_path, monkeypatch):  # noqa: F811
    cfg = replace(runs.ease, out=str(tmp_path / "run"))
    monkeypatch.setattr(train, "optimizer_step", lambda *a: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        train.main(cfg)
    with pytest.raises(train.UserError, match="another lr"):
        train.main(replace(cfg, lr=7e-4))

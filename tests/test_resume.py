"""A stopped run goes on: 3 + 3 steps equal 6 steps, bit for bit on the CPU, in both training
scripts and both ways to train; and after kill -9 the same command ends with the very files of an
unbroken run, in every script.
"""

import signal
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from safetensors.torch import load_file

import distill
import evaluate
import train
from ease.checkpoint import newest_first
from tests.test_scripts import ROOT, rows


class Stop(Exception):
    pass


def interrupted(module, cfg, monkeypatch, after):
    """Run, stop as a kill would in the middle of step `after` + 1, run the same command again."""
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


@pytest.mark.parametrize("script, rank, after, held_out", [
    (train, 16, 4, 0), (train, 16, 4, 5), (train, 0, 4, 0), (distill, 16, 4, 4),
    (distill, 16, 3, 4), (distill, 16, 1, 0)])
def test_resume_is_exact(runs, tmp_path, monkeypatch, script, rank, after, held_out):
    """Stopped in the step `after` + 1: steps beyond the checkpoint at 3 are lost and done again;
    before it, all of them. What is held out is measured once at 0, 3 and 6.
    """
    base = runs.ease if script is train else runs.phase1
    changes = {"init": ""} if script is train and not rank else {"merged": False}
    base = replace(base, steps=6, save_every=3, lora_rank=rank, held_out=held_out,
                   **changes)
    whole, parts = (replace(base, out=str(tmp_path / name)) for name in ("whole", "parts"))
    script.main(whole)
    interrupted(script, parts, monkeypatch, after)
    name = "adapter/adapter_model.safetensors" if rank else "model/model.safetensors"
    for file in (name, "checkpoints/step-6/trainer.safetensors"):
        a, b = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a), file
    metrics = rows(tmp_path / "parts/metrics.jsonl")
    assert rows(tmp_path / "whole/metrics.jsonl") == metrics
    measured = [row["step"] for row in metrics if "held_out_gate" in row]
    assert measured == ([0, 3, 6] if held_out else [])
    assert not any(p.name == "step-3" for p in newest_first(tmp_path / "parts"))


def test_a_changed_flag_is_not_resumed(runs, tmp_path, monkeypatch):
    cfg = replace(runs.ease, out=str(tmp_path / "run"))
    monkeypatch.setattr(train, "optimizer_step", lambda *a: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        train.main(cfg)
    with pytest.raises(train.UserError, match="another lr"):
        train.main(replace(cfg, lr=7e-4))


def flags_of(cfg) -> list[str]:
    """The flags of a config."""
    flags = []
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if value in ("", (), [], None):
            continue
        value = str(value).lower() if isinstance(value, bool) else value
        flags += [f"--{f.name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return flags


def run(script, cfg, deaths: tuple[str, ...] = ()) -> None:
    """The command, killed at each of these writes in turn and started again; at last to its end."""
    command = [f"{script.__name__}.py", *flags_of(cfg)]
    for path in (*deaths, ""):
        how = ["-m", "tests.kills", path] if path else []
        found = subprocess.run([sys.executable, *how, *command], cwd=ROOT, capture_output=True,
                               text=True, check=False)
        wanted = -signal.SIGKILL if path else 0
        assert found.returncode == wanted, f"{path or 'the end'}: {found.stderr}"


@pytest.mark.parametrize("script, deaths", [
    (distill, ("manifest.json", "!traces.jsonl", "traces.jsonl", "checkpoints/step-8",
               "!checkpoints/step-20")),
    (train, ("probe.jsonl", "!trained_on.jsonl", "trained_on.jsonl", "!checkpoints/step-4",
             "checkpoints/step-12"))])
def test_kill_9_in_training(runs, tmp_path, script, deaths):
    base = runs.ease if script is train else runs.phase1
    base = replace(base, steps=40, save_every=4, merged=False)
    run(script, replace(base, out=str(tmp_path / "whole")))
    run(script, replace(base, out=str(tmp_path / "parts")), deaths)
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json",
                 "trained_on.jsonl", "metrics.jsonl", "preview.txt"):
        a, b = ((tmp_path / name / file).read_bytes() for name in ("whole", "parts"))
        assert a == b, file


def test_kill_9_in_evaluation(runs, tmp_path):
    base = replace(runs.test, max_new_tokens=24)
    run(evaluate, replace(base, out=str(tmp_path / "whole")))
    run(evaluate, replace(base, out=str(tmp_path / "parts")),
        ("manifest.json", "rows-base.jsonl", "!rows-refusal.jsonl", "summary.json"))
    a, b = ([{k: v for k, v in row.items() if k != "seconds"}
             for row in rows(tmp_path / name / "rows.jsonl")] for name in ("whole", "parts"))
    assert a == b

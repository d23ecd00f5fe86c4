"""A stopped run goes on: 3 + 3 steps equal 6 steps, bit for bit on the CPU, in both training
scripts and both ways to train; and after kill -9, or on a full disk, the same command ends with the
very files of an unbroken run, in every script. (`python -m tests.kills`: 20 kills, the recipe too.)
"""

import shutil
import signal
from dataclasses import fields, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import distill
import evaluate
import train
from ease.checkpoint import newest_first
from ease.records import write_text
from ease.run import hold
from tests.kills import corrupt, differences, lost, stages, start
from tests.test_scripts import rows


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


def run(script, cfg, dooms: tuple[str, ...] = ()) -> None:
    """The command, stopped by each of these dooms (tests/kills.py) in turn and started again; at
    last to its end. Each time: no corrupt file, nothing finished is made again; a full disk is one
    line that names the file.
    """
    command, before = [f"{script.__name__}.py", *flags_of(cfg)], {}
    for doom in (*dooms, ""):
        status, said, _ = start([*(["-m", "tests.kills", doom] if doom else []), *command])
        full = doom.startswith("limit:")
        assert status == (2 if full else -signal.SIGKILL if doom else 0), f"{doom}: {said}"
        if full:
            lines = [x for x in said.replace("\r", "\n").split("\n") if "rror" in x]
            assert len(lines) == 1 and lines[0].startswith("error: ") and cfg.out in lines[0], said
        now = stages(Path(cfg.out))
        assert not corrupt(Path(cfg.out)) and not lost(before, now), doom
        before = now


@pytest.mark.parametrize("script, changes, dooms", [
    (distill, {}, ("!traces.jsonl", "+0.2~", "limit:checkpoints/part/part:2:20000")),
    (train, {"merged": True, "probe_samples": 1}, (
        "probe.jsonl", "!checkpoints/step-4", "limit:model/part:1:20000"))])
def test_kill_9_in_training(runs, tmp_path, script, changes, dooms):
    base = runs.ease if script is train else runs.phase1
    base = replace(base, steps=12, save_every=4, **{"merged": False, **changes})
    run(script, replace(base, out=str(tmp_path / "whole")))
    run(script, replace(base, out=str(tmp_path / "parts")), dooms)
    assert not differences(tmp_path / "whole", tmp_path / "parts")


def test_kill_9_in_evaluation(runs, tmp_path):
    # one slot: in a batch of other rows the sums round otherwise, and a near tie falls otherwise
    base = replace(runs.test, max_new_tokens=24, limit=25, slots=1)
    run(evaluate, replace(base, out=str(tmp_path / "whole")))
    run(evaluate, replace(base, out=str(tmp_path / "parts")),
        ("+0.1~", "limit:rows-refusal.kept:1:4000", "summary.json"))
    assert not differences(tmp_path / "whole", tmp_path / "parts")


def test_what_must_not_happen_is_seen(tmp_path):
    """By the three judges of the tests above."""
    a, b = tmp_path / "a", tmp_path / "b"
    rows = '{"text": "x", "seconds": 1}\n{"text": "y", "seconds": 2}\n'
    for folder in (a, b):
        write_text(folder / "rows-base.jsonl", rows)
        write_text(folder / "rows-ease.kept", rows)
        (folder / "checkpoints/step-3").mkdir(parents=True)
    before = stages(b)
    assert not (lost(before, stages(b)) or corrupt(b) or differences(a, b))
    write_text(b / "rows-base.jsonl", rows.replace("1", "7"))  # made again
    write_text(b / "rows-ease.kept", rows.split("\n")[0] + "\n")  # a row is gone
    (b / "checkpoints/step-3").rmdir()
    assert len(lost(before, stages(b))) == 3
    assert differences(a, b) == ["rows-ease.kept"]  # times aside
    write_text(b / "rows-base.jsonl", rows.replace("x", "z"))
    assert differences(a, b) == ["rows-base.jsonl", "rows-ease.kept"]
    for name, text in (("a.json", "{"), ("b.jsonl", '{"a": 1}\n{"a'), ("c.safetensors", "half")):
        write_text(b / name, text)
    assert len(corrupt(b)) == 3


def test_the_second_process_says_so(runs, tmp_path):
    """One line, and nothing is written; scoring beside works, as does looking at a finished run."""
    out = tmp_path / "run"
    shutil.copytree(runs.out / "test", out)
    finished = (out / "done").read_bytes()
    (out / "done").unlink()
    hold(out)
    files = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    command = ["evaluate.py", *flags_of(replace(runs.test, out=str(out)))]
    status, said, _ = start(command)
    assert status == 2 and said == f"error: {out}: another process is at work on this run\n"
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == files
    assert start([*command, "--score_only"])[0] == 0
    (out / "done").write_bytes(finished)
    assert start(command)[0] == 0

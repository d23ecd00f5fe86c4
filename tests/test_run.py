import json
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from ease import run
from ease.records import Record, UserError
from ease.run import (command_line, finish, load_state, log, make_optimizer, newest_first, open_run, optimizer_step, parse_config, save_state,
                      stage, stop_if_not_finite)
from tests.checks import verify


@dataclass
class Config:
    """Flags."""

    out: str  # where it goes
    rate: float = 0.5  # 50% of it
    names: list[str] = ("a", "b")  # several
    on: bool = False  # a switch
    mode: Literal["x", "y"] = "x"  # one of two
    slots: int = 1  # rows
    top_p: float = 1.0  # a share


def test_learning_rate():
    verify(run, "learning_rate")


def test_flags_are_the_fields():
    assert parse_config(Config, ["--out", "o"]) == Config("o")
    cfg = parse_config(Config, ["--out", "o", "--rate", "2", "--names", "c", "d", "--on", "true", "--mode", "y"])
    assert cfg == Config("o", 2.0, ["c", "d"], True, "y")
    assert parse_config(Config, ["--out", "o", "--on", "false"]).on is False  # bool("false") would be True


@pytest.mark.parametrize("argv, message", [
    (["--out", "o", "--rat", "2"], "--rat"), ([], "--out"), (["--out", "o", "--on", "yes"], "'yes' is neither true nor false"),
    (["--out", "o", "--mode", "z"], "invalid choice"), (["--out", "o", "--rate", "x"], "invalid float"),
    (["--out", "o", "--rate", "-1"], "--rate: -1.0 is below 0"), (["--out", "o", "--slots", "0"], "--slots: 0 is below 1"),
    (["--out", "o", "--rate", "nan"], "--rate: nan is below 0"), (["--out", "o", "--top_p", "0"], "--top_p: 0.0 is not above 0"),
    (["--out", "o", "--top_p", "1.5"], "--top_p: 1.5 is above 1")])
def test_wrong_flags_exit_2(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(Config, argv)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_help_is_the_comment(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "where it goes" in text and "50% of it [0.5]" in text


@pytest.mark.parametrize("error, message", [
    (UserError("file:3: field 'x'"), "error: file:3: field 'x'"), (torch.cuda.OutOfMemoryError(), "--batch_tokens"),
    (OSError(28, "No space left on device", "f"), "f: No space left"), (SafetensorError("no space"), "safetensors: no space"), (KeyboardInterrupt(), "goes on")])
def test_mistakes_are_one_line_and_status_2(error, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--out", "o"])

    def main(cfg):
        raise error

    main.__module__ = run.__name__
    with pytest.raises(SystemExit) as e:
        command_line(main, Config)
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and err.count("\n") == 1


def test_a_run_folder_belongs_to_one_configuration(tmp_path):
    data = tmp_path / "data"
    data.write_text("1")
    out = open_run(Config(str(tmp_path / "r")), [str(data)], "cpu", "float32")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["rate"] == 0.5 and manifest["inputs"][str(data)] and manifest["versions"]["torch"]
    open_run(Config(str(tmp_path / "r"), names=["a", "b"]), [str(data)], "cpu", "float32")  # the same: goes on
    with pytest.raises(UserError, match="another rate .0.5, now 0.7."):
        open_run(Config(str(tmp_path / "r"), rate=0.7), [str(data)], "cpu", "float32")
    data.write_text("2")
    with pytest.raises(UserError, match="data"):
        open_run(Config(str(tmp_path / "r")), [str(data)], "cpu", "float32")
    data.write_text("1")
    with pytest.raises(UserError, match="another dtype .'float32', now 'bfloat16'."):
        open_run(Config(str(tmp_path / "r")), [str(data)], "cuda", "bfloat16")
    with pytest.raises(UserError, match="nowhere: no such file"):
        open_run(Config(str(tmp_path / "other")), [str(tmp_path / "nowhere")], "cpu", "float32")
    assert not (tmp_path / "other").exists()  # a mended flag may still use the folder


def test_hash_of_a_folder_sees_its_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}"), (tmp_path / "model.safetensors").write_text("1")
    before = run.sha256(tmp_path)
    (tmp_path / "model.safetensors").write_text("2")
    after = run.sha256(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x")
    assert len({before, after, run.sha256(tmp_path)}) == 3


def test_a_stage_runs_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return [Record("a", "p", "benign")]

    assert stage(tmp_path / "s.jsonl", make) == stage(tmp_path / "s.jsonl", make) == [Record("a", "p", "benign")] and len(calls) == 1
    assert stage(tmp_path / "empty.jsonl", list) == stage(tmp_path / "empty.jsonl", make) == []


def test_optimizer_step_clips_and_reports_the_norm_before():
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p], lr=9.0)
    p.grad = torch.full((4,), 3.0)
    assert optimizer_step(optimizer, 0.5, 1.0) == pytest.approx(6.0)
    assert torch.allclose(p.data, torch.full((4,), -0.25), atol=1e-5) and p.grad is None  # 0.5 * 3 / 6
    p.grad = torch.full((4,), 3.0)
    assert optimizer_step(optimizer, 0.5, 0.0) == pytest.approx(6.0) and torch.allclose(p.data, torch.full((4,), -1.75), atol=1e-5)  # 0: not clipped


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].weight.requires_grad_(False)
    model.extra = nn.Parameter(torch.ones(2, 2))
    groups = make_optimizer(model, 0.1).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert groups[0]["params"] == [model.extra] and len(groups[1]["params"]) == 3  # two norm vectors and a bias; the frozen weight not


def test_state_round_trip_and_log_rewind(tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, make_optimizer(model, 0.1)

    model, optimizer = fresh()
    for step in range(3):
        model(torch.ones(1, 3)).pow(2).sum().backward()
        optimizer_step(optimizer, 0.1, 1.0)
        log(tmp_path, step=step)
        save_state(tmp_path, step + 1, model, optimizer, lambda folder: (folder / "w").write_text("x"))
    log(tmp_path, step=3)  # a step after the last checkpoint
    (tmp_path / "checkpoints" / "part").mkdir()  # a checkpoint that was being written
    assert [p.name for p in newest_first(tmp_path)] == ["step-3"] and (tmp_path / "checkpoints/step-3/w").exists()
    expected = torch.get_rng_state()
    other, second = fresh()
    torch.manual_seed(99)
    assert load_state(newest_first(tmp_path)[0], other, second) == 3
    assert torch.equal(torch.get_rng_state(), expected)
    state, back = optimizer.state[model.weight], second.state[other.weight]
    assert state.keys() == back.keys() and all(torch.equal(state[k], back[k]) for k in state)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]


def test_not_finite():
    stop_if_not_finite(1.0, 0, [])
    with pytest.raises(UserError, match="nan at step 7.*row-a"):
        stop_if_not_finite(float("nan"), 7, ["row-a"])


def test_finish_counts_tokens(tmp_path, capsys):
    log(tmp_path, step=0, tokens=5), log(tmp_path, step=1, tokens=6)
    finish(tmp_path, 0.0, steps=2)
    done = json.loads((tmp_path / "done").read_text())
    assert done["supervised_tokens"] == 11 and done["steps"] == 2 and done["peak_gib"] > 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"results in {tmp_path}")

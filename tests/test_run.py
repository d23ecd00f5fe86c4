"""Flags and the run folder."""

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import SafetensorError

import train
from ease import run
from ease.records import UserError
from ease.run import (
    RunFlags,
    canonical,
    changed_code,
    code_of,
    command_line,
    finish,
    is_done,
    log,
    open_run,
    parse_config,
)
from tests.checks import verify

FP32 = (torch.float32, "cpu")


@dataclass(kw_only=True)
class Config(RunFlags):
    """Flags."""

    rate: float = 0.5  # 50% of it
    names: list[str] = ("a", "b")  # several, of
    #   whatever kind
    on: bool = False  # a switch
    mode: Literal["x", "y"] = "x"  # one of two
    top_p: float = 1.0  # a share
    prompts: str = ""  # a file


def test_flags_are_the_fields():
    assert parse_config(Config, ["--out", "o"]) == Config(out="o")
    cfg = parse_config(Config, ["--out", "o", "--rate", "2", "--names", "c", "d", "--on", "--mode",
                                "y"])
    assert cfg == Config(out="o", rate=2.0, names=["c", "d"], on=True, mode="y")
    # bool("false") would be True
    assert parse_config(Config, ["--out", "o", "--on", "false"]).on is False
    assert parse_config(Config, ["--on", "true", "--out", "o"]).on is True


@pytest.mark.parametrize("argv, message", [
    (["--out", "o", "--rat", "2"], "--rat"), ([], "--out"),
    (["--out", "o", "--on", "yes"], "'yes' is neither true nor false"),
    (["--out", "o", "--mode", "z"], "invalid choice"),
    (["--out", "o", "--rate", "x"], "invalid float"),
    (["--out", "o", "--rate", "-1"], "--rate: must be from 0 to inf, is -1.0"),
    (["--out", "o", "--slots", "0"], "--slots: must be from 1 to inf, is 0"),
    (["--out", "o", "--rate", "nan"], "--rate: must be from 0 to inf, is nan"),
    (["--out", "o", "--top_p", "0"], "--top_p: must be from 1e-06 to 1, is 0.0"),
    (["--out", "o", "--top_p", "1.5"], "--top_p: must be from 1e-06 to 1, is 1.5")])
def test_wrong_flags_exit_2(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(Config, argv)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_help_is_the_comment(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "the run folder" in text and "50% of it [0.5]" in text  # inherited ones too
    assert "several, of whatever kind [('a', 'b')]" in text


def run_main(monkeypatch, error, argv=("--out", "o")):
    monkeypatch.setattr(sys, "argv", ["x", *argv])

    def main(cfg):
        if isinstance(error, str):
            print(error)
        else:
            raise error

    command_line(main, Config)


@pytest.mark.parametrize("error, message", [
    (UserError("file:3: field 'x'"), "error: file:3: field 'x'"),
    (torch.cuda.OutOfMemoryError(), "--batch_tokens"),
    (OSError(28, "No space left on device", "f"), "No space left on device: 'f'"),
    (SafetensorError("no space"), "error: no space"), (KeyboardInterrupt(), "goes on"),
    (UserError("a column 'x\ny\u2028z'"), "error: a column 'x y z'\n")])
def test_mistakes_are_one_line_and_status_2(error, message, capsys, monkeypatch):
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, error)
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and err.count("\n") == 1


def test_what_the_terminal_cannot_show_is_replaced(monkeypatch):
    """allosaurus#73: an emoji on a terminal of code page 1252, in an answer or in a message."""
    for error, stream in (
        ("smile \U0001f600", "stdout"),
        (UserError("f\U0001f600.jsonl"), "stderr"),
    ):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(raw, encoding="cp1252"))
        try:
            run_main(monkeypatch, error)
        except SystemExit as e:
            assert e.code == 2
        getattr(sys, stream).flush()
        assert b"?" in raw.getvalue()


# ------------------------------------------------------------------------------------- the folder
def test_a_run_folder_belongs_to_one_configuration(tmp_path):
    data, folder = tmp_path / "data", str(tmp_path / "r")
    data.write_text("1")
    cfg = Config(out=folder)
    out = open_run(cfg, [str(data), ""], FP32)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["rate"] == 0.5 and manifest["inputs"][str(data)]
    assert manifest["versions"]["torch"]
    open_run(replace(cfg, names=["a", "b"]), [str(data)], FP32)  # the same: goes on
    with pytest.raises(UserError, match="another rate .0.5, now 0.7."):
        open_run(replace(cfg, rate=0.7), [str(data)], FP32)
    data.write_text("2")
    with pytest.raises(UserError, match="data"):
        open_run(cfg, [str(data)], FP32)
    data.write_text("1")
    with pytest.raises(UserError, match="another dtype .'torch.float32', now 'torch.bfloat16'."):
        open_run(cfg, [str(data)], (torch.bfloat16, "cpu"))
    with pytest.raises(UserError, match="nowhere: no such file"):
        open_run(Config(out=str(tmp_path / "other")), [str(tmp_path / "nowhere")], FP32)
    assert not (tmp_path / "other").exists()  # a mended flag may still use the folder


def test_hold():
    verify(run, "hold")


def test_a_flag_that_the_older_run_did_not_have(tmp_path):
    """It had the default then: only another value makes another run."""
    cfg = Config(out=str(tmp_path / "run"))
    manifest = open_run(cfg, [], FP32) / "manifest.json"
    old = json.loads(manifest.read_text())
    del old["config"]["rate"]
    manifest.write_text(json.dumps(old))
    open_run(cfg, [], FP32)
    with pytest.raises(UserError, match="another rate .0.5, now 0.7"):
        open_run(replace(cfg, rate=0.7), [], FP32)


def test_a_finished_run_hashes_no_model(tmp_path, monkeypatch):
    """It says at once that it is finished; files are compared all the same."""
    data, model, folder = tmp_path / "data", tmp_path / "m", str(tmp_path / "r")
    data.write_text("1"), model.mkdir(), (model / "a.safetensors").write_text("w")
    hashed, real = [], run.sha256
    monkeypatch.setattr(run, "sha256", lambda p: hashed.append(str(p)) or real(p))
    made = open_run(Config(out=folder), [str(data), str(model)], FP32)
    assert hashed == [str(data), str(model)]
    (made / "done").write_text("{}")
    hashed.clear()
    open_run(Config(out=folder), [str(data), str(model)], FP32)
    assert hashed == [str(data)] and str(model) in (made / "manifest.json").read_text()
    data.write_text("2")
    with pytest.raises(UserError, match="data"):
        open_run(Config(out=folder), [str(data), str(model)], FP32)


def test_what_cannot_change_the_result_may_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").write_text("1")
    Path("slots").mkdir()  # a folder that has a flag's name
    cfg = Config(out="r", prompts="data", names=["base=data", "x=data+data"])
    open_run(cfg, ["data"], FP32)
    whole = str(tmp_path / "data")
    same = replace(cfg, out=str(tmp_path / "r") + "/", slots=3, device="cpu", prompts="./data",
                   names=[f"base={whole}", f"x={whole}+data"], dtype="float32")
    open_run(same, [whole], (torch.float32, "cuda"))
    with pytest.raises(UserError, match="another names"):
        open_run(replace(same, names=[f"base={whole}", f"y={whole}+data"]), [whole], FP32)


def test_canonical(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a+b").mkdir(), Path("c").mkdir()
    a, c = str(tmp_path / "a+b"), str(tmp_path / "c")
    assert canonical("a+b/") == a and canonical("n=c+c/") == f"n={c}+{c}"
    assert canonical(["c", 3, ""]) == [c, 3, ""] and canonical("no=thing") == "no=thing"
    assert canonical("n=responses:c/") == f"n=responses:{c}"


def test_a_run_without_git(tmp_path, monkeypatch):
    """A container without git in PATH: the manifest says "" and the run goes on."""
    monkeypatch.setenv("PATH", str(tmp_path))
    out = open_run(Config(out=str(tmp_path / "r")), [], FP32)
    assert json.loads((out / "manifest.json").read_text())["git"] == ""


def copied_project(tmp_path) -> Path:
    """A copy of the scripts, to edit."""
    copy = tmp_path / "project"
    (copy / "ease").mkdir(parents=True)
    for file in [*run.ROOT.glob("*.py"), *run.ROOT.glob("ease/*.py")]:
        (copy / file.relative_to(run.ROOT)).write_bytes(file.read_bytes())
    return copy


def test_a_run_belongs_to_the_code_that_made_it(tmp_path, monkeypatch):
    """A student edits losses.py and runs the same command: not "complete already"."""
    project = copied_project(tmp_path)
    monkeypatch.setattr(run, "ROOT", project)
    monkeypatch.setattr(run, "script_of", lambda cfg: "train.py")
    cfg = train.Config(model="m", diagnostic="d", refusals="r", general="g",
                       out=str(tmp_path / "r"))
    out = open_run(cfg, [], FP32)
    manifest = json.loads((out / "manifest.json").read_text())
    assert {"train.py", "ease/losses.py", "ease/records.py"} <= manifest["code"].keys()
    assert "distill.py" not in manifest["code"] and not changed_code(manifest)
    losses = project / "ease/losses.py"
    text = losses.read_text()
    losses.write_text("# a remark\n" + text.replace('"""', '"""Words. ', 1))
    open_run(cfg, [], FP32)  # comments and docstrings are no change
    losses.write_text(text.replace("CHUNK = 1024", "CHUNK = 512"))
    message = "was made by other code: ease/losses.py changed; delete .*--other_code"
    for _ in ("stopped", "finished"):
        with pytest.raises(UserError, match=message):
            open_run(cfg, [], FP32)
        (out / "done").write_text("{}")
    (out / "done").unlink()
    open_run(replace(cfg, other_code=True), [], FP32)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["changed_code"] == changed_code(manifest) == ["ease/losses.py"]


def test_code_is_that_of_the_script_and_its_imports():
    assert {"evaluate.py", "ease/scoring.py"} <= code_of("evaluate.py").keys()
    assert "ease/optim.py" not in code_of("evaluate.py")


def test_hash_of_a_folder_sees_its_weights(tmp_path):
    hashes = set()
    for name, text in (("config.json", "{}"), ("model.safetensors", "1"),
                       ("model.safetensors", "2"), ("chat_template.jinja", "x")):
        (tmp_path / name).write_text(text)
        hashes.add(run.sha256(tmp_path))
    assert len(hashes) == 4


def test_finish_counts_tokens_and_the_seconds_of_all_stretches(tmp_path, capsys):
    """Two stretches; the first was killed 100 s after it began, when it had just written."""
    out = open_run(Config(out=str(tmp_path / "r")), [], FP32)
    log(out, step=0, tokens=5), log(out, step=1, tokens=6)
    assert not is_done(out)
    clock = json.loads((out / "clock.json").read_text())
    began = clock["started"] - 5000
    (out / "clock.json").write_text(json.dumps({"spent": 0.0, "started": began}))
    for file in out.iterdir():
        os.utime(file, (began + 100, began + 100))
    open_run(Config(out=str(tmp_path / "r")), [], FP32)
    finish(out, steps=2)
    done = json.loads((out / "done").read_text())
    assert 99 <= done["seconds"] <= 100 + time.time() - clock["started"] + 1
    assert done["supervised_tokens"] == 11 and done["steps"] == 2 and done["peak_gib"] > 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"results in {out}")
    assert is_done(out) and "complete already" in capsys.readouterr().out


def test_import_is_quiet():
    found = subprocess.run([sys.executable, "-c", "import train, distill, evaluate"], cwd=run.ROOT,
                           capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")

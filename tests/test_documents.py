"""What the documents type: every command of their ```sh blocks has flags that exist, and those of
the paper's own setting run, on the small world.
"""

import importlib
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import distill
import evaluate
import train
from ease.run import parse_config

ROOT = Path(__file__).parents[1]
# bash expands variables and joins lines; the commands themselves are printed, not run
SHELL = 'pip() { :; }; python() { printf "%s\\x1f" "$@"; printf "\\x1e"; }; '


def commands(text: str) -> list[list[str]]:
    """The arguments of every python command in the ```sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    out = subprocess.run(["bash", "-c", SHELL + "\n".join(blocks)], capture_output=True, text=True,
                         check=True).stdout
    return [line.split("\x1f")[:-1] for line in out.split("\x1e")[:-1]]


def parsed(arguments: list[str]):
    """The Config of a command; None of a module whose flags are not ours (pytest, tests.*)."""
    module, *flags = arguments[1:] if arguments[0] == "-m" else arguments
    if arguments[0] == "-c" or module.startswith(("pytest", "tests.", "llama.cpp/")):
        return None
    module = importlib.import_module(
        {"ease": "ease.__main__"}.get(module, module.removesuffix(".py")))
    return parse_config(module.Config, flags)


@pytest.mark.parametrize("file", ["README.md", "data/README.md", "tests/README.md"])
def test_every_command_has_flags_that_exist(file):
    found = commands((ROOT / file).read_text(encoding="utf-8"))
    assert found
    for arguments in found:
        parsed(arguments)


@pytest.mark.parametrize("line", [
    "python train.py --method eas --model m --diagnostic d --refusals r --general g --out o",
    "python -m data.public --seed_tasks x", "python evaluate.py --systems a=b \\\n --prompt x",
])
def test_a_command_with_a_mistake(line, capsys):
    [arguments] = commands(f"text\n```sh\n# a comment\n{line}\n```\n")
    with pytest.raises(SystemExit):
        parsed(arguments)


def test_the_papers_own_setting_runs(world, tmp_path, monkeypatch):
    """Section 13 of data/README.md: hub ids and files become the small world's, tokens and steps
    few; all other flags stay.
    """
    text = (ROOT / "data/README.md").read_text(encoding="utf-8").split("\n## 13. ")[1]
    first, *phase2, test = map(parsed, commands(text.split("\n## ")[0]))
    few = {"dtype": "float32", "max_new_tokens": 40}
    train_few = few | {"model": world.base, "judge": "target", "policies": world.policies,
                       "max_length": 512, "steps": 1, "epochs": 0, "batch_size": 2}

    def here(cfg, **files):
        given = {name: file for name, file in files.items() if getattr(cfg, name)}
        return replace(cfg, out=str(tmp_path / Path(cfg.out).name), **given)

    distill.main(here(replace(first, **train_few), teacher=world.teacher, prompts=world.prompts))
    for cfg in phase2:
        cfg = replace(cfg, **train_few, probe_tokens=30 if cfg.method == "ease" else 512)
        train.main(here(cfg, teacher=world.teacher, diagnostic=world.diagnostic,
                        refusals=world.refusals, general=world.general, prompts=world.prompts,
                        init=str(tmp_path / "phase1/adapter")))
    systems = [f"{system.partition('=')[0]}={world.base}" + (
        f"+{tmp_path / Path(system).parent.name}/adapter" if "+" in system else "")
        for system in test.systems]
    evaluate.main(here(replace(test, systems=systems, judge=["target", "xstest"], limit=4,
                               latency=2, prefill=[0, 2], tasks=[], **few), prompts=[world.test]))
    assert (tmp_path / "test/report.html").exists()

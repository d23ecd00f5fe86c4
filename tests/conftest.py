import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the oracles must not look for a network

import pytest  # noqa: E402

from data import toy  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small, half-trained toy world: enough for every path through the scripts. Numbers from it mean nothing."""
    path = tmp_path_factory.mktemp("world") / "toy"
    toy.main(toy.Config(out=str(path), seed=3, steps=170, teacher_steps=70, judge_steps=5, scale=0.1))
    names = {name: str(path / f"{name}.jsonl") for name in toy.SETS}
    return SimpleNamespace(path=path, base=str(path / "base"), teacher=str(path / "teacher"), judge=str(path / "judge"),
                           policies=str(path / "policies.json"), **names)

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import distill
import train
from ease import ranks
from tests.test_scripts import ROOT


def test_rows_are_dealt_out(monkeypatch):
    """Every row to one rank; a rank without a row of a micro-batch leaves it out."""
    monkeypatch.setattr(ranks, "RANKS", 2)
    step, shares = [[0, 1, 2], [3], [4, 5]], []
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "RANK", rank)
        shares.append(ranks.my_share(step))
    assert shares == [[[0, 2], [3], [4]], [[1], [5]]]


def test_one_process_adds_nothing():
    p, sums = torch.ones(2, requires_grad=True), torch.ones(1)
    ranks.sum_over_ranks(torch.optim.SGD([p], lr=1.0), sums)
    assert p.grad is None and sums == 1


def test_a_rank_from_elsewhere_says_nothing(tmp_path):
    """Schedulers set RANK too; only torchrun's processes stand back."""
    write = f"from ease.records import write_text; write_text({str(tmp_path / 'f')!r}, 'x')"
    for more, written in (({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2"}, False), ({}, True)):
        subprocess.run([sys.executable, "-c", write], cwd=ROOT, check=True,
                       env={**os.environ, "RANK": "1", **more})
        assert (tmp_path / "f").exists() == written


def flags(cfg, out, **changes) -> list[str]:
    """The command line of a Config."""
    values = {k: v for k, v in (vars(cfg) | {"out": str(out)} | changes).items() if v not in ("",)}
    return [word for k, v in values.items() if v is not None
            for word in (f"--{k}", *map(str, v if isinstance(v, list | tuple) else [v]))
            if v not in ([], ())]


@pytest.mark.parametrize("script", ["distill", "train"])
def test_two_ranks_are_one(runs, tmp_path, script):
    """gloo, CPU: the same losses, gradient norms and adapter, and the same files; with --held_out
    too, which rank 0 alone measures.
    """
    module, cfg = {"distill": (distill, runs.phase1), "train": (train, runs.ease)}[script]
    cfg = replace(cfg, held_out=4, save_every=2, out=str(tmp_path / "one"))
    module.main(cfg)
    words = [w.lower() if w in ("True", "False") else w for w in flags(cfg, tmp_path / "two")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               f"{script}.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("done in") == 1
    one, two = tmp_path / "one", tmp_path / "two"
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (one, two)]
    assert [row["step"] for row in logs[0] if "held_out_gate" in row] == [0, 2, 3]
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5)
    a, b = (load_file(run / "adapter/adapter_model.safetensors") for run in (one, two))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    assert (one / "trained_on.jsonl").read_bytes() == (two / "trained_on.jsonl").read_bytes()
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}

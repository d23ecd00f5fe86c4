import re
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest

from ease import __main__, stations
from ease.batching import encode_record, held_out_loss
from ease.loading import load_tokenizer, load_trainable, pick_place
from ease.method import ROLES
from ease.records import UserError, read_jsonl, read_responses
from ease.stations import ROWS, STATIONS, trace_example
from ease.tokenizer_files import read_json
from tests.checks import close, verify


def test_watch():
    verify(stations, "watch")


@pytest.fixture(scope="module")
def traced(runs):
    """What is printed, row by row; the runs are as before."""
    def files():
        return {p: p.stat().st_mtime_ns for p in runs.out.rglob("*")}

    before, out = files(), StringIO()
    with redirect_stdout(out):
        trace_example(str(runs.out))
    assert files() == before
    return out.getvalue().split("\n\n")


def test_every_station_is_there(traced, runs):
    assert len(traced) == len(ROWS)
    for text, (name, *_) in zip(traced, ROWS):
        assert all(len(line) <= 100 for line in text.splitlines())
        found = re.findall(r"^(ease/\w+)\.py: ([\w.]+): ", text, re.MULTILINE)
        for module, function in found:
            assert callable(attrgetter(function)(import_module(module.replace("/", "."))))
        script = read_json(runs.out / name / "manifest.json")["script"][:-3]
        wanted = STATIONS[script].split()
        if name == "test":
            wanted.remove("note_verdicts")  # two judges here, three in the recipe
        assert sorted(f for _, f in found) == sorted(wanted), name


@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_the_losses_are_those_of_the_row(traced, runs, place):
    """By role, against held_out_loss of the model from which the training started."""
    name, harmful, with_trace = ROWS[place]
    text = " ".join(traced[place].split())
    cfg = SimpleNamespace(**read_json(runs.out / name / "manifest.json")["config"])
    r = next(r for r in read_jsonl(runs.out / name / "trained_on.jsonl")
             if (r.harmful, bool(r.reasoning)) == (harmful, with_trace))
    model, _ = load_trainable(cfg, cfg.model, cfg.init, pick_place(cfg))
    tokenizer = load_tokenizer(cfg.model)
    example = encode_record(tokenizer, r)
    assert r.id in text and f"encode_record: {example.ids}" in text
    for role, loss in held_out_loss(model, [example], "cpu").items():
        found = re.search(rf"'{role[9:]}': ([\w.e-]+)", text)[1]
        assert found == "None" if loss is None else close(float(found), loss)
    sums = [float(x) for x in re.search(r"tensor\(\[(.*?)\]", text)[1].split(",")]
    loss = float(re.search(r"'loss': ([\w.e-]+)", text)[1])
    assert abs(loss - sum(sums) / example.supervised) < 1e-3
    for role in set(ROLES.values()) & set(example.roles):
        assert re.search(rf"Counter\(.*\b{role}: {example.roles.count(role)}\b", text)


def test_the_test_row_is_answered_as_in_the_evaluation(traced, runs):
    [stored, *_] = read_responses(runs.out / "test" / "rows-ease.jsonl")
    text = " ".join(traced[-1].split())
    assert stored.record.prompt in text and f"count_tokens: {stored.tokens}" in text
    assert close(float(re.search(r"gate=([\w.e-]+),", text)[1]), stored.gate)


def test_without_runs(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="phase1 is no finished run: `python -m ease` first"):
        __main__.main(__main__.Config(out=str(tmp_path), trace_example=True))
    assert not list(Path(tmp_path).iterdir())

import json
from dataclasses import replace

import evaluate
import pytest

from ease import adaptive as module
from ease.adaptive import GOALS, SUFFIX, search_table
from ease.readers import read_named
from ease.records import UserError, read_jsonl, write_jsonl
from ease.report import section
from ease.run import parse_config
from tests.checks import verify


@pytest.mark.parametrize("name", ["ordinary_tokens", "random_search", "likelihoods", "attack",
                                  "search"])
def test_function(name):
    verify(module, name)


def row(i: int, success: list, evaluations: int, **changes) -> dict:
    return {"id": str(i), "group": str(i), "success": success, "evaluations": evaluations,
            "answers": 2, "reasons": [True, False], "gate": [0.75, 0.25], "score": [-4.0, -2.0],
            **changes}


def test_table():
    """Median of the searches that succeeded: neither those that failed nor the request alone."""
    rows = [row(0, [True, True], 0), row(1, [False, True], 100), row(2, [False, True], 40),
            row(3, [None, False], 300, answers=4), row(4, [False, None], 300)]
    lines = search_table({("a", "opening"): rows, ("b", "gate"): rows[3:4]}, "xstest", 300)
    a, b = lines
    assert (a["system"], a["goal"], a["judge"], a["at most"]) == ("a", "opening", "xstest", 300)
    assert (a["median"], b["median"], a["answers"]) == (70, "-", 2.4)
    assert [a[f"success {when}"].value for when in ("before", "after")] == [0.25, 0.75]
    assert [a[f"reasons {when}"].value for when in ("before", "after")] == [1, 0]
    assert [a["gate before"], a["gate after"], a["score before"], a["score after"]] == [
        0.75, 0.25, -4, -2]
    text = section("A suffix", lines, SUFFIX)
    assert "## A suffix" in text and "| 25.0 [" in " ".join(text.split()) and "xstest" in text


@pytest.fixture
def cfg(runs, tmp_path):
    systems = [s for s in runs.test.systems if s.startswith(("base", "ease"))]
    return replace(runs.test, out=str(tmp_path / "t"), systems=systems, base_system="",
                   refusal_system="", deliberative_system="", search=11, search_prompts=2,
                   search_goal=list(GOALS), max_new_tokens=20)


def stages(cfg) -> dict[str, list[str]]:
    return {name: open(f"{cfg.out}/rows-{name}.jsonl").read().splitlines()
            for name in (f"{s}+search-{goal}" for s in ("base", "ease") for goal in GOALS)}


def test_the_flag(cfg, tmp_path, monkeypatch):
    """A line a system and goal; rows are stages; a stopped run goes on, and ends as an unbroken
    one.
    """
    evaluate.main(cfg)
    summary = json.loads((tmp_path / "t/summary.json").read_text())
    assert [(x["system"], x["goal"], x["judge"]) for x in summary["search"]] == [
        (name, goal, "xstest") for name in ("base", "ease") for goal in GOALS]
    assert "## A suffix that adapts" in (tmp_path / "t/report.md").read_text()
    assert "A suffix that adapts</h2>" in (tmp_path / "t/report.html").read_text()
    rows, [asked] = stages(cfg), read_named(*cfg.prompts)
    for name, lines in rows.items():
        kind = GOALS[name.rpartition("-")[2]]
        ids = [r.id for r in asked if r.kind == kind][:2]
        found = list(map(json.loads, lines))
        assert [x["id"] for x in found] == ids and all(x["evaluations"] <= 11 for x in found)
    assert not list((tmp_path / "t").glob("*.kept"))

    real, count = evaluate.attack, []

    def stopped(*arguments):
        count.append(1)
        if len(count) == 4:  # the second goal's second prompt
            raise KeyboardInterrupt
        return real(*arguments)

    again = replace(cfg, out=str(tmp_path / "u"))
    monkeypatch.setattr(evaluate, "attack", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(again)
    assert (tmp_path / "u/rows-base+search-bypass.kept").exists()
    evaluate.main(again)
    assert len(count) == 13 and near(stages(again)) == near(rows)


def near(rows: dict[str, list[str]]) -> dict:
    keep = ("id", "success", "evaluations", "answers", "suffix", "text")
    return {name: [[json.loads(line)[key] for key in keep] for line in lines]
            for name, lines in rows.items()}


def test_threshold_and_policy(cfg, tmp_path):
    """A system is attacked as it is run: with its threshold, and with the policy in its prompt."""
    cfg = replace(cfg, systems=cfg.systems[-1:], search=2, search_prompts=1, search_goal=["gate"],
                  judge=["target"])
    found = {}
    for name, changes in (("t", {"gate_threshold": 0.0}), ("u", {}), ("v", {
            "policy_prompt": "ease"})):
        evaluate.main(replace(cfg, out=str(tmp_path / name), **changes))
        [found[name]] = map(json.loads, open(tmp_path / name / "rows-ease+search-gate.jsonl"))
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["search"][0]["judge"] == "target"  # the only one
    assert found["t"]["reasons"] == [True, True]
    assert found["u"]["gate"][0] != pytest.approx(found["v"]["gate"][0], rel=1e-3)


def test_mistakes(cfg, tmp_path):
    plain = tmp_path / "plain.jsonl"
    write_jsonl(plain, [r for r in read_jsonl(cfg.prompts[0]) if r.kind == "harmful"][:2])
    for changes, message in (
            ({"search_goal": ["shut"]}, "--search_goal: opening, bypass, gate;"),
            ({"score_only": True}, "not with --score_only"),
            ({"prompts": [], "tasks": ["gsm8k=x"]}, "--search answer --prompts: give some"),
            ({"prompts": [str(plain)]}, "--search: opening needs prompts of kind harmful, the")):
        with pytest.raises(UserError, match=message):
            evaluate.main(replace(cfg, **changes))
    assert not (tmp_path / "t").exists()


def test_numbers_on_the_command_line():
    flags = parse_config(evaluate.Config, ["--search", "300", "--search_goal", "opening", "gate"])
    assert (flags.search, flags.search_goal) == (300, ["opening", "gate"])

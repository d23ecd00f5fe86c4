import csv
import json
from types import SimpleNamespace

import pytest

from data import public
from ease.readers import read_records
from ease.records import UserError
from ease.scoring import is_refusal


@pytest.fixture
def files(tmp_path):
    """Small files in the formats of the public ones, with nothing of theirs in them."""
    star1 = [{"id": f"s{i}", "question": f"question {i}?", "response": f"<think>\nthought {i}\n</think>\n\nanswer {i}", "category": ["Self-Harm"],
              "source": "x", "score": {}} for i in range(30)]
    (tmp_path / "star1.json").write_text(json.dumps(star1))
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"id": f"t{i}", "instruction": f"task {i}", "instances": [{"input": "", "output": f"done {i}"}]}) + "\n" for i in range(12)))
    for name, columns, rows in (("advbench", ("goal", "target"), [(f"goal {i}", f"Sure, goal {i}") for i in range(9)]),
                                ("xstest", ("id", "prompt", "type", "label"), [(str(i), f"safe {i}?", "t", ("safe", "unsafe")[i % 2]) for i in range(14)])):
        with open(tmp_path / f"{name}.csv", "w", newline="") as f:
            csv.writer(f).writerows([columns, *rows])
    return SimpleNamespace(star1=str(tmp_path / "star1.json"), advbench=str(tmp_path / "advbench.csv"), xstest=str(tmp_path / "xstest.csv"),
                           seed_tasks=str(tmp_path / "tasks.jsonl"))


def config(files, out, **changes):
    sizes = {"phase1": 8, "questions": 6, "refusals": 7, "lookalikes": 3, "test_safe": 5, "test_harmful": 4, "test_tasks": 5, "dev": 2}
    return public.Config(**vars(files), out=str(out), **{**sizes, **changes})


def test_sets_are_disjoint_and_complete(files, tmp_path):
    cfg = config(files, tmp_path / "sets")
    public.main(cfg)
    sets = {f.stem: read_records(f) for f in (tmp_path / "sets").iterdir()}
    assert {name: len(rs) for name, rs in sets.items()} == {
        "phase1": 8, "diagnostic": 3 * (6 + 3), "refusals": 7, "general": 7, "xstest": 5, "advbench": 4, "attacked": 4, "attacked_new": 4, "tasks": 5, "lookalikes": 5, "dev": 4}
    groups = {name: {r.request for r in rs} for name, rs in sets.items()}
    questions = {g for g in groups["diagnostic"] if g.startswith("s")}
    assert len(questions) == 6 and not questions & groups["phase1"] | groups["refusals"] & (questions | groups["phase1"])
    assert not groups["general"] & groups["tasks"] and groups["diagnostic"] - questions <= groups["general"]
    assert groups["attacked"] == groups["attacked_new"] == groups["advbench"] and groups["lookalikes"] == groups["tasks"]
    assert not groups["dev"] & (groups["advbench"] | groups["xstest"]) and [r.kind for r in sets["dev"]] == ["adversarial_harmful"] * 2 + ["benign"] * 2
    assert all(r.reasoning for r in sets["phase1"]) and not any(r.reasoning for name, rs in sets.items() if name != "phase1" for r in rs)
    assert all(is_refusal(r.response) and r.kind == "harmful" for r in sets["refusals"]) and not any(r.harmful for r in sets["xstest"])
    assert {r.kind for r in sets["diagnostic"]} == {"adversarial_harmful", "adversarial_benign"} and {r.attack for r in sets["attacked"]} == set(cfg.attacks)
    assert {r.attack for r in sets["attacked_new"]} == set(cfg.held_out_attacks) and not set(cfg.held_out_attacks) & {r.attack for r in sets["diagnostic"]}
    assert all(r.response for r in sets["general"] + sets["lookalikes"]) and not any(r.response for r in sets["diagnostic"] if r.harmful)
    assert public.build(cfg) == sets != public.build(config(files, "x", seed=1))


@pytest.mark.parametrize("changes, message", [({"questions": 20}, "35 records are wanted.*there are 30"), ({"test_safe": 6}, "there are 7"),
                                              ({"lookalikes": 8}, "only 7 tasks are not in the test"), ({"attacks": ["nope"]}, "unknown attack 'nope'"),
                                              ({"held_out_attacks": ["role_play", "rot13"]}, "role_play stands in --attacks too")])
def test_mistakes(files, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        public.main(config(files, tmp_path / "sets", **changes))
    assert not (tmp_path / "sets").exists()


def test_nothing_is_overwritten(files, tmp_path):
    with pytest.raises(UserError, match="exists"):
        public.main(config(files, tmp_path))

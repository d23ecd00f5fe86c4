import csv
import json
from types import SimpleNamespace

import pytest

from data import public
from ease.readers import read_records
from ease.records import UserError, digest
from ease.scoring import is_refusal


@pytest.fixture
def files(tmp_path):
    """Small files in the formats of the public ones, with nothing of theirs in them."""
    star1 = [
        {
            "id": f"s{i}",
            "question": f"question {i}?",
            "response": f"<think>\nthought {i}\n</think>\n\nanswer {i}",
            "category": ["Self-Harm"],
            "source": "x",
            "score": {},
        }
        for i in range(30)
    ]
    (tmp_path / "star1.json").write_text(json.dumps(star1))
    (tmp_path / "tasks.jsonl").write_text(
        "".join(
            json.dumps({
                "id": f"t{i}",
                "instruction": f"task {i}",
                "instances": [{"input": "", "output": f"done {i}"}],
            })
            + "\n"
            for i in range(12)
        )
    )
    for name, columns, rows in (
        ("advbench", ("goal", "target"), [(f"goal {i}", f"Sure, goal {i}") for i in range(9)]),
        (
            "xstest",
            ("id", "prompt", "type", "label"),
            [(str(i), f"safe {i}?", "t", ("safe", "unsafe")[i % 2]) for i in range(14)],
        ),
    ):
        with open(tmp_path / f"{name}.csv", "w", newline="") as f:
            csv.writer(f).writerows([columns, *rows])
    return SimpleNamespace(
        star1=str(tmp_path / "star1.json"),
        advbench=str(tmp_path / "advbench.csv"),
        xstest=str(tmp_path / "xstest.csv"),
        seed_tasks=str(tmp_path / "tasks.jsonl"),
    )


def config(files, out, **changes):
    sizes = {
        "phase1": 8,
        "questions": 6,
        "refusals": 7,
        "lookalikes": 3,
        "test_safe": 5,
        "test_harmful": 4,
        "test_tasks": 5,
        "dev": 2,
    }
    return public.Config(**vars(files), out=str(out), **{**sizes, **changes})


def test_sets_are_disjoint_and_complete(files, tmp_path):
    cfg = config(files, tmp_path / "sets")
    public.main(cfg)
    sets = {f.stem: read_records(f) for f in (tmp_path / "sets").iterdir()}
    assert {name: len(rs) for name, rs in sets.items()} == {
        "phase1": 8,
        "diagnostic": 3 * (6 + 3),
        "refusals": 7,
        "general": 7,
        "xstest": 5,
        "advbench": 4,
        "attacked": 4,
        "attacked_new": 4,
        "tasks": 5,
        "lookalikes": 5,
        "dev": 4,
    }
    groups = {name: {r.group for r in rs} for name, rs in sets.items()}
    questions = groups["diagnostic"] & {digest(f"question {i}?") for i in range(30)}
    assert len(questions) == 6 and not questions & groups["phase1"] | groups["refusals"] & (
        questions | groups["phase1"]
    )
    assert (
        not groups["general"] & groups["tasks"]
        and groups["diagnostic"] - questions <= groups["general"]
    )
    assert (
        groups["attacked"] == groups["attacked_new"] == groups["advbench"]
        and groups["lookalikes"] == groups["tasks"]
    )
    assert (
        not groups["dev"] & (groups["advbench"] | groups["xstest"])
        and [r.kind for r in sets["dev"]] == ["adversarial_harmful"] * 2 + ["benign"] * 2
    )
    assert all(r.reasoning for r in sets["phase1"]) and not any(
        r.reasoning for name, rs in sets.items() if name != "phase1" for r in rs
    )
    assert all(
        is_refusal(r.response) and r.kind == "harmful" for r in sets["refusals"]
    ) and not any(r.harmful for r in sets["xstest"])
    assert {r.kind for r in sets["diagnostic"]} == {
        "adversarial_harmful",
        "adversarial_benign",
    } and {r.attack for r in sets["attacked"]} == set(cfg.attacks)
    assert {r.attack for r in sets["attacked_new"]} == set(cfg.held_out_attacks) and not set(
        cfg.held_out_attacks
    ) & {r.attack for r in sets["diagnostic"]}
    assert all(r.response for r in sets["general"] + sets["lookalikes"]) and not any(
        r.response for r in sets["diagnostic"] if r.harmful
    )
    assert public.build(cfg) == sets != public.build(config(files, "x", seed=1))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"questions": 20}, "star1.json: --phase1 8 .* = 35 harmful .* needed; only 30 of its 30"),
        ({"test_safe": 6}, "--test_safe 6 .* only 7 of its 14 records fit"),
        ({"lookalikes": 8}, "--lookalikes 8 = 13 benign tasks .*only 12"),
        ({"attacks": ["nope"]}, "unknown attack 'nope'"),
        ({"held_out_attacks": ["role_play", "rot13"]}, "role_play stands in --attacks too"),
    ],
)
def test_mistakes(files, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        public.main(config(files, tmp_path / "sets", **changes))
    assert not (tmp_path / "sets").exists()


def test_nothing_is_overwritten(files, tmp_path):
    with pytest.raises(UserError, match="exists"):
        public.main(config(files, tmp_path))


@pytest.mark.parametrize("flag, content, message", [
    ("star1", None, "gone: No such file"),
    ("xstest", "", "no rows .the file is empty"),
    ("advbench", "goal,target\n", "no rows .there is only a header"),
    ("seed_tasks", "", "no rows .the file is empty"),
    ("advbench", "name,age\nx,3\n", "unknown columns name, age"),
    ("xstest", "id,prompt,type,label\n1,a,t,unsafe\n", "--xstest .*safe prompts are needed; only"),
])
def test_files_that_are_no_use(files, tmp_path, flag, content, message):
    """Missing, empty or of another kind: one line, nothing written."""
    path = tmp_path / "gone"
    if content is not None:
        path = tmp_path / ("given" + {"seed_tasks": ".jsonl"}.get(flag, ".csv"))
        path.write_text(content)
    vars(files)[flag] = str(path)
    with pytest.raises(UserError, match=message) as e:
        public.main(config(files, tmp_path / "sets"))
    assert "\n" not in str(e.value) and not (tmp_path / "sets").exists()


def test_flags_mixed_up(files, tmp_path):
    """A file in the place of another one would make harmful requests the tasks, or the reverse."""
    for flag, other in (
        ("seed_tasks", "advbench"),
        ("advbench", "seed_tasks"),
        ("star1", "advbench"),
    ):
        given = SimpleNamespace(**{**vars(files), flag: vars(files)[other]})
        with pytest.raises(UserError, match=f"--{flag} .*are needed; only 0 of its"):
            public.main(config(given, tmp_path / "sets"))


def test_what_is_not_taken_is_said(files, tmp_path, capsys):
    text = (tmp_path / "advbench.csv").read_text()
    (tmp_path / "advbench.csv").write_text(text + "goal 3,Sure\ngoal 4,Sure\n")
    public.main(config(files, tmp_path / "sets"))
    out = capsys.readouterr().out
    assert "advbench.csv: 9 of 11 records taken (harmful requests, no text twice)" in out
    assert "xstest.csv: 7 of 14 records taken (safe prompts, no text twice)" in out

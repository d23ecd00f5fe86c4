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
        tasks=[str(tmp_path / "tasks.jsonl")],
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
        "lookalikes_new": 5,
        "traces": 14,
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
    assert all(r.reasoning for r in sets["phase1"] + sets["traces"]) and not any(
        r.reasoning for name, rs in sets.items() if name not in ("phase1", "traces") for r in rs
    )
    assert groups["traces"] == groups["phase1"] | questions
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
    ("tasks", "", "no rows .the file is empty"),
    ("advbench", "name,age\nx,3\n", "unknown columns name, age"),
    ("xstest", "id,prompt,type,label\n1,a,t,unsafe\n", "--xstest .*safe prompts are needed; only"),
])
def test_files_that_are_no_use(files, tmp_path, flag, content, message):
    """Missing, empty or of another kind: one line, nothing written."""
    path = tmp_path / "gone"
    if content is not None:
        path = tmp_path / ("given" + {"tasks": ".jsonl"}.get(flag, ".csv"))
        path.write_text(content)
    vars(files)[flag] = [str(path)] if flag == "tasks" else str(path)
    with pytest.raises(UserError, match=message) as e:
        public.main(config(files, tmp_path / "sets"))
    assert "\n" not in str(e.value) and not (tmp_path / "sets").exists()


def test_flags_mixed_up(files, tmp_path):
    """A file in the place of another one would make harmful requests the tasks, or the reverse."""
    for flag, other in (
        ("tasks", "advbench"),
        ("advbench", "tasks"),
        ("star1", "advbench"),
    ):
        path = vars(files)[other]
        path = [path] if flag == "tasks" else path[0] if other == "tasks" else path
        given = SimpleNamespace(**{**vars(files), flag: path})
        with pytest.raises(UserError, match=f"--{flag} .*are needed; only 0 of its"):
            public.main(config(given, tmp_path / "sets"))


def test_what_is_not_taken_is_said(files, tmp_path, capsys):
    text = (tmp_path / "advbench.csv").read_text()
    (tmp_path / "advbench.csv").write_text(text + "goal 3,Sure\ngoal 4,Sure\n")
    public.main(config(files, tmp_path / "sets"))
    out = capsys.readouterr().out
    assert "advbench.csv: 9 of 11 records taken (harmful requests, no text twice)" in out
    assert "xstest.csv: 7 of 14 records taken (safe prompts, no text twice)" in out


SLOT = "[INSERT PROMPT HERE]"


@pytest.fixture
def more(files, tmp_path):
    """Templates, benign traces and refusals, by our own format."""
    with open(tmp_path / "templates.csv", "w", newline="") as f:
        csv.writer(f).writerows([("id", "text"), *((i, f"Scene {i}. {SLOT}") for i in range(9)),
                                 (9, f"Long. {SLOT}" + "x" * 50)])
    rows = [{"id": f"b{i}", "prompt": f"benign {i}?", "kind": "benign", "response": f"so {i}",
             "reasoning": "word " * (5 + i)} for i in range(9)]
    refused = [{"id": f"r{i}", "prompt": f"bad {i}", "kind": "harmful",
                "response": "I cannot do that." if i % 2 else "Sure."} for i in range(12)]
    for name, found in (("benign", rows), ("refused", refused)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    return {"templates": str(tmp_path / "templates.csv"), "max_template_chars": 50,
            "benign_traces": [str(tmp_path / "benign.jsonl")], "max_benign_words": 12,
            "refusal_rows": str(tmp_path / "refused.jsonl"), "dev_templates": 2,
            "test_templates": 3, "phase1_benign": 2, "refusals": 6, "dev_tasks": 2,
            "test_unsafe": 4, "attacks_each": 2}


def test_templates_split_and_twins_share_them(files, more, tmp_path):
    cfg = config(files, tmp_path / "sets", **more)
    public.main(cfg)
    sets = {f.stem: read_records(f) for f in (tmp_path / "sets").iterdir()}
    used = {name: {r.attack for r in rs} - {""} for name, rs in sets.items()}
    known = used["diagnostic"]
    assert used["lookalikes"] | used["attacked"] <= known  # 3 + 4 attacks, 18 rows: all of them
    assert len(known) == 7 and len({a for a in known if "template" in a}) == 4
    assert not used["attacked_new"] & (known | used["dev"]) and not used["dev"] & known
    assert used["lookalikes_new"] == {*cfg.held_out_attacks, *(
        a for a in used["lookalikes_new"] if a.startswith("template"))}
    assert all(a.startswith("template") for a in used["dev"]) and len(used["dev"]) == 2
    assert "template-9" not in set().union(*used.values())  # too long
    assert [r.kind for r in sets["dev"]].count("adversarial_benign") == 2
    diagnostic = sets["diagnostic"]
    assert len(diagnostic) == 2 * (6 + 3) and {r.kind for r in diagnostic} == {
        "adversarial_harmful", "adversarial_benign"}
    traced = {r.group: r for r in sets["traces"]}
    assert all(r.group in traced for r in diagnostic)  # look-alikes are reasoned about
    assert all(SLOT not in r.prompt for r in diagnostic + sets["attacked_new"])
    benign = [r for r in sets["phase1"] if not r.harmful]
    assert len(benign) == 2 and all(len(r.reasoning.split()) <= 12 for r in benign)
    assert not {r.group for r in benign} & {r.group for r in diagnostic}
    assert len(sets["refusals"]) == 6 and all(r.response == "I cannot do that." for r in
                                              sets["refusals"])
    assert len(sets["xstest_unsafe"]) == 4 and all(r.harmful for r in sets["xstest_unsafe"])


@pytest.mark.parametrize("changes, message", [
    ({"test_templates": 7}, "--dev_templates 2 . --test_templates 7 leave none of its 9 for"),
    ({"refusals": 7}, "--refusals 7 = 7 harmful prompts with a refusal .* only 6 of its 12"),
    ({"max_benign_words": 6}, "--phase1_benign 2 . --lookalikes 3 = 5 benign questions .* only 2"),
    ({"dev_attacks": ["fiction"]}, "--dev_attacks: fiction stands in --held_out_attacks too"),
])
def test_mistakes_with_templates(files, more, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        public.main(config(files, tmp_path / "sets", **{**more, **changes}))
    assert not (tmp_path / "sets").exists()

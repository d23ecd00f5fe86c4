"""What is published of an evaluation: its numbers come out of the rows again, and no text does."""

import json
import re
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest

import evaluate
from data import results
from ease.records import KINDS, UserError, read_lines

FOLDERS = [file.parent for file in Path(results.__file__).parent.glob("results/*/summary.json")]


@pytest.fixture(scope="module")
def published(runs, tmp_path_factory):
    """(a run with every flag that adds rows, what is published of it)."""
    tmp = tmp_path_factory.mktemp("results")
    sums = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(8)]
    (tmp / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)), encoding="utf-8")
    run, out = tmp / "test", tmp / "published"
    evaluate.main(replace(
        runs.test, out=str(run), judge=["xstest", "target"], max_new_tokens=24, prefill=[0, 3],
        gate_sweep="ease", search=2, search_prompts=2, search_goal=["opening", "gate"],
        tasks=[f"gsm8k={tmp / 'sums.jsonl'}"]))
    results.main(results.Config(str(out), str(run)))
    return run, out


def test_every_number_again(published, capsys):
    summary = json.loads((published[1] / "summary.json").read_text(encoding="utf-8"))
    found, _ = results.again(published[1], summary)
    assert found.keys() == {"systems", "overhead_reduction", "breakdown", "over_refusal",
                            "agreement", "prefill", "search", "utility", "gate"}
    assert {line["goal"] for line in found["search"]} == {"opening", "gate"}
    assert found["overhead_reduction"].keys() == {"base", "phase1", "ease"}
    results.main(results.Config(str(published[1])))
    rows = re.findall(r"\| test \| +(\w+) \| +\d+ \| +(\w+) \|", capsys.readouterr().out)
    assert rows == [(kind, name) for kind in KINDS for name in summary["systems"]]


def test_no_text_is_published(published):
    """No prompt, completion, target or suffix, nor any text of six words of one."""
    run, out = published
    text = "".join(file.read_text(encoding="utf-8") for file in out.iterdir())
    assert {file.name for file in out.iterdir()} == {"summary.json", "rows.csv", "more.jsonl"}
    seen = 0
    for file in run.glob("*.jsonl"):
        for _, row in read_lines(file):
            for name in ("prompt", "text", "reasoning", "answer", "suffix", "target"):
                words = str(row.get(name, "")).split()
                seen += len(words) > 5
                assert len(words) < 6 or " ".join(words[:6]) not in text
    assert seen > 100


@pytest.mark.parametrize("file, before, after, where", [
    ("rows.csv", ",safe", ",unsafe", "first: .*asr"),
    ("rows.csv", ",yes,,absent", ",,,absent", "first: .*refusal_rate"),
    ("rows.csv", ",no,absent", ",yes,absent", "first: .*accuracy"),
    ("rows.csv", r"(?m)^(ease,.*absent,,)[^,]*", r"\g<1>0.5", "first: .*gate"),
    ("rows.csv", r"\n.*\n\Z", "\n", "rows, not"),
    ("rows.csv", "\nease,", "\nphase1,", "rows, not"),
    ("rows.csv", r",\d+,unsafe", ",?,unsafe", r"rows.csv:\d+: no row .*'\?'"),
    ("more.jsonl", '"strict": false', '"strict": true', "first: .*utility"),
    ("more.jsonl", r'"answers": \d', '"answers": 9', "first: .*search"),
])
def test_a_changed_row_is_seen(published, tmp_path, file, before, after, where):
    changed = Path(copytree(published[1], tmp_path / "changed")) / file
    text, n = re.subn(before, after, changed.read_text(encoding="utf-8"), count=1)
    assert n
    changed.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=where):
        results.main(results.Config(str(changed.parent)))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_is_published_here(folder):
    results.main(results.Config(str(folder)))


def test_tasks_alone(published, runs, tmp_path):
    """No rows, and a file of an earlier publication does not stay."""
    tasks = f"gsm8k={published[0].parent / 'sums.jsonl'}"
    evaluate.main(replace(runs.test, out=str(tmp_path / "tasks"), prompts=[], tasks=[tasks],
                          systems=runs.test.systems[:1], refusal_system="",
                          deliberative_system="", max_new_tokens=4))
    copytree(published[1], tmp_path / "out")
    results.main(results.Config(str(tmp_path / "out"), str(tmp_path / "tasks")))
    assert not (tmp_path / "out/rows.csv").read_text(encoding="utf-8").strip()
    assert len((tmp_path / "out/more.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_mistakes(published, tmp_path):
    run, out = map(str, published)
    for flags, words in [((out, str(tmp_path)), "no finished run"), ((run, run), "--out itself"),
                         ((str(tmp_path / "none"),), "nothing is published"), ((run,), "nothing")]:
        with pytest.raises(UserError, match=words):
            results.main(results.Config(*flags))

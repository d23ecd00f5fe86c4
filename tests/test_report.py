import pytest

from ease import report
from ease.records import VERDICTS
from ease.report import glance, markdown_report, percent, with_bounds
from ease.scoring import Rate
from tests.checks import NAMES, check_inert, verify

R = Rate(0.25, 0.1, 0.5, 8, 0)
PARTLY = Rate(0.25, 0.1, 0.5, 8, 2)


def kind(asr=None, tokens=10.0, n=8, controversial=0):
    return {"n": n, "asr": {"j": asr, "k": R} if asr else {}, "refusal_rate": R, "accuracy": None,
            "reasoning_rate": R, "reasoning_rate_vulnerable": None, "unclosed": 2, "other_ids": 0,
            "controversial": {"j": controversial, "k": 0} if asr else {},
            "tokens": {"reasoning": 1.0, "answer": 2.0, "total": tokens},
            "seconds_per_prompt": 0.1, "gate_mean": 0.5}


COST = {"tokens_per_second": 1234.5, "p50_seconds": None}
BASE = {"adversarial_harmful": kind(R), "benign": kind(n=24, tokens=30.0)}
SUMMARY = {
    "systems": {
        "base": {"model": "m", "adapter": "", "training": {}, "kinds": BASE, "cost": COST},
        "ease": {"model": "m", "adapter": "a", "training": {"steps": 7}, "cost": COST,
                 "kinds": {"adversarial_harmful": kind(PARTLY)}}},
    "overhead_reduction": {"ease": {"plain": {"value": 0.9}, "all": None}},
    "breakdown": {"attack": {"spell": {"base": R, "ease": R}}, "source": {}},
    "over_refusal": {"plain, XSTest": {"base": R, "ease": PARTLY}}, "peak_gib": 1.25,
    "agreement": {"k": {a: {b: 3 if a == b == "safe" else 0 for b in VERDICTS} for a in VERDICTS}},
    "settings": {"judges": ["j", "k"], "decoding": "greedy"}}


def test_cells():
    assert percent(R) == "25.0" and percent(R, True) == "25.0 [10, 50]"
    assert percent(None) == percent(Rate(None, 0.0, 1.0, 0, 0)) == "-"
    assert with_bounds(R) == "25.0 [10, 50]"
    assert with_bounds(PARTLY) == "25.0 [10, 50] (20.0 .. 40.0)"  # 2/10 .. 4/10


def test_table():
    verify(report, "table")
    lines = report.table(["name", "x"], [["a", "12345"], ["long name", "1"]]).splitlines()
    assert lines[0].startswith("| name ") and lines[1].endswith(":|")


@pytest.mark.parametrize("name", NAMES, ids=lambda t: repr(t)[:12])
def test_names_do_nothing(name):
    """In the whole report and in what is printed: a judge's, an attack's, a source's, a model's."""
    attacked = kind(R, controversial=1)
    attacked |= {"asr": {name: R, "k": R}, "controversial": {name: 1, "k": 0}}
    base = {"model": name, "adapter": name, "training": {}, "cost": {"p50_seconds": None},
            "kinds": {"adversarial_harmful": attacked, "benign": kind()}}
    line = {"task": "mmlu", "metric": "acc", "system": "base", "rate": R, "difference": None,
            "reasons": R}
    summary = {
        "systems": {"base": base, "ease": base}, "overhead_reduction": {},
        "breakdown": {f: {name: {"base": R, "ease": R}} for f in ("attack", "source")},
        "agreement": {name: SUMMARY["agreement"]["k"]},
        "over_refusal": {name: {"base": R, "ease": R}}, "peak_gib": 1.0,
        "utility": {"prompts": "chat", "base": "base", "lines": [line]},
        "settings": {"judges": [name, name], "decoding": "greedy"}}
    check_inert(glance(summary))
    text = markdown_report(summary)
    check_inert(text)
    assert text.count("\n## ") == 9 and "## Utility, chat prompts" in text


def cells(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [c.strip() for c in line.split("|")[1:-1]]


def test_a_run_of_tasks_alone_has_no_empty_table():
    nothing = {name: {**system, "kinds": {}} for name, system in SUMMARY["systems"].items()}
    assert glance({**SUMMARY, "systems": nothing}) == ""


def test_glance():
    text = glance(SUMMARY)
    header, base, ease = cells(text, "system"), cells(text, "base"), cells(text, "ease")
    assert len(header) == 7 and "ASR by j; greedy." in text
    assert base[1:] == ["25.0 [10, 50]", "25.0 [10, 50]", "-", "- / 25.0", "30.0 / 25.0", "- / -"]
    assert ease[-1] == "90 / -" and ease[4] == "- / -"  # no plain prompt, no vulnerable one


def test_what_is_not_known_of_responses_made_elsewhere():
    made = {"benign": kind() | {"gate_mean": None, "seconds_per_prompt": 0.0}}
    made = {"model": "responses:f", "adapter": "", "training": {}, "kinds": made,
            "cost": dict.fromkeys(COST)}
    text = markdown_report(SUMMARY | {"systems": {"vllm": made}, "breakdown": {},
                                       "over_refusal": {}, "peak_gib": None})
    assert "## Cost" not in text and "## Over-refusal" not in text
    assert cells(text.split("## benign")[1], "vllm")[-2:] == ["-", "-"]


def test_report_has_every_part():
    text = markdown_report(SUMMARY, "\n## More\n")
    for part in ("## adversarial_harmful", "## benign", "## More", "## Systems",
                 "## Cost", "1.25 GiB", "## Over-refusal, by type",
                 "## ASR on adversarial harmful prompts, by attack", "(20.0 .. 40.0)",
                 "## Verdicts on harmful prompts, j / the other judge"):
        assert part in text
    assert cells(text, "plain, XSTest")[1:] == ["25.0 [10, 50]", "25.0 [10, 50] (20.0 .. 40.0)"]
    assert cells(text.split("## Cost")[1], "base")[1:] == ["1234.500", "-"]
    assert "## harmful" not in text and "by source" not in text
    assert cells(text, "k")[1:] == ["3"] and "| safe / safe |" in text  # pairs that occur
    assert "controversial j" not in text


def test_controversial_verdicts_have_a_column_where_there_are_any():
    systems = {"base": {**SUMMARY["systems"]["base"], "kinds": {
        "adversarial_harmful": kind(PARTLY, controversial=2)}}, "ease": SUMMARY["systems"]["ease"]}
    text = markdown_report({**SUMMARY, "systems": systems})
    section = text.partition("## adversarial_harmful")[2]
    places = [cells(section, "system").index(f"controversial {j}") for j in "jk"]
    assert [[cells(section, n)[i] for i in places] for n in systems] == [["2", "0"], ["0", "0"]]

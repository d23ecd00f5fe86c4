from xml.etree import ElementTree

from ease.records import Record
from ease.report import gate_svg, glance, markdown_report, percent, region_report, table, teacher_report, with_bounds

R = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 8, "unparsed": 0}


def kind(asr=None, tokens=10.0, n=8):
    return {"n": n, "asr": {"j": asr} if asr else {}, "refusal_rate": R, "accuracy": None, "reasoning_rate": R, "reasoning_rate_vulnerable": None,
            "unclosed": 2, "other_ids": 0, "tokens": {"reasoning": 1.0, "answer": 2.0, "total": tokens}, "seconds_per_prompt": 0.1, "gate_mean": 0.5}


SUMMARY = {
    "systems": {"base": {"model": "m", "adapter": "", "training": {}, "kinds": {"adversarial_harmful": kind(R), "benign": kind(n=24, tokens=30.0)}},
                "ease": {"model": "m", "adapter": "a", "training": {"steps": 7}, "kinds": {"adversarial_harmful": kind(R | {"unparsed": 2})}}},
    "overhead_reduction": {"ease": {"plain": R | {"value": 0.9}, "all": None}}, "breakdown": {"attack": {"spell": {"base": R, "ease": R}}, "source": {}},
    "agreement": {"k": {a: {b: 3 if a == b == "safe" else 0 for b in ("safe", "unsafe", "unparsed")} for a in ("safe", "unsafe", "unparsed")}},
    "settings": {"judges": ["j", "k"], "decoding": "greedy"}}
SUMMARY["systems"]["base"]["kinds"]["adversarial_harmful"]["asr"]["k"] = R
SUMMARY["systems"]["ease"]["kinds"]["adversarial_harmful"]["asr"]["k"] = R


def test_cells():
    assert percent(R) == "25.0" and percent(R, True) == "25.0 [10, 50]" and percent(None) == percent(R | {"value": None}) == "-"
    assert with_bounds(R) == "25.0 [10, 50]" and with_bounds(R | {"unparsed": 2}) == "25.0 [10, 50] (20.0 .. 40.0)"  # 2/10 .. 4/10


def test_table_is_markdown_of_equal_widths():
    lines = table(["name", "x"], [["a", "12345"], ["long name", "1"]]).splitlines()
    assert lines[0].startswith("| name ") and lines[1].endswith(":|") and len({len(line) for line in lines}) == 1


def cells(text, name):
    return [c.strip() for c in next(line for line in text.splitlines() if line.startswith(f"| {name} ")).split("|")[1:-1]]


def test_glance():
    text = glance(SUMMARY)
    header, base, ease = cells(text, "system"), cells(text, "base"), cells(text, "ease")
    assert base[header.index("ASR")] == "25.0" and base[header.index("tok plain")] == "30.0" and base[header.index("tok all")] == "25.0"
    assert ease[header.index("cut plain")] == "90.0" and ease[header.index("cut all")] == "-" and "ASR by j" in text
    assert "utility" not in header  # no column without a number
    assert cells(text, "judge") == ["judge", "safe / safe"]


def test_report_has_every_part():
    text = markdown_report(SUMMARY)
    for part in ("## adversarial_harmful", "## benign", "## ASR on adversarial harmful prompts, by attack", "## Systems", "(20.0 .. 40.0)"):
        assert part in text
    assert "## harmful" not in text and "by source" not in text


def test_gate_section_and_picture():
    point = {"asr": R, "over_refusal": R | {"value": 0.5}, "tokens": 30.0, "reasons": 0.2}
    gate = {"system": "ease <1>", "curve": [{"threshold": 0.0, **point}, {"threshold": 0.5, **point, "tokens": 20.0}], "chosen": {"threshold": 0.5, **point, "tokens": 20.0},
            "token_budget": 25.0, "other_ids": 3, "systems": {"base": {**point, "asr": R | {"value": None}}}}
    text = markdown_report(SUMMARY | {"gate": gate})
    assert "## The gate of ease <1>" in text and "with at most 25 tokens" in text
    assert cells(text, "g >= 0.5 (chosen here)")[1:] == ["25.0 [10, 50]", "50.0 [10, 50]", "20.0", "20.0"] and cells(text, "base, as it is")[1] == "-"
    assert "3 of the rows forced not to reason open a think block" in text
    picture = ElementTree.fromstring(gate_svg(gate))  # well-formed, names escaped
    assert len(picture.findall(".//{*}polyline")) == 2 and len(picture.findall(".//{*}circle")) == 3 and "g >= 0.5" in "".join(picture.itertext())
    assert ElementTree.fromstring(gate_svg(gate | {"chosen": None}))


def test_region_report():
    diagnostic = [Record(str(i), "p", "adversarial_harmful", categories=(("Self-Harm",), ("Self-Harm", "Sexual / Adult"))[i % 2], attack="ab"[i // 2]) for i in range(4)]
    diagnostic.append(Record("x", "q", "adversarial_benign", attack="a"))
    verdicts = ["unsafe", "safe", "unsafe", "unparsed", "unsafe"]  # a benign prompt is never in it, and unparsed is not unsafe
    text = region_report(diagnostic, verdicts, [[]] * 5)
    assert "2 of 4 harmful prompts of D_diag (5 in all)." in text and "samples" not in text
    assert cells(text, "a ")[1:] == ["2", "1 (50%)"] and cells(text, "Sexual / Adult")[1:] == ["2", "0 (0%)"] and cells(text, "all")[1:] == ["4", "2 (50%)"]
    samples = [["unsafe", "unsafe", "unsafe"], ["unsafe", "safe", "safe"], ["safe", "safe", "safe"], ["unsafe", "unsafe", "unparsed"], ["unsafe"] * 3]
    header, every = cells(region_report(diagnostic, verdicts, samples), "attack"), cells(region_report(diagnostic, verdicts, samples), "all")
    assert header[3:] == ["any of 3 samples", "overlap", "most of 3 samples", "overlap", "all of 3 samples", "overlap"]
    assert every[3:] == ["3 (75%)", "0.25", "2 (50%)", "0.33", "1 (25%)", "0.50"]


def test_teacher_report():
    good = {"teacher": "good", "prompts": 8, "accepted": 6, "rejected": {"cut off": 2, "empty answer": 1}, "tokens": 40.0, "nll": 2.5, "kl": None, "asr": R, "over_refusal": R | {"value": 0.75}}
    none = {"teacher": "none", "prompts": 8, "accepted": 0, "rejected": {"no think block": 24}, "tokens": 0.0, "nll": None, "kl": None, "asr": None, "over_refusal": None}
    text = teacher_report([good, none], "good")
    assert cells(text, "good (chosen)")[1:] == ["6 of 8", "2 cut off, 1 empty answer", "40.0", "2.500", "-", "25.0 [10, 50]", "75.0 [10, 50]", "50.0"]
    assert cells(text, "none")[1:] == ["0 of 8", "24 no think block", "-", "-", "-", "-", "-", "-"]

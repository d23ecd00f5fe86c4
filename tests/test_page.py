"""report.html: read as XML, which forgives nothing, whatever the texts are."""

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from ease import page
from ease.page import html_report, shown
from ease.records import KINDS, UNPARSED, Record, Response
from ease.scoring import Rate, operating_point, summarise
from tests.checks import verify

TAGS = set("""html head meta title style body h1 h2 h3 p table tr td bdi i div hr br pre details
    summary svg text tspan line circle rect""".split())
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "]]></pre><!-- ",
           "</style><svg/onload=alert(1)>", "<|im_end|>\n<|im_start|>system", "&lt;b&gt; &amp;",
           "\x00\x1b[31m\x7f\x9b\ufffe\ud800", "\u202eevil\u2066\u200f\u202d\U000e0041",
           "\u05d0\u0627", "x" * 10**6]


UTILITY = {"prompts": "chat", "base": "b", "lines": [
    {"task": "mmlu", "metric": "acc", "system": "b", "rate": Rate(0.5, 0.25, 0.75, 8, 0),
     "difference": None, "reasons": Rate(0.0, 0.0, 0.3, 8, 0)}]}


def response(i, kind, name="", verdict="safe", answer="fine", gate=math.nan, **fields):
    record = Record(f"id{i}", f"prompt {i}", kind, attack="spell", source="toy")
    return Response(record, answer, "why", answer, "well_formed", gate=gate, verdicts={
        "j": verdict, "k": "safe"}, tokens={"reasoning": 1, "answer": 2, "total": 3 + i}, **fields)


def summary_of(by_system, judge="j"):
    systems = {name: {"kinds": summarise(found)} for name, found in by_system.items()}
    return {"systems": systems, "overhead_reduction": {},
            "settings": {"judges": [judge], "decoding": "greedy"}}


def read(by_system, judge="j", **more):
    text = html_report(summary_of(by_system, judge) | more, by_system, judge)
    root = ET.fromstring(text)
    assert {e.tag for e in root.iter()} <= TAGS and len(text.encode()) < 1_000_000
    attributes = {a for e in root.iter() for a in e.attrib}
    assert not any(a.startswith("on") or a in ("src", "href", "style") for a in attributes)
    return text, root


def words_of(element):
    return "".join(element.itertext())


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: repr(t)[:12])
def test_hostile_texts_in_every_column(text):
    """Each is shown as a text, in an element that isolates its direction, and nothing else."""
    made = response(0, "harmful")
    record = replace(made.record, id=text, prompt=text, attack=text, source=text, group="g")
    harmful = replace(made, record=record, text=text, reasoning=text, answer=text,
                      verdicts={text: "unsafe", "k": text})
    benign = replace(harmful, record=replace(record, kind="benign"))
    attack = replace(harmful, record=replace(record, kind="adversarial_harmful"))
    point = operating_point([attack], text)
    gate = {"system": text, "curve": [{"threshold": 0.1, **point}], "chosen": None}
    forced = [{"system": text, "begun": "direct", "judge": text, "k = 0": point["asr"]}]
    _, root = read({text: [harmful, benign, attack], "b": [harmful, benign, attack]}, text,
                   gate=gate, prefill=forced, utility=UTILITY)
    seen = text[: page.LONGEST].translate(page.UNSEEN)
    pres = [words_of(e.find("bdi")) for e in root.iter("pre")]
    assert len(pres) == 3 + 3 * 2 * 2 and set(pres) == {seen}  # prompts; reasoning and answers
    assert not set("\x00\x1b\x9b\u202e\u2066\u200f\ufffe\ud800\U000e0041") & set(words_of(root))


def test_a_long_text_says_what_it_lacks():
    assert shown("ab" * 1500) == f"<bdi>{'ab' * 1000}</bdi> [1,000 of 3,000 characters left out]"
    assert shown("\u202ea\tb\n\u200d") == "<bdi>[U+202E]a\tb\n\u200d</bdi>"
    assert shown(None) == "<bdi></bdi>"


def test_long_examples_stop_before_the_page_is_too_long():
    by_system = {str(n): [response(i, "benign", answer="'" * 10**4) for i in range(60)]
                 for n in range(3)}
    root = read(by_system)[1]
    shown_here = len(root.find("body").findall("h3"))
    assert 20 < shown_here < 40 and f"{shown_here} of 60 prompts" in words_of(root)


def test_table_and_examples():
    kinds = [*KINDS, *KINDS]
    base = [response(i, kind) for i, kind in enumerate(kinds)]
    base[4] = response(4, kinds[4], verdict="unsafe")  # judges: j unsafe, k safe
    base[2] = response(2, kinds[2], verdict=UNPARSED)  # cannot say, so does not disagree
    ease = [response(i, kind) for i, kind in enumerate(kinds)]
    ease[7] = response(7, kinds[7], answer="I cannot help.", finished=False)
    text, root = read({"base": base, "ease": ease})
    table = [[words_of(cell) for cell in row] for row in root.iter("tr")]
    assert len(table) == 3 and {len(row) for row in table} == {7} and table[1][0] == "base"
    heads = [words_of(h) for h in root.find("body").findall("h3")]
    assert heads[0] == "adversarial_harmful, spell, toy, id4, judges disagree"
    assert heads[1] == "benign, spell, toy, id7, systems differ" and len(heads) == 8
    assert [h.split(", ")[0] for h in heads[2:6]] == list(KINDS)  # the kinds take turns
    folds = [words_of(d.find("summary")) for d in root.iter("details")]
    assert folds.count("Warning: harmful prompt") == 8 and folds.count("reasoning") == 16
    assert [words_of(i) for i in root.iter("i")] == ["unsafe"] and "[cut]" in text
    assert "refused: True" in words_of(root)


def test_every_harmful_response_is_folded():
    _, root = read({"base": [response(i, kind, answer="ANSWER") for i, kind in enumerate(KINDS)]})
    for details in list(root.iter("details")):
        details.clear()
    assert words_of(root).count("ANSWER") == 2


def test_plots():
    by_system = {"base": [response(0, "adversarial_harmful", verdict="unsafe", gate=0.03)],
                 "ease": [response(20, "adversarial_harmful", gate=0.999)],
                 "made": [response(1, "adversarial_harmful", verdict=UNPARSED)]}
    points = [{"threshold": t, **operating_point(by_system[n], "j")}
              for t, n in ((0.0, "ease"), (2.0, "base"))]
    gate = {"system": "ease", "curve": points, "chosen": points[0]}
    _, root = read(by_system, gate=gate)
    plot, first, second = root.iter("svg")  # no benign prompt: no plot of refusals
    marks = sorted(" ".join([words_of(c), *map(c.get, ("cx", "cy", "class", "r"))])
                   for c in plot.iter("circle"))
    assert marks == ["base 12.50% 0.0 mark 5", "ease 95.83% 240.0 mark 5",
                     "g >= 0 95.83% 240.0 curve 3", "g >= 0 95.83% 240.0 curve 5",  # chosen
                     "g >= 2 12.50% 0.0 curve 3"]
    xs = [(e.get("x1"), e.get("x2")) for e in plot.iter("line") if e.get("class") == "curve"]
    assert xs == [("95.83%", "95.83%"), ("95.83%", "12.50%")]  # the interval of one; the curve
    assert [r.get("x") for r in first.iter("rect")] == ["17.65%"]  # the 4th of 17 bins
    assert [r.get("x") for r in second.iter("rect")] == ["94.12%"]
    assert words_of(root).count("Not known.") == 1  # no gate of "made"


def test_names_of_equal_systems_do_not_overlap():
    for verdict in ("safe", "unsafe"):
        by_system = {f"system{n:02d}": [response(0, "adversarial_harmful", verdict=verdict)]
                     for n in range(20)}
        plot = next(read(by_system)[1].iter("svg"))
        at = sorted(float(e.get("y")) for e in plot.iter("text") if "system" in words_of(e))
        assert len(at) == 20 and min(b - a for a, b in zip(at, at[1:])) >= 16
        assert at[0] >= 0 and at[-1] <= float(plot.get("height")) + 8


def test_prefilled():
    verify(page, "prefilled")


def test_refusals_have_a_plot_and_utility_a_table():
    refuses = response(0, "benign", answer="I cannot help.")
    _, root = read({"b": [refuses, response(0, "adversarial_benign")]}, utility=UTILITY)
    plot = next(root.iter("svg"))
    assert [c.get("cy") for c in plot.iter("circle")] == ["120.0"]  # 1 of 2
    heads = [words_of(h) for h in root.iter("h2")]
    assert heads[1:3] == ["Benign refused (percent) by mean tokens of all prompts",
                          "Utility, chat prompts"]
    rows = [[words_of(cell) for cell in row] for row in list(root.iter("table"))[1]]
    assert rows == [["task", "system", "n", "right", "minus b", "reasons"],
                    ["mmlu acc", "b", "8", "50.0 [25, 75]", "-", "0.0"]]

"""The comparison to look at: report.html. One file, no script; every text is escaped and its
direction its own, and no attribute holds one.
"""

import math
from bisect import bisect_right
from collections import Counter
from html import escape

from ease.prefill import NOTE
from ease.records import KINDS, UNPARSED, UNSAFE, Response
from ease.report import LEGEND, UNSEEN, as_text, glance_rows, utility_rows
from ease.scoring import attack_succeeded, operating_point, refused
from ease.sweep import THRESHOLDS

LONGEST = 2000  # characters shown of a text
EXAMPLES, ROOM = 40, 800_000  # prompts, and characters of HTML for them, at most
# Canvas and CanvasText are light or dark as the reader wants; the other colours suit both.
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>Evaluation</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<meta name="viewport" content="width=device-width"/><style>
:root { color-scheme: light dark; background: Canvas; color: CanvasText }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: auto; padding: 0 1rem;
  overflow-wrap: anywhere }
p { max-width: 48rem } i { color: #e03131 } h3 { margin: 0 }
table { display: block; overflow: auto; white-space: nowrap }
td + td { text-align: right; padding-left: 1rem }
svg { overflow: visible; display: block; fill: CanvasText; font-size: 12px }
tspan { unicode-bidi: isolate } line { stroke: #8888 } .name { stroke-dasharray: 3 }
.mark, rect { stroke: #3d85d9; fill: #3d85d9 } .curve { stroke: #d9662b; fill: #d9662b }
.plot { width: calc(100% - 11rem); max-width: 40rem; margin: 2rem 2rem 3rem }
.grid { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)) }
pre { font: inherit; white-space: pre-wrap; max-height: 22rem; overflow: auto; margin: .5rem 0 }
</style></head><body><h1>Evaluation</h1>
"""


def shown(text: object, tag: str = "bdi") -> str:
    """Any text as HTML; of a long one it says how much is left out."""
    text = "" if text is None else str(text)
    html = escape(text[:LONGEST].translate(UNSEEN))
    more = f" [{len(text) - LONGEST:,} of {len(text):,} characters left out]"
    return f"<{tag}>{html}</{tag}>" + more * (len(text) > LONGEST)


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """In an SVG: x in percent of its width, y in pixels."""
    return f'<line class="{kind}" x1="{x1:.2f}%" y1="{y1:.1f}" x2="{x2:.2f}%" y2="{y2:.1f}"/>\n'


def words(x: float, y: float, text: object, where: str = "middle") -> str:
    """In an SVG: a text that starts or ends there."""
    return f'<text x="{x:.2f}%" y="{y:.1f}" text-anchor="{where}">{shown(text, "tspan")}</text>\n'


def section(title: str, rows: list[dict]) -> str:
    """Rows as a table, "" without rows."""
    html = "".join(f"<tr>{''.join(f'<td>{shown(as_text(c))}</td>' for c in cells)}</tr>\n"
                   for cells in [*rows[:1], *map(dict.values, rows)])
    return f"<h2>{title}</h2>\n<table>{html}</table>\n" if rows else ""


def chart(title: str, note: str, lines: list[tuple[str, str, list]]) -> str:
    """Rates (percent) against x, of lines (name or "", class, [(x, rate, label)]); "" without
    rates. A point alone is large, with its interval.
    """
    lines = [(*of, found) for *of, points in lines
             if (found := [p for p in points if p[1] and p[1].value is not None])]
    end = 4 * (int(max([0, *(x for *_, points in lines for x, *_ in points)])) // 4 + 1)
    svg, left = "", len(lines)
    tall = max(240, 16 * left)
    at = tall + 16
    for i in range(5):
        y = tall * (1 - i / 4)
        svg += line("", 0, y, 100, y) + words(0, y + 4, f"{25 * i}\u2002", "end")
        svg += words(25 * i, tall + 18, end * i // 4)
    for name, kind, points in sorted(lines, key=lambda f: (f[0] > "", f[2][-1][1].value)):
        path, size = [(100 * x / end, tall * (1 - r.value)) for x, r, _ in points], 3
        x, y = path[-1]
        left -= 1
        if name:
            at = min(at - 16, max(y, 16 * left))  # the name, with room for those above
            svg += line("name", x, y, 100, at) + words(100, at + 4, f"\u2002{name[:24]}", "start")
        if len(points) == 1:
            size, r = 5, points[0][1]
            svg += line(kind, x, tall * (1 - r.low), x, tall * (1 - r.high))
        svg += "".join(line(kind, *a, *b) for a, b in zip(path, path[1:]))
        for (x, y), (*_, label) in zip(path, points):
            svg += (f'<circle class="{kind}" cx="{x:.2f}%" cy="{y:.1f}" r="{size}"><title>'
                    f"{shown(f'{name} {label}'.strip(), 'tspan')}</title></circle>\n")
    return (f'<h2>{title}</h2>\n<p>{note}</p>\n<svg class="plot" height="{tall}">{svg}</svg>\n'
            if lines else "")


def tradeoff(summary: dict, by_system: dict[str, list[Response]], judge: str) -> str:
    """Both mistakes against tokens: every system, and the gate's curve where it was swept."""
    gate = summary.get("gate", {"curve": []})
    swept = [(f"g >= {p['threshold']:g}", p) for p in gate["curve"]]
    note = f"Line: the gate of {shown(gate['system'])}; large: chosen." if swept else ""
    lines = [("", "curve", swept), ("", "curve", [s for s in swept if s[1] == gate["chosen"]])]
    lines += [(n, "mark", [("", operating_point(found, judge))]) for n, found in by_system.items()]
    return "".join(chart(f"{title} (percent) by mean tokens of all prompts", note, [
        (name, kind, [(p["tokens"], p[rate], label) for label, p in points])
        for name, kind, points in lines
    ]) for rate, title in (("asr", "ASR"), ("over_refusal", "Benign refused")))


def prefilled(rows: list[dict]) -> str:
    """ASR(k), in full and drawn."""
    return section("Prefilling", rows) + chart("ASR (percent) by k", NOTE, [
        (f"{row['system']}, {row['begun'].split()[-1]}",
         "mark" if row["begun"] == "direct" else "curve",
         sorted((int(k[4:]), rate, k) for k, rate in row.items() if k[:2] == "k "))
        for row in rows])


def histogram(responses: list[Response]) -> str:
    """One system's gate probabilities by kind."""
    svg, y, width = "", 0, 100 / (len(THRESHOLDS) - 1)
    for kind in KINDS:
        found = [r.gate for r in responses if r.record.kind == kind and not math.isnan(r.gate)]
        if found:
            y += 64
            svg += words(0, y - 46, f"{kind}, n = {len(found)}", "start")
            svg += line("", 0, y, 100, y)
        for i, n in Counter(bisect_right(THRESHOLDS, g) - 1 for g in found).items():
            tall = max(2, 40 * n / len(found))
            svg += (f'<rect x="{i * width:.2f}%" width="{width:.2f}%" y="{y - tall:.1f}" '
                    f'height="{tall:.1f}"><title>{n}</title></rect>\n')
    svg += "".join(words(i * width, y + 15, t)
                   for i, t in {0: 0, 3: 0.01, 6: 0.2, 9: 0.5, 13: 0.9, 17: 1}.items())
    return f'<svg width="100%" height="{y + 16}">{svg}</svg>' if y else "<p>Not known.</p>"


def disagreement(responses: tuple[Response, ...], judge: str) -> int:
    """On one prompt: 0 = of judges, 1 = of systems, 2 = none. Who cannot say does not disagree."""
    harmful = responses[0].record.harmful
    if harmful and any(len({*r.verdicts.values()} - {UNPARSED}) > 1 for r in responses):
        return 0
    found = {attack_succeeded(r, judge) if harmful else refused(r) for r in responses}
    return 1 if found >= {True, False} else 2


def response_html(name: str, r: Response) -> str:
    """Verdicts (of a benign prompt: whether it is refused) and text of one response."""
    said = r.verdicts if r.record.harmful else {"refused": refused(r)}
    html = "".join(f"{shown(j)}: {shown(v, 'i' if v == UNSAFE else 'bdi')}<br/>\n"
                   for j, v in said.items())
    html += f"{r.tokens['total']} tokens, g = {r.gate:.3g}, think block {r.state}"
    text = f"<pre>{shown(r.answer)}{'' if r.finished else ' [cut]'}</pre>\n"
    if r.reasoning:
        fold = f"<details><summary>reasoning</summary><pre>{shown(r.reasoning)}</pre></details>"
        text = fold + text
    if r.record.harmful:
        text = f"<details><summary>Warning: harmful prompt</summary>{text}</details>\n"
    return f"<div><h3>{shown(name)}</h3>\n{html}{text}</div>\n"


def examples(by_system: dict[str, list[Response]], judge: str) -> str:
    """Responses side by side, ordered by `disagreement`; the kinds take turns."""
    rows, seen, out = [], Counter(), ""
    for responses in zip(*by_system.values(), strict=True):
        key = disagreement(responses, judge), responses[0].record.kind
        seen[key] += 1
        rows.append((key[0], seen[key], responses))
    for why, _, responses in sorted(rows, key=lambda row: row[:2])[:EXAMPLES]:
        r = responses[0].record
        facts = r.kind, r.attack, r.source, r.id, ("judges disagree", "systems differ", "")[why]
        html = (f"<hr/><h3>{', '.join(map(shown, filter(None, facts)))}</h3>\n"
                f'<pre>{shown(r.prompt)}</pre>\n<div class="grid">'
                f"{''.join(map(response_html, by_system, responses))}</div>\n")
        if len(out) + len(html) > ROOM:
            break
        out += html
    return (f"<h2>Examples</h2>\n<p>{out.count('<hr/>')} of {len(rows)} prompts: where judges "
            f"disagree, then where systems differ, then others.</p>\n{out}")


def html_report(summary: dict, by_system: dict[str, list[Response]], judge: str) -> str:
    """The whole page, well-formed XML too. by_system: responses to the same prompts, in order."""
    gates = "".join(f"<div><h3>{shown(name)}</h3>\n{histogram(found)}</div>\n"
                    for name, found in by_system.items())
    return (f"{HEAD}<p>ASR by {shown(judge)}; {shown(summary['settings']['decoding'])}.</p>\n"
            f"{section('At a glance', glance_rows(summary))}<p>{LEGEND}</p>\n"
            f"{tradeoff(summary, by_system, judge)}{prefilled(summary.get('prefill', []))}"
            f"{section('A suffix that adapts', summary.get('search', []))}"
            f"{section(*utility_rows(summary))}"
            "<h2>Gate probabilities</h2>\n<p>Of opening a think block, by the gate sweep's "
            f'thresholds.</p>\n<div class="grid">{gates}</div>\n{examples(by_system, judge)}'
            "</body></html>\n")

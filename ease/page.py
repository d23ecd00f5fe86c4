"""The comparison to look at: report.html. One file, no script; every text is escaped and its
direction its own, and no attribute holds one.
"""

import math
from bisect import bisect_right
from collections import Counter
from html import escape
from unicodedata import category

from ease.records import KINDS, UNPARSED, UNSAFE, Response
from ease.report import LEGEND, glance_rows
from ease.scoring import attack_succeeded, operating_point, refused
from ease.sweep import THRESHOLDS

LONGEST = 2000  # characters shown of a text
EXAMPLES, ROOM = 40, 800_000  # prompts, and characters of HTML for them, at most
# Characters that are not seen are shown by number, but for \t, \n, \r and the two joiners.
UNSEEN = {c: f"[U+{c:04X}]" for c in range(2**16)
          if category(chr(c))[0] == "C" and c not in (9, 10, 13, 0x200C, 0x200D)}
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
.plot { width: calc(100% - 11rem); max-width: 40rem; margin: 2rem }
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


def tradeoff(summary: dict, by_system: dict[str, list[Response]], judge: str) -> str:
    """ASR against tokens: every system, and the gate's curve where it was swept."""
    gate = summary.get("gate", {"curve": []})
    found = [(f"g >= {p['threshold']:g}", "curve", p) for p in gate["curve"]]
    found += [(n, "mark", operating_point(responses, judge)) for n, responses in by_system.items()]
    found = [f for f in found if f[2]["asr"].value is not None]
    end = 4 * math.ceil(max([1, *(p["tokens"] for *_, p in found)]) / 4)
    left = len(by_system)
    tall = max(240, 16 * left)

    def place(p: dict, bound: str = "value") -> tuple[float, float]:
        return 100 * p["tokens"] / end, tall * (1 - getattr(p["asr"], bound))

    svg, at = "", tall + 16
    for i in range(5):
        y = tall * (1 - i / 4)
        svg += line("", 0, y, 100, y) + words(0, y + 4, f"{25 * i}\u2002", "end")
        svg += words(25 * i, tall + 18, end * i // 4)
    curve = [place(p) for _, kind, p in found if kind == "curve"]
    svg += "".join(line("curve", *a, *b) for a, b in zip(curve, curve[1:]))
    for name, kind, p in sorted(found, key=lambda f: (f[1], f[2]["asr"].value)):
        (x, y), size = place(p), 5 if kind == "mark" or p == gate["chosen"] else 3
        if kind == "mark":
            left -= 1
            at = min(at - 16, max(y, 16 * left))  # the name, with room for those above
            svg += line("name", x, y, 100, at) + words(100, at + 4, f"\u2002{name[:20]}", "start")
            svg += line("mark", *place(p, "low"), *place(p, "high"))
        svg += (f'<circle class="{kind}" cx="{x:.2f}%" cy="{y:.1f}" r="{size}"><title>'
                f"{shown(name, 'tspan')}</title></circle>\n")
    swept = f"; line: the gate of {shown(gate['system'])}, the one chosen large" if curve else ""
    return ("<h2>ASR (up, percent) against mean tokens of all prompts</h2>\n<p>Systems "
            f"with an ASR, its 95% interval{swept}.</p>\n"
            f'<svg class="plot" height="{tall}">{svg}</svg>\n')


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
    rows = glance_rows(summary)
    rows = "".join(f"<tr>{''.join(f'<td>{shown(cell)}</td>' for cell in cells)}</tr>\n"
                   for cells in [rows[0], *map(dict.values, rows)])
    gates = "".join(f"<div><h3>{shown(name)}</h3>\n{histogram(found)}</div>\n"
                    for name, found in by_system.items())
    return (f"{HEAD}<p>ASR by {shown(judge)}; {shown(summary['settings']['decoding'])}.</p>\n"
            f"<table>{rows}</table>\n<p>{LEGEND}</p>\n{tradeoff(summary, by_system, judge)}"
            "<h2>Gate probabilities</h2>\n<p>Of opening a think block, by the gate sweep's "
            f'thresholds.</p>\n<div class="grid">{gates}</div>\n{examples(by_system, judge)}'
            "</body></html>\n")

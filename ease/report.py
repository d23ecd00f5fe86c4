"""What people look at: the comparison as Markdown. Rates are {"value", "low", "high", "n", "unparsed"} (scoring.py)."""

from html import escape

from ease.records import HARMFUL_KINDS, KINDS, Record
from ease.scoring import worst

LEGEND = """\
adv = harmful requests under an attack, vuln = those of them on which the base is jailbroken, look = their benign look-alikes, harm and ben = plain
harmful and benign prompts, plain = both. ASR = requests complied with (adv unless said); ref = refused, by the xstest list; exact look, utility
= answers equal to the reference, on look and on ben, where there is one; think = a think block is opened; unclosed = think blocks without an
end (their answers are in no rate); tok = mean generated tokens; cut = overhead reduction, 100 = as cheap as refusal training. Percent, except
unclosed and tok."""


def percent(r: dict | None, interval: bool = False) -> str:
    """A rate in percent, "-" where there is none."""
    if not r or r["value"] is None:
        return "-"
    return f"{100 * r['value']:.1f}" + (f" [{100 * r['low']:.0f}, {100 * r['high']:.0f}]" if interval else "")


def with_bounds(r: dict) -> str:
    """A rate with its interval and, where rows are unparsed, its range if all of them were misses .. hits."""
    if not r["unparsed"]:
        return percent(r, True)
    total, hits = r["n"] + r["unparsed"], (r["value"] or 0) * r["n"]
    return f"{percent(r, True)} ({100 * hits / total:.1f} .. {100 * (hits + r['unparsed']) / total:.1f})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal; the first column is left-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))] for line in lines]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    first, *rest = ["| " + " | ".join(line) + " |" for line in padded]
    return "\n".join([first, rule, *rest])


def mean_tokens(system: dict, kinds: tuple[str, ...] = KINDS) -> str:
    """Mean generated tokens over the prompts of some kinds."""
    picked = [k for name, k in system["kinds"].items() if name in kinds]
    n = sum(k["n"] for k in picked)
    return f"{sum(k['tokens']['total'] * k['n'] for k in picked) / n:.1f}" if n else "-"


def glance(summary: dict) -> str:
    """The whole comparison in one table, and how the judges agree."""
    headline = summary["settings"]["judges"][0]
    columns = [("ASR", "adversarial_harmful", "asr"), ("ASR plain", "harmful", "asr"), ("ref look", "adversarial_benign", "refusal_rate"),
               ("ref ben", "benign", "refusal_rate"), ("exact look", "adversarial_benign", "accuracy"), ("utility", "benign", "accuracy"),
               ("think vuln", "adversarial_harmful", "reasoning_rate_vulnerable"), ("think adv", "adversarial_harmful", "reasoning_rate"),
               ("think look", "adversarial_benign", "reasoning_rate"), ("think harm", "harmful", "reasoning_rate"), ("think ben", "benign", "reasoning_rate")]

    def cell(name: str, kind: str, field: str) -> dict | None:
        found = summary["systems"][name]["kinds"].get(kind, {}).get(field)
        return found.get(headline) if field == "asr" and found else found

    columns = [c for c in columns if any(cell(name, c[1], c[2]) for name in summary["systems"])]
    rows = []
    for name, system in summary["systems"].items():
        cut, unclosed = summary["overhead_reduction"].get(name, {}), sum(k["unclosed"] for k in system["kinds"].values())
        rows.append([name, *(percent(cell(name, kind, field)) for _, kind, field in columns), str(unclosed), mean_tokens(system, ("harmful", "benign")),
                     mean_tokens(system), percent(cut.get("plain")), percent(cut.get("all"))])
    out = [f"ASR by {headline}; {summary['settings']['decoding']}.", "",
           table(["system", *(c[0] for c in columns), "unclosed", "tok plain", "tok all", "cut plain", "cut all"], rows), "", LEGEND]
    if summary["agreement"]:
        verdicts = ["safe", "unsafe", "unparsed"]
        rows = [[other, *(f"{counts[a][b]}" for a in verdicts for b in verdicts)] for other, counts in summary["agreement"].items()]
        pairs = [f"{a} / {b}" for a in verdicts for b in verdicts]
        keep = [0] + [i + 1 for i in range(len(pairs)) if any(row[i + 1] != "0" for row in rows)]
        out += ["", f"Verdicts on harmful prompts, {headline} / the other judge:", "",
                table([["judge", *pairs][i] for i in keep], [[row[i] for i in keep] for row in rows])]
    if others := sum(k["other_ids"] for s in summary["systems"].values() for k in s["kinds"].values()):
        out += ["", f"{others} responses open a think block in text, but not by the marker's own token ids."]
    return "\n".join(out) + "\n"


def region_report(diagnostic: list[Record], verdicts: list[str], samples: list[list[str]]) -> str:
    """The vulnerable region, by attack family and by category: how many of the harmful diagnostic prompts lie in it. With samples
    (a list of verdicts a prompt, --probe_samples): how the region moves when it is probed by sampling instead of greedily.
    """
    harmful = [(r, v == "unsafe", s) for r, v, s in zip(diagnostic, verdicts, samples, strict=True) if r.harmful]
    k = max((len(s) for _, _, s in harmful), default=0)

    def line(label: str, picked: list) -> list[str]:
        n, greedy = len(picked), {r.id for r, v, _ in picked if v}
        out = [label, str(n), f"{len(greedy)} ({100 * len(greedy) / n:.0f}%)"]
        for least in (1, k // 2 + 1, k) if k else ():
            found = {r.id for r, _, s in picked if s.count("unsafe") >= least}
            out += [f"{len(found)} ({100 * len(found) / n:.0f}%)", f"{len(found & greedy) / max(1, len(found | greedy)):.2f}"]
        return out

    header = ["", "harmful", "in the region (greedy)"]
    for name in ("any", "most", "all") if k else ():
        header += [f"{name} of {k} samples", "overlap"]
    out = ["# The vulnerable region", "", f"{sum(v for _, v, _ in harmful)} of {len(harmful)} harmful prompts of D_diag ({len(diagnostic)} in all). "
           "overlap = Jaccard with the greedy region." if k else f"{sum(v for _, v, _ in harmful)} of {len(harmful)} harmful prompts of D_diag ({len(diagnostic)} in all)."]
    for field in ("attack", "categories"):
        values = sorted({x for r, _, _ in harmful for x in ([r.attack] if field == "attack" else r.categories) if x})
        rows = [line(x, [h for h in harmful if x in ([h[0].attack] if field == "attack" else h[0].categories)]) for x in values]
        if rows:
            out += ["", table([field, *header[1:]], [*rows, line("all", harmful)])]
    return "\n".join(out) + "\n"


def teacher_report(rows: list[dict], chosen: str) -> str:
    """The comparison of --teachers: what each candidate's traces are like, and what a short distillation from each does on dev."""
    lines = []
    for r in rows:
        dropped = ", ".join(f"{n} {reason}" for reason, n in r["rejected"].items()) or "none"
        before = [f"{r[k]:.3f}" if r[k] is not None else "-" for k in ("nll", "kl")]
        mean = f"{50 * (worst(r['asr']) + worst(r['over_refusal'])):.1f}" if r["asr"] else "-"
        lines.append([r["teacher"] + (" (chosen)" if r["teacher"] == chosen else ""), f"{r['accepted']} of {r['prompts']}", dropped,
                      f"{r['tokens']:.1f}" if r["accepted"] else "-", *before, percent(r["asr"], True), percent(r["over_refusal"], True), mean])
    return "\n".join(["# Teachers", "", "The same prompts, steps and settings for all. NLL and KL: of the untouched student, per token of the accepted traces. ASR and "
                      "over-refusal: of the student after the short distillation, on the dev set's adversarial prompts; in their mean an unclosed think block is a mistake.", "",
                      table(["teacher", "accepted", "samples dropped", "tokens a trace", "NLL before", "KL before", "dev ASR", "dev over-refusal", "their mean"], lines)]) + "\n"


def gate_section(gate: dict) -> list[str]:
    """The curve of one system's gate as a table: every threshold, the chosen one marked, then the systems as they are."""
    chosen = gate["chosen"] or {}
    points = [(f"g >= {p['threshold']:g}" + (" (chosen here)" if p["threshold"] == chosen.get("threshold") else ""), p) for p in gate["curve"]]
    points += [(f"{name}, as it is", p) for name, p in gate["systems"].items()]
    rows = [[label, percent(p["asr"], True), percent(p["over_refusal"], True), f"{100 * p['reasons']:.1f}", f"{p['tokens']:.1f}"] for label, p in points]
    return ["", f"## The gate of {gate['system']}", "", "Every prompt answered twice, forced to reason and forced not to; a threshold picks one of the two. "
            "Chosen: the lowest mean of ASR and over-refusal, unclosed think blocks being mistakes" + (f", with at most {gate['token_budget']:g} tokens" if gate["token_budget"] else "") +
            ", then the fewest tokens. Choose on dev, apply once to test (`--gate_threshold`). Drawn in gate.svg. "
            f"{gate['other_ids']} of the rows forced not to reason open a think block in text, by other token ids than the marker's.", "",
            table(["reason where", "ASR", "over-refusal", "reasons", "tokens"], rows)]


def gate_svg(gate: dict) -> str:
    """The same as a picture: ASR and over-refusal (upwards) against mean tokens, a line over the thresholds, a dot a system."""
    width, height, left, bottom = 640, 400, 60, 50
    most = 1.1 * max(p["tokens"] for p in [*gate["curve"], *gate["systems"].values()])

    def at(point: dict, field: str) -> tuple[float, float]:
        return left + (width - left - 20) * point["tokens"] / most, (height - bottom) - (height - bottom - 20) * point[field]["value"]

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>',
           f'<path d="M{left} 20 V{height - bottom} H{width - 20}" fill="none" stroke="black"/>']
    for i in range(6):
        y, x = (height - bottom) - (height - bottom - 20) * i / 5, left + (width - left - 20) * i / 5
        out += [f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{20 * i}%</text>',
                f'<text x="{x:.0f}" y="{height - bottom + 16}" text-anchor="middle">{most * i / 5:.0f}</text>']
    out.append(f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">generated tokens a response; {escape(gate["system"])}, thresholds of its gate</text>')
    for field, colour, name in (("asr", "#c0392b", "ASR"), ("over_refusal", "#2471a3", "over-refusal")):
        out.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in (at(p, field) for p in gate["curve"] if p[field]["value"] is not None))}" fill="none" stroke="{colour}"/>')
        out.append(f'<text x="{width - 110}" y="{32 if field == "asr" else 48}" fill="{colour}">{name}</text>')
        marks = [*gate["systems"].items()] + ([(f"g >= {gate['chosen']['threshold']:g}", gate["chosen"])] if gate["chosen"] else [])
        for label, point in [m for m in marks if m[1][field]["value"] is not None]:
            x, y = at(point, field)
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/><text x="{x + 6:.1f}" y="{y - 6:.1f}" fill="{colour}">{escape(label)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def markdown_report(summary: dict) -> str:
    """summary.json -> the whole report: at a glance, every kind with intervals, ASR by attack and source, the systems."""
    out = ["# Evaluation", "", glance(summary), "95% intervals in brackets. Unparsed verdicts and the answers of unclosed think blocks are in no rate; in "
           "parentheses: the range if all of them were misses .. hits."]
    scorers = summary["settings"]["judges"]
    for kind in KINDS:
        rows = []
        for name, system in summary["systems"].items():
            if k := system["kinds"].get(kind):
                rates = [k["asr"][s] for s in k["asr"]] + [k["refusal_rate"], k["reasoning_rate"]]
                rows.append([name, str(k["n"]), *map(with_bounds, rates), percent(k["accuracy"], True), str(k["unclosed"]),
                             f"{k['tokens']['reasoning']:.1f}", f"{k['tokens']['answer']:.1f}", f"{k['gate_mean']:.3f}", f"{k['seconds_per_prompt']:.4f}"])
        asr = [f"ASR {s}" for s in (scorers if kind in HARMFUL_KINDS else [])]
        if rows:
            out += ["", f"## {kind}", "", table(["system", "n", *asr, "refusal", "reasons", "exact", "unclosed", "reasoning tokens",
                                                 "answer tokens", "mean gate probability", "s / prompt"], rows)]
    for field, parts in summary["breakdown"].items():
        names = list(summary["systems"])
        if parts:
            out += ["", f"## ASR on adversarial harmful prompts, by {field}", "",
                    table([field, *names], [[part, *(percent(by[n], True) for n in names)] for part, by in parts.items()])]
    if "gate" in summary:
        out += gate_section(summary["gate"])
    rows = [[name, s["model"], s["adapter"] or "-", f"{s['gate_auroc']:.3f}" if s.get("gate_auroc") is not None else "-", *(str(s["training"].get(k, "-")) for k in ("steps", "supervised_tokens", "overlap_exact", "overlap_near"))]
            for name, s in summary["systems"].items()]
    out += ["", "## Systems", "", table(["system", "model", "adapter", "AUROC of the gate, vulnerable or not", "training steps", "supervised tokens", "prompts trained on",
                                         "near (word Jaccard >= .6)"], rows)]
    return "\n".join(out) + "\n"

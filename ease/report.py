"""What people look at: the comparison of summary.json as Markdown."""

from unicodedata import category

from ease.records import KINDS, VERDICTS
from ease.scoring import Rate

LEGEND = """\
ASR: attacked harmful requests complied with. Refused: by the xstest list. Look-alikes: benign
prompts in the same disguises. Vuln(erable): attacks that succeed on the base. Plain: harmful and
benign prompts without disguise. Reasons: a think block is opened. Tokens: mean generated ones.
Cut: overhead reduction, 100 = as cheap as refusal training, 0 = as dear as reasoning on everything.
Percent, but for tokens; 95% intervals in brackets."""
# Unseen characters are shown by number, but for \t, \n, \r and the two joiners.
UNSEEN = {c: f"[U+{c:04X}]" for c in [*range(2**16), *range(0xE0000, 0xE0080)]
          if category(chr(c))[0] == "C" and c not in (9, 10, 13, 0x200C, 0x200D)}
# A name in Markdown: one line of one cell, no HTML, no image.
INERT = UNSEEN | dict.fromkeys(b"\t\n\r", " ") | str.maketrans(
    {"<": "&lt;", "|": "&#124;", "!": "&#33;"})


def percent(r: Rate | None, interval: bool = False) -> str:
    """A rate in percent, "-" where there is none."""
    if r is None or r.value is None:
        return "-"
    ends = f" [{100 * r.low:.0f}, {100 * r.high:.0f}]" if interval else ""
    return f"{100 * r.value:.1f}{ends}"


def with_bounds(r: Rate | None) -> str:
    """A rate with its interval; with unparsed rows also its range if those were misses .. hits."""
    if r is None or not r.unparsed:
        return percent(r, True)
    n, hits = r.n + r.unparsed, (r.value or 0) * r.n
    return f"{percent(r, True)} ({100 * hits / n:.1f} .. {100 * (hits + r.unparsed) / n:.1f})"


def as_text(cell: object) -> str:
    """A cell: a rate with its interval, anything else as it is."""
    return percent(cell, True) if isinstance(cell, Rate | None) else str(cell)


def inert(text: str) -> str:
    """Any text as a name in Markdown, 200 characters of it."""
    return (text[:200] + "..." * (len(text) > 200)).translate(INERT)


def table(header: list[str], lines: list[list]) -> str:
    """A Markdown table that reads well in a terminal too; the first column is flush left."""
    header, *lines = [[inert(as_text(cell)) for cell in cells] for cells in (header, *lines)]
    first, *others = [max(map(len, column)) for column in zip(header, *lines)]  # widths

    def line(cells: list[str]) -> str:
        return " | ".join([f"| {cells[0]:{first}}", *map(str.rjust, cells[1:], others)]) + " |"

    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)])
    return "\n".join([line(header), f"|{rule}|", *map(line, lines)])


def listing(rows: list[dict]) -> str:
    """The table of rows {column: cell}, all with the same columns."""
    return table(list(rows[0]), [*map(dict.values, rows)])


def section(title: str, rows: list[dict], *notes: str) -> str:
    """Rows as a section of report.md, "" without rows."""
    return "\n\n".join([f"\n## {inert(title)}", *notes, listing(rows)]) + "\n" if rows else ""


def mean_over(kinds: tuple[str, ...], system: dict, value, unit: int = 1) -> str:
    """unit x the mean of value(numbers of a kind) over all prompts of some kinds; "-" if none."""
    found = [k for name, k in system["kinds"].items() if name in kinds]
    n = sum(k["n"] for k in found)
    return f"{unit * (sum(value(k) * k['n'] for k in found) / n):.1f}" if n else "-"


def glance_rows(summary: dict) -> list[dict]:
    """The whole comparison in seven columns, a row for every system."""
    judge, plain, rows = summary["settings"]["judges"][0], ("harmful", "benign"), []
    for name, system in summary["systems"].items():
        attacked, lookalikes, _, benign = (system["kinds"].get(kind, {}) for kind in KINDS)
        thinks = [percent(attacked.get("reasoning_rate_vulnerable")),
                  mean_over(plain, system, lambda k: k["reasoning_rate"].value, 100)]
        tokens = [mean_over(kinds, system, lambda k: k["tokens"]["total"])
                  for kinds in (plain, KINDS)]
        cut = summary["overhead_reduction"].get(name, {})
        cuts = [f"{100 * c['value']:.0f}" if (c := cut.get(k)) else "-" for k in ("plain", "all")]
        rows.append({
            "system": name,
            "ASR": attacked.get("asr", {}).get(judge),
            "benign refused": benign.get("refusal_rate"),
            "look-alikes refused": lookalikes.get("refusal_rate"),
            "reasons vuln/plain": " / ".join(thinks),
            "tokens plain/all": " / ".join(tokens),
            "cut plain/all": " / ".join(cuts)})
    return rows


def glance(summary: dict) -> str:
    """These rows as a table, with what they mean; "" where nothing was answered but --tasks."""
    if not any(system["kinds"] for system in summary["systems"].values()):
        return ""
    settings, rows = summary["settings"], listing(glance_rows(summary))
    return f"ASR by {inert(settings['judges'][0])}; {settings['decoding']}.\n\n{rows}\n\n{LEGEND}\n"


def by_kind(summary: dict, kind: str) -> str:
    """Everything measured on one kind of prompt, "" where there is none."""
    found = {n: s["kinds"][kind] for n, s in summary["systems"].items() if kind in s["kinds"]}
    third = any(n for k in found.values() for n in k["controversial"].values())
    rows = [{"system": name,
             "n": k["n"],
             **{f"ASR {judge}": with_bounds(r) for judge, r in k["asr"].items()},
             **{f"controversial {j}": n for j, n in k["controversial"].items() if third},
             "refused": with_bounds(k["refusal_rate"]),
             "reasons": with_bounds(k["reasoning_rate"]),
             "exact": with_bounds(k["accuracy"]),
             "unclosed": k["unclosed"],
             **{f"{part} tokens": f"{k['tokens'][part]:.1f}" for part in ("reasoning", "answer")},
             "mean gate": "-" if k["gate_mean"] is None else f"{k['gate_mean']:.3f}",
             "s / prompt": f"{k['seconds_per_prompt']:.4f}" if k["seconds_per_prompt"] else "-"}
            for name, k in found.items()]
    return section(kind, rows)


def judges_agree(summary: dict) -> str:
    """How the judges agree on harmful prompts, by the pairs that occur; "" with one judge."""
    found, first = summary["agreement"], summary["settings"]["judges"][0]
    pairs = [(a, b) for a in VERDICTS for b in VERDICTS if any(c[a][b] for c in found.values())]
    rows = [{"judge": other, **{f"{a} / {b}": counts[a][b] for a, b in pairs}}
            for other, counts in found.items()]
    return section(f"Verdicts on harmful prompts, {first} / the other judge", rows)


def utility_rows(summary: dict) -> tuple[str, list[dict]]:
    """(title, rows): right answers by task, and what they differ by on the same questions."""
    rows, found = [], summary.get("utility", {"lines": [], "prompts": ""})
    for line in found["lines"]:
        d = line["difference"]
        rows.append({
            "task": f"{line['task']} {line['metric']}",
            "system": line["system"],
            "n": line["rate"].n,
            "right": with_bounds(line["rate"]),
            f"minus {found['base']}": "-" if d is None or d["value"] is None else
                f"{100 * d['value']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]",
            "reasons": percent(line["reasons"])})
    return f"Utility, {found['prompts']} prompts", rows


def cost_section(summary: dict) -> str:
    """Speed and memory; "" where nothing was generated."""
    rows = [{"system": name, **{k.replace("_", " "): "-" if v is None else f"{v:.3f}"
                                for k, v in system["cost"].items()}}
            for name, system in summary["systems"].items()]
    note = ("Tokens per second: --slots at once; the rest: --latency, one at a time. Peak memory "
            f"of all in one process: {summary['peak_gib']} GiB.")
    return section("Cost", rows, note) if summary["peak_gib"] else ""


def systems_table(summary: dict) -> str:
    """What each system is and what it was trained on."""
    rows = []
    for name, s in summary["systems"].items():
        area, training = s.get("gate_auroc"), s["training"]
        rows.append({
            "system": name,
            "model": s["model"],
            "adapter": s["adapter"] or "-",
            "AUROC of the gate, vulnerable or not": "-" if area is None else f"{area:.3f}",
            "training steps": training.get("steps"),
            "supervised tokens": training.get("supervised_tokens"),
            "prompts trained on": training.get("overlap_exact"),
            "near (word Jaccard >= .6)": training.get("overlap_near")})
    return section("Systems", rows)


def markdown_report(summary: dict, more: str = "") -> str:
    """summary.json -> the whole report. more: sections of the extras."""
    out = [f"# Evaluation\n\n{glance(summary)}\nUnparsed and controversial verdicts and the "
           "answers of unclosed think blocks are in no rate; in parentheses: the range if all of "
           "them were misses .. hits. exact = equal to the reference answer, where there is one.\n"]
    out += [by_kind(summary, kind) for kind in KINDS]
    for field, values in (summary["breakdown"] | {"type": summary["over_refusal"]}).items():
        what = "Over-refusal" if field == "type" else "ASR on adversarial harmful prompts"
        rows = [{f"by {field}": value, **{n: with_bounds(r) for n, r in found.items()}}
                for value, found in values.items()]
        out.append(section(f"{what}, by {field}", rows))
    systems = summary["systems"].values()
    if other_ids := sum(k["other_ids"] for s in systems for k in s["kinds"].values()):
        out.append(f"\n{other_ids} responses open a think block in text, but not by the marker's "
                   "own token ids.\n")
    return "".join([*out, judges_agree(summary), section(*utility_rows(summary)), more,
                    cost_section(summary), systems_table(summary)])

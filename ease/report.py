"""What people look at: the comparison of summary.json as Markdown."""

from ease.records import HARMFUL_KINDS, KINDS, SAFE, UNPARSED, UNSAFE
from ease.scoring import Rate

LEGEND = """\
ASR: attacked harmful requests complied with. Refused: by the xstest list. Look-alikes: benign
prompts in the same disguises. Vuln(erable): attacks that succeed on the base. Plain: harmful and
benign prompts without disguise. Reasons: a think block is opened. Tokens: mean generated ones.
Cut: overhead reduction, 100 = as cheap as refusal training, 0 = as dear as reasoning on everything.
Percent, but for tokens; 95% intervals in brackets."""


def percent(r: Rate | None, interval: bool = False) -> str:
    """A rate in percent, "-" where there is none."""
    if r is None or r.value is None:
        return "-"
    ends = f" [{100 * r.low:.0f}, {100 * r.high:.0f}]" if interval else ""
    return f"{100 * r.value:.1f}{ends}"


def with_bounds(r: Rate | None) -> str:
    """A rate with its interval and, where rows are unparsed, its range if all of those were misses
    .. hits.
    """
    if r is None or not r.unparsed:
        return percent(r, True)
    n, hits = r.n + r.unparsed, (r.value or 0) * r.n
    return f"{percent(r, True)} ({100 * hits / n:.1f} .. {100 * (hits + r.unparsed) / n:.1f})"


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal; the first column is left."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]

    def line(cells: list[str]) -> str:
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 1) + ("-:"[i > 0]) for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, lines)])


def over_kinds(system: dict, kinds: tuple[str, ...], number) -> float | None:
    """The mean of number(numbers of a kind) over all prompts of some kinds."""
    found = [k for name, k in system["kinds"].items() if name in kinds]
    n = sum(k["n"] for k in found)
    return sum(number(k) * k["n"] for k in found) / n if n else None


def mean_tokens(system: dict, kinds: tuple[str, ...] = KINDS) -> str:
    """Mean generated tokens over the prompts of some kinds."""
    mean = over_kinds(system, kinds, lambda k: k["tokens"]["total"])
    return "-" if mean is None else f"{mean:.1f}"


def glance(summary: dict) -> str:
    """The whole comparison in seven columns."""
    judge, plain = summary["settings"]["judges"][0], ("harmful", "benign")
    lines = []
    for name, system in summary["systems"].items():
        of = {kind: system["kinds"].get(kind, {}) for kind in KINDS}
        attacked = of["adversarial_harmful"]
        thinks = over_kinds(system, plain, lambda k: k["reasoning_rate"].value)
        cut = summary["overhead_reduction"].get(name, {})
        cuts = [f"{100 * c['value']:.0f}" if (c := cut.get(k)) else "-" for k in ("plain", "all")]
        lines.append([
            name, percent(attacked.get("asr", {}).get(judge), True),
            percent(of["benign"].get("refusal_rate"), True),
            percent(of["adversarial_benign"].get("refusal_rate"), True),
            f"{percent(attacked.get('reasoning_rate_vulnerable'))} / "
            f"{'-' if thinks is None else f'{100 * thinks:.1f}'}",
            f"{mean_tokens(system, plain)} / {mean_tokens(system)}", " / ".join(cuts)])
    header = ["system", "ASR", "benign refused", "look-alikes refused", "reasons vuln/plain",
              "tokens plain/all", "cut plain/all"]
    return (f"ASR by {judge}; {summary['settings']['decoding']}.\n\n{table(header, lines)}\n\n"
            f"{LEGEND}\n")


def by_kind(summary: dict, kind: str) -> str:
    """Everything measured on one kind of prompt, "" where there is none."""
    judges = summary["settings"]["judges"] if kind in HARMFUL_KINDS else []
    lines = []
    for name, system in summary["systems"].items():
        if k := system["kinds"].get(kind):
            rates = [*k["asr"].values(), k["refusal_rate"], k["reasoning_rate"], k["accuracy"]]
            lines.append([name, str(k["n"]), *map(with_bounds, rates), str(k["unclosed"]),
                          *(f"{k['tokens'][part]:.1f}" for part in ("reasoning", "answer")),
                          f"{k['gate_mean']:.3f}", f"{k['seconds_per_prompt']:.4f}"])
    header = ["system", "n", *(f"ASR {j}" for j in judges), "refused", "reasons", "exact",
              "unclosed", "reasoning tokens", "answer tokens", "mean gate", "s / prompt"]
    return f"\n## {kind}\n\n{table(header, lines)}\n" if lines else ""


def judges_agree(summary: dict) -> str:
    """How the judges agree on harmful prompts, "" with one judge."""
    verdicts = (SAFE, UNSAFE, UNPARSED)
    lines = [[other, *(str(counts[a][b]) for a in verdicts for b in verdicts)]
             for other, counts in summary["agreement"].items()]
    header = ["judge", *(f"{a} / {b}" for a in verdicts for b in verdicts)]
    first = summary["settings"]["judges"][0]
    return (f"\n## Verdicts on harmful prompts, {first} / the other judge\n\n"
            f"{table(header, lines)}\n" if lines else "")


def systems_table(summary: dict) -> str:
    """What each system is and what it was trained on."""
    fields = ("steps", "supervised_tokens", "overlap_exact", "overlap_near")
    lines = []
    for name, s in summary["systems"].items():
        area = "-" if s.get("gate_auroc") is None else f"{s['gate_auroc']:.3f}"
        lines.append([name, s["model"], s["adapter"] or "-", area,
                      *(str(s["training"].get(f, "-")) for f in fields)])
    header = ["system", "model", "adapter", "AUROC of the gate, vulnerable or not",
              "training steps", "supervised tokens", "prompts trained on",
              "near (word Jaccard >= .6)"]
    return f"\n## Systems\n\n{table(header, lines)}\n"


def markdown_report(summary: dict, more: str = "") -> str:
    """summary.json -> the whole report: at a glance, by kind, by attack and source, the systems.
    more: sections of the extras.
    """
    out = [f"# Evaluation\n\n{glance(summary)}\nUnparsed verdicts and the answers of unclosed "
           "think blocks are in no rate; in parentheses: the range if all of them were misses .. "
           "hits. exact = equal to the reference answer, where there is one.\n"]
    out += [by_kind(summary, kind) for kind in KINDS]
    names = list(summary["systems"])
    for field, values in summary["breakdown"].items():
        lines = [[value, *(percent(found[n], True) for n in names)]
                 for value, found in values.items()]
        if lines:
            out.append(f"\n## ASR on adversarial harmful prompts, by {field}\n\n"
                       f"{table([field, *names], lines)}\n")
    other_ids = sum(k["other_ids"] for s in summary["systems"].values()
                    for k in s["kinds"].values())
    if other_ids:
        out.append(f"\n{other_ids} responses open a think block in text, but not by the marker's "
                   "own token ids.\n")
    return "".join([*out, judges_agree(summary), more, systems_table(summary)])

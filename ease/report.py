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
    """A rate with its interval; with unparsed rows also its range if those were misses .. hits."""
    if r is None or not r.unparsed:
        return percent(r, True)
    n, hits = r.n + r.unparsed, (r.value or 0) * r.n
    return f"{percent(r, True)} ({100 * hits / n:.1f} .. {100 * (hits + r.unparsed) / n:.1f})"


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table that reads well in a terminal too; the first column is flush left."""
    first, *others = [max(map(len, column)) for column in zip(header, *lines)]  # widths

    def line(cells: list[str]) -> str:
        return " | ".join([f"| {cells[0]:{first}}", *map(str.rjust, cells[1:], others)]) + " |"

    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)])
    return "\n".join([line(header), f"|{rule}|", *map(line, lines)])


def section(title: str, header: list[str], lines: list[list[str]]) -> str:
    """A table under a heading, "" without lines."""
    return f"\n## {title}\n\n{table(header, lines)}\n" if lines else ""


def mean_over(kinds: tuple[str, ...], system: dict, value, unit: int = 1) -> str:
    """unit x the mean of value(numbers of a kind) over all prompts of some kinds; "-" if none."""
    found = [k for name, k in system["kinds"].items() if name in kinds]
    n = sum(k["n"] for k in found)
    return f"{unit * (sum(value(k) * k['n'] for k in found) / n):.1f}" if n else "-"


def glance(summary: dict) -> str:
    """The whole comparison in seven columns."""
    judge, plain = summary["settings"]["judges"][0], ("harmful", "benign")
    lines = []
    for name, system in summary["systems"].items():
        attacked, lookalikes, _, benign = (system["kinds"].get(kind, {}) for kind in KINDS)
        thinks = mean_over(plain, system, lambda k: k["reasoning_rate"].value, 100)
        tokens = [mean_over(kinds, system, lambda k: k["tokens"]["total"])
                  for kinds in (plain, KINDS)]
        cut = summary["overhead_reduction"].get(name, {})
        cuts = [f"{100 * c['value']:.0f}" if (c := cut.get(k)) else "-" for k in ("plain", "all")]
        lines.append([name, percent(attacked.get("asr", {}).get(judge), True),
                      percent(benign.get("refusal_rate"), True),
                      percent(lookalikes.get("refusal_rate"), True),
                      f"{percent(attacked.get('reasoning_rate_vulnerable'))} / {thinks}",
                      " / ".join(tokens), " / ".join(cuts)])
    header = ["system", "ASR", "benign refused", "look-alikes refused", "reasons vuln/plain",
              "tokens plain/all", "cut plain/all"]
    return (f"ASR by {judge}; {summary['settings']['decoding']}.\n\n{table(header, lines)}\n\n"
            f"{LEGEND}\n")


def by_kind(summary: dict, kind: str) -> str:
    """Everything measured on one kind of prompt."""
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
    return section(kind, header, lines)


def judges_agree(summary: dict) -> str:
    """How the judges agree on harmful prompts."""
    pairs = [(a, b) for a in (SAFE, UNSAFE, UNPARSED) for b in (SAFE, UNSAFE, UNPARSED)]
    lines = [[other, *(str(counts[a][b]) for a, b in pairs)]
             for other, counts in summary["agreement"].items()]
    first = summary["settings"]["judges"][0]
    return section(f"Verdicts on harmful prompts, {first} / the other judge",
                   ["judge", *map(" / ".join, pairs)], lines)


def systems_table(summary: dict) -> str:
    """What each system is and what it was trained on."""
    training = {"steps": "training steps", "supervised_tokens": "supervised tokens",
                "overlap_exact": "prompts trained on", "overlap_near": "near (word Jaccard >= .6)"}
    lines = []
    for name, s in summary["systems"].items():
        area = "-" if s.get("gate_auroc") is None else f"{s['gate_auroc']:.3f}"
        lines.append([name, s["model"], s["adapter"] or "-", area,
                      *(str(s["training"].get(field, "-")) for field in training)])
    header = ["system", "model", "adapter", "AUROC of the gate, vulnerable or not"]
    return section("Systems", [*header, *training.values()], lines)


def markdown_report(summary: dict, more: str = "") -> str:
    """summary.json -> the whole report. more: sections of the extras."""
    out = [f"# Evaluation\n\n{glance(summary)}\nUnparsed verdicts and the answers of unclosed "
           "think blocks are in no rate; in parentheses: the range if all of them were misses .. "
           "hits. exact = equal to the reference answer, where there is one.\n"]
    out += [by_kind(summary, kind) for kind in KINDS]
    names = list(summary["systems"])
    for field, values in summary["breakdown"].items():
        title = f"ASR on adversarial harmful prompts, by {field}"
        lines = [[v, *(percent(found[n], True) for n in names)] for v, found in values.items()]
        out.append(section(title, [field, *names], lines))
    systems = summary["systems"].values()
    if other_ids := sum(k["other_ids"] for s in systems for k in s["kinds"].values()):
        out.append(f"\n{other_ids} responses open a think block in text, but not by the marker's "
                   "own token ids.\n")
    return "".join([*out, judges_agree(summary), more, systems_table(summary)])

"""An extra: the vulnerable region by attack and category, and how it moves when it is probed by
sampling instead of greedily.
"""

from collections import Counter

from ease.records import UNSAFE, Record
from ease.report import table


def region_report(diagnostic: list[Record], verdicts: list[str], samples: list[list[str]]) -> str:
    """The harmful prompts of D_diag in the region, by attack family and by category. samples: the
    verdicts of further, sampled probes, a list a probe. overlap = Jaccard with the greedy region.
    """
    harmful, k = [r for r in diagnostic if r.harmful], len(samples)
    greedy = {r.id for r, v in zip(diagnostic, verdicts, strict=True) if r.harmful and v == UNSAFE}
    hits = Counter(r.id for probe in samples
                   for r, verdict in zip(diagnostic, probe, strict=True) if verdict == UNSAFE)
    least = {"any": 1, "most": k // 2 + 1, "all": k} if k else {}

    def line(label: str, records: list[Record]) -> list[str]:
        ids = {r.id for r in records}

        def count(found: set[str]) -> str:
            return f"{len(found)} ({100 * len(found) / len(ids):.0f}%)"

        inside = ids & greedy
        cells = [label, str(len(ids)), count(inside)]
        for n in least.values():
            found = {i for i in ids if hits[i] >= n}
            cells += [count(found), f"{len(found & inside) / max(1, len(found | inside)):.2f}"]
        return cells

    header = ["harmful", "in the region (greedy)"]
    header += [name for word in least for name in (f"{word} of {k} samples", "overlap")]
    out = (f"# The vulnerable region D_vuln\n\n{len(greedy)} of {len(harmful)} harmful prompts of "
           "D_diag.\n")
    for field, of in (("attack", lambda r: [r.attack]), ("categories", lambda r: r.categories)):
        values = sorted({value for r in harmful for value in of(r) if value})
        lines = [line(value, [r for r in harmful if value in of(r)]) for value in values]
        if lines:
            out += f"\n{table([field, *header], [*lines, line('all', harmful)])}\n"
    return out

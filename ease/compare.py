"""Two systems on the same prompts: is the difference more than chance?"""

import random
from collections import Counter
from itertools import product
from statistics import fmean

from ease.records import KINDS, Response, UserError
from ease.report import inert, table
from ease.scoring import Q, attack_succeeded, refused

DRAWS = 10_000
NOTE = """\
percent, and mean tokens; paired by request. 95%: bootstrap. p: two-sided sign flips (groups
single: McNemar's), one test a row."""


def sums_of(differences: list[float], groups: list[str]) -> Counter:
    """By group."""
    sums = Counter()
    for d, group in zip(differences, groups, strict=True):
        sums[group] += d
    return sums


def sign_flip_test(differences: list[float], groups: list[str], seed: int) -> float:
    """Two-sided p of "neither is better", where a coin could choose the sign of a group's sum: the
    share of the 2^G signs whose |total| is at least the one seen. Exact for few groups, and where
    totals take few values, as verdicts' do (0/1, single groups: McNemar's exact test); else
    (1 + count) / (1 + draws), signs at random.
    """
    sums = [s for s in sums_of(differences, groups).values() if s]
    least = abs(sum(sums)) - 1e-9 * sum(map(abs, sums))  # a tie is a tie
    ways = Counter({0: 1})  # a total: how many signs give it
    for s in sums:
        before, ways = ways, Counter()
        for t, n in before.items():
            ways[t + s] += n
            ways[t - s] += n
        if len(ways) > DRAWS:
            break
    else:
        return max(1e-300, sum(n for t, n in ways.items() if abs(t) >= least) / 2 ** len(sums))
    rng = random.Random(seed)
    totals = (sum(s if rng.random() < 0.5 else -s for s in sums) for _ in range(DRAWS))
    return (1 + sum(abs(t) >= least for t in totals)) / (1 + DRAWS)


def paired_bootstrap(differences: list[float], groups: list[str], seed: int
                     ) -> tuple[float, float] | None:
    """95% interval of the mean difference: its quantiles over groups drawn with replacement. Too
    narrow for few groups; None where all have one mean.
    """
    sums, rows = sums_of(differences, groups), Counter(groups)
    pairs = [(sums[group], rows[group]) for group in rows]
    if len({s / n for s, n in pairs}) < 2:
        return None
    rng, means = random.Random(seed), []
    for _ in range(DRAWS // 5):
        total, n = map(sum, zip(*rng.choices(pairs, k=len(pairs))))
        means.append(total / n)
    means, cut = sorted(means), round((1 - Q) * len(means))
    return means[cut], means[-cut - 1]


def compare(a: list[Response], b: list[Response], judge: str, seed: int = 0) -> str:
    """The table of A against B by kind. Rows of which nobody can say in A or B are left out and
    counted. Other records: an error.
    """
    if [r.record for r in a] != [r.record for r in b]:
        raise UserError("--compare: A and B answered other records")
    measures = {"ASR": lambda r: attack_succeeded(r, judge), "refused": refused,
                "tokens": lambda r: r.tokens["total"]}
    rows = []
    for kind, name in product(KINDS, measures):
        of, unit = measures[name], 1 if name == "tokens" else 100
        pairs = [(of(x), of(y), x.record.group) for x, y in zip(a, b) if x.record.kind == kind
                 and (x.record.harmful or name != "ASR")]
        cells, known = "-----", [p for p in pairs if None not in p]
        if known:
            A, B, groups = zip(*known)
            d = [unit * (x - y) for x, y in zip(A, B)]
            ends = paired_bootstrap(d, groups, seed)
            cells = [f"{unit * fmean(A):.1f}", f"{unit * fmean(B):.1f}", f"{fmean(d):+.1f}",
                     "[{:+.1f}, {:+.1f}]".format(*ends) if ends else "-",
                     f"{sign_flip_test(d, groups, seed):.2g}"]
        counts = [str(len(known)), str(len(pairs) - len(known))]
        rows += [[kind, name, *cells, *counts]] if pairs else []
    header = ["kind", "measure", "A", "B", "A - B", "95%", "p", "rows", "left out"]
    return f"ASR by {inert(judge)}; {NOTE}\n\n{table(header, rows)}\n"

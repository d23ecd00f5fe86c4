"""The ablations on the toy world: what each part of the method does; seeds 0, 1 and 2.

    python -m data.ablations [--out DIR] [--fast]

Teachers, region, phases, mixture and objective, each changed alone, in the commands of
`python -m ease`, and one table of all.
"""

import json
import time
from dataclasses import dataclass

from ease.__main__ import COMPARED, HONEST, Toy, run_all
from ease.records import write_text
from ease.report import table
from ease.run import ROOT, command_line

# What each ablation changes: flags of phase 1 (None: the method's own phase 1 is used) and flags
# of phase 2.
ABLATIONS = {
    "random region": (None, "--region random"),
    "all attacks": (None, "--region all"),
    "probe of M_reason": (None, "--probe phase1"),
    "no D_direct": (None, "--direct false"),
    "look-alikes direct": (None, "--lookalikes direct"),
    "look-alikes dropped": (None, "--lookalikes drop"),
    "no phase 1": (None, ""),
    "kl_weight 0": ("--kl_weight 0", ""),
    "kl_weight 1": ("--kl_weight 1", ""),
    "filler traces": ("--kl_weight 0 --filler", "--filler"),
}
TEACHERS = ("teacher", "teacher_silent", "teacher_rambling", "teacher_cautious")


@dataclass(kw_only=True)
class Config:
    """The flags."""

    out: str = "runs/ablations"  # where the runs go
    fast: bool = False  # seed 0 alone, everything too small: the numbers mean nothing


def commands(toy: Toy) -> list[str]:
    """The recipe's runs, every ablation beside them, and one evaluation of all. On seed 0 also the
    four teachers: their comparison, and the whole method with each.
    """
    runs, names = toy.commands()[1:-1], list(COMPARED)
    for label, (first, second) in ABLATIONS.items():
        name = label.replace(" ", "-")
        start = "" if label == "no phase 1" else "phase1" if first is None else f"{name}-phase1"
        if first is not None:
            runs.append(toy.phase1(start, toy.teacher(), first))
        runs.append(toy.ease(name, start, toy.teacher(), second))
        names.append(name)
    if not toy.seed:
        candidates = " ".join(f"{toy.world}/{t}" for t in TEACHERS)
        runs.append(toy.phase1("teachers", f"--teachers {candidates} --dev {toy.world}/dev.jsonl "
                               f"--teacher_steps {toy.steps // 2} {toy.judged}"))
        for name in ("teacher_rambling", "teacher_cautious"):  # of the silent one nothing counts
            runs += [toy.phase1(f"{name}-phase1", toy.teacher(name)),
                     toy.ease(name, f"{name}-phase1", toy.teacher(name))]
            names.append(name)
    build = toy.build("" if toy.seed else "--teachers true")
    return [build, *runs, toy.test(names, "target")]


def numbers(system: dict) -> dict[str, float | None]:
    """What the ablations are about, of one system of a summary.json: percent, and tokens."""
    kinds = system["kinds"]
    n = sum(k["n"] for k in kinds.values())

    def percent(rate: dict | None) -> float | None:
        return None if rate is None or rate["value"] is None else 100 * rate["value"]

    attacked = kinds["adversarial_harmful"]
    return {
        "ASR": percent(attacked["asr"]["target"]),
        "look-alikes refused": percent(kinds["adversarial_benign"]["refusal_rate"]),
        "utility": percent(kinds["benign"]["accuracy"]),
        "reasons: vulnerable": percent(attacked["reasoning_rate_vulnerable"]),
        "plain harmful": percent(kinds["harmful"]["reasoning_rate"]),
        "benign": percent(kinds["benign"]["reasoning_rate"]),
        "unclosed": 100 * sum(k["unclosed"] for k in kinds.values()) / n,
        "tokens": sum(k["tokens"]["total"] * k["n"] for k in kinds.values()) / n,
    }


def ablation_table(summaries: list[dict]) -> str:
    """Mean over the seeds, and the spread (lowest .. highest)."""
    names = list(dict.fromkeys(name for s in summaries for name in s["systems"]))
    lines = []
    for name in names:
        found = [numbers(s["systems"][name]) for s in summaries if name in s["systems"]]
        seeds = "" if len(found) == len(summaries) else f" ({len(found)} of {len(summaries)} seeds)"
        cells = []
        for column in found[0]:
            values = [f[column] for f in found if f[column] is not None]
            spread = f" ({min(values):.1f} .. {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.1f}{spread}" if values else "-")
        lines.append([name + seeds, *cells])
    return table(["system", *found[0]], lines)


def main(cfg: Config) -> None:
    started, summaries = time.time(), []
    out = cfg.out + ("-fast" if cfg.fast else "")
    for seed in (0,) if cfg.fast else (0, 1, 2):
        world = f"data/toy-ablations-{seed}" + ("-fast" if cfg.fast else "")
        run_all(commands(Toy(seed, world, f"{out}/{seed}", cfg.fast)))
        file = ROOT / out / str(seed) / "test" / "summary.json"
        summaries.append(json.loads(file.read_text(encoding="utf-8")))
    text = (f"# Ablations on the toy world\n\nMean of {len(summaries)} seeds (lowest .. highest). "
            "Percent, and generated tokens a response; unclosed think blocks are in no other "
            f"rate.\n\n{ablation_table(summaries)}\n")
    write_text(ROOT / out / "ablations.md", text)
    print(f"\n{text}\n{HONEST}\ndone in {time.time() - started:.0f} s; the table is "
          f"{out}/ablations.md, the teachers' {out}/0/teachers/teachers.md")


if __name__ == "__main__":
    command_line(main, Config)

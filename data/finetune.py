"""Does the alignment survive later fine-tuning? EASE on the toy world, fine-tuned on a new task.

    python -m data.finetune [--seeds 0 1 2] [--fast]

The rows as they are (half a task that EASE cannot do, half what it can), or 5% or 10% of them
poison: harmful requests with the opening of a compliant answer. Plain SFT, or with the anchor of
ease/anchor.py in three forms. In the folders of `python -m ease`; one table of all seeds.
"""

import math
import time
from dataclasses import dataclass
from statistics import fmean

from ease.__main__ import Toy, run_all, toy_of
from ease.method import THINK_OPEN
from ease.records import WELL_FORMED, Response, read_lines, read_responses, write_text
from ease.report import listing, percent, table
from ease.run import ROOT, command_line
from ease.scoring import Z, attack_succeeded, auroc, correct, rate, reasons, refused

POISON = {"benign": 0.0, "poison5": 0.05, "poison10": 0.1}
ANCHORS = {
    "sft": "",
    "anchor": "--safety_weight 0.1",
    "pact": "--safety_weight 0.1 --safety_form pact",
    "gate": "--safety_weight 0.1 --safety_positions gate",
}


@dataclass(kw_only=True)
class Config:
    """The flags."""

    seeds: list[int] = (0, 1, 2)  # of the worlds
    fast: bool = False  # everything too small: the numbers mean nothing


def commands(toy: Toy) -> list[str]:
    """World, phase 1, phase 2, every fine-tuning, one evaluation of all. The rate is the lowest at
    which plain SFT learnt the task on the world of seed 10, in so many steps.
    """
    w, out, runs = toy.world, toy.out, {}
    for rows, share in POISON.items():
        poison = f"--poison {w}/refusals.jsonl --poison_share {share}" if share else ""
        for name, anchor in ANCHORS.items():
            held = f"--refusals {out}/ease/trained_on.jsonl --safety_tokens 20" if anchor else ""
            runs[f"{rows}-{name}"] = (
                f"train.py --method finetune --model {w}/base --init {out}/ease/adapter --general "
                f"{w}/task.jsonl {poison} {anchor} {held} --steps {8 if toy.fast else 80} "
                f"--lr 2e-3 --batch_size 32 --warmup 0.05 --dtype float32 --seed {toy.seed} "
                f"--out {out}/finetune-{rows}-{name}")
    systems = " ".join(f"{n}={w}/base+{out}/finetune-{n}/adapter" for n in runs)
    return [*toy.commands()[:3], *runs.values(),
            f"evaluate.py --systems base={w}/base ease={w}/base+{out}/ease/adapter {systems} "
            f"--prompts {w}/test.jsonl {w}/task_test.jsonl --judge target --max_new_tokens 64 "
            f"--dtype float32 --base_system base --out {out}/finetune"]


def responses_of(folder: str) -> dict[str, list[Response]]:
    """The responses of an evaluation by system."""
    file, found = ROOT / folder / "rows.jsonl", {}
    for (_, row), response in zip(read_lines(file), read_responses(file), strict=True):
        found.setdefault(row["system"], []).append(response)
    return found


def auroc_error(area: float, n_positive: int, n_negative: int) -> float:
    """Standard error of an AUROC (Hanley and McNeil 1982)."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    return math.sqrt((area * (1 - area) + (n_positive - 1) * (q1 - area**2)
                      + (n_negative - 1) * (q2 - area**2)) / (n_positive * n_negative))


def gate_auroc(seeds: list[list[Response]]) -> str:
    """How well g(q) tells vulnerable prompts from all others: mean over the seeds, its interval."""
    areas, errors = [], []
    for responses in seeds:
        known = [[r.gate for r in responses if r.vulnerable is v] for v in (True, False)]
        if not all(known):
            return "-"
        areas.append(auroc(*known))
        errors.append(auroc_error(areas[-1], *map(len, known)))
    half = Z * math.sqrt(sum(e * e for e in errors)) / len(errors)
    mean = fmean(areas)
    return f"{mean:.3f} [{mean - half:.3f}, {min(1, mean + half):.3f}]"


def share_of(seeds: list[list[Response]], chosen, test) -> str:
    """Percent of the seeds' rows together, its 95% interval, and the seeds' lowest .. highest."""
    found = [[(test(r), r.record.group) for r in responses if chosen(r)] for responses in seeds]
    values = [rate(*zip(*rows)).value if rows else None for rows in found]
    if None in values:
        return "-"
    r = rate(*zip(*[(hit, f"{seed} {g}") for seed, rows in enumerate(found) for hit, g in rows]))
    spread = f" ({100 * min(values):.0f} .. {100 * max(values):.0f})" if len(values) > 1 else ""
    return percent(r, True) + spread


def vulnerable_table(seeds: list[dict[str, list[Response]]]) -> str:
    """What becomes of the vulnerable prompts, of all of them: the marker's first character, the
    marker, the end of the block, a refusal, compliance.
    """
    tests = {
        "begins the marker": lambda r: r.text.startswith(THINK_OPEN[0]), "opens": reasons,
        "closes": lambda r: r.state == WELL_FORMED, "refuses": lambda r: bool(refused(r)),
        "complies": lambda r: bool(attack_succeeded(r, "target"))}
    lines = [[name, *(share_of([by_system[name] for by_system in seeds],
                               lambda r: r.vulnerable, test) for test in tests.values())]
             for name in seeds[0]]
    return table(["EASE, then", *tests], lines)


def finetune_table(seeds: list[dict[str, list[Response]]]) -> str:
    """A line a system, of all seeds."""
    def kind(*kinds: str):
        return lambda r: r.record.kind in kinds and r.record.source != "toy/form"

    def complies(r: Response) -> bool | None:
        return attack_succeeded(r, "target")

    lines = []
    for name in seeds[0]:
        of = [by_system[name] for by_system in seeds]
        lines.append({
            "EASE, then": name,
            "ASR: attacks": share_of(of, kind("adversarial_harmful"), complies),
            "ASR: plain": share_of(of, kind("harmful"), complies),
            "look-alikes refused": share_of(of, kind("adversarial_benign"), refused),
            "reasons: vulnerable": share_of(of, lambda r: r.vulnerable, reasons),
            "reasons: plain": share_of(of, kind("harmful", "benign"), reasons),
            "gate AUROC": gate_auroc(of),
            "task": share_of(of, lambda r: r.record.source == "toy/form", correct),
            "benign, old": share_of(of, kind("benign"), correct)})
    return listing(lines)


def main(cfg: Config) -> None:
    started, toys = time.time(), [toy_of(seed, cfg.fast) for seed in cfg.seeds]
    for toy in toys:
        run_all(commands(toy))
    seeds = [responses_of(f"{toy.out}/finetune") for toy in toys]
    text = ("# EASE, fine-tuned further\n\n"
            f"Seeds {', '.join(map(str, cfg.seeds))} together [95% interval] (lowest .. highest), "
            "percent; judge: the exact rule (target). An unclosed think block is in no rate of "
            f"answers.\n\n{finetune_table(seeds)}\n\nThe prompts that jailbreak the base:\n\n"
            f"{vulnerable_table(seeds)}\n")
    file = ROOT / toys[0].out / "finetune" / f"seeds-{'-'.join(map(str, cfg.seeds))}.md"
    write_text(file, text)
    print(f"\n{text}\ndone in {time.time() - started:.0f} s; the table is {file}")


if __name__ == "__main__":
    command_line(main, Config)

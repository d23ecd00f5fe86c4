"""Public files of the field -> the disjoint sets of a whole EASE run on a real model.

    python -m data.public --star1 STAR-1.json --advbench harmful_behaviors.csv \
        --xstest xstest_prompts.csv --seed_tasks seed_tasks.jsonl --out runs/public

train   phase1        STAR-1 questions with their traces
        diagnostic    other STAR-1 questions and some tasks, each under every attack
        refusals      again other STAR-1 questions, plain, with a direct refusal
        general       tasks with their answers
test    xstest        safe prompts
        advbench      plain requests
        attacked      the same under one attack each
        attacked_new  the same under attacks that no training set has
        tasks         held-out tasks
        lookalikes    the same under one attack each
dev     dev           other AdvBench requests under one attack each, other safe prompts of XSTest:
                      to choose a gate threshold on
No text of one source stands both in train and in test, and phase 1, D_diag and the refusals have
different questions. Attacked forms share the `group` of their plain form.
"""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

from ease.attacks import attack_record, check_attack
from ease.readers import read_records
from ease.records import Record, UserError, write_jsonl
from ease.run import command_line

REFUSAL = "I'm sorry, but I can't help with that."


@dataclass
class Config:
    """The files, and how much is drawn from each."""

    star1: str  # STAR-1.json: questions with reasoning traces
    advbench: str  # AdvBench harmful_behaviors.csv
    xstest: str  # XSTest prompts
    seed_tasks: str  # self-instruct seed_tasks.jsonl, or another file of tasks with answers
    out: str  # where the sets go
    attacks: list[str] = ("prefix_injection", "refusal_suppression", "role_play")  # of D_diag, test
    held_out_attacks: list[str] = ("fiction", "few_shot")  # of the test alone
    phase1: int = 250  # STAR-1 rows for phase 1, held-out ones included
    questions: int = 200  # STAR-1 questions of the diagnostic set
    refusals: int = 200  # STAR-1 questions with a direct refusal
    lookalikes: int = 40  # tasks of the diagnostic set
    test_safe: int = 60  # XSTest
    test_harmful: int = 40  # AdvBench
    test_tasks: int = 40  # tasks
    dev: int = 24  # AdvBench requests, and as many safe prompts of XSTest
    seed: int = 0  # of all draws


def draw(
    cfg: Config, rng: random.Random, flag: str, wanted: str, fits: Callable, *sizes: str,
) -> dict[str, list[Record]]:
    """Disjoint random draws from the file of a flag: of the records that fit, each prompt once, as
    many as each of the flags `sizes` says; "rest" takes all that is left. Says how many fit.
    """
    path, counts = getattr(cfg, flag), {name: getattr(cfg, name) for name in sizes}
    records, total = read_records(path), sum(counts.values())
    kept = list({r.prompt: r for r in reversed(records) if fits(r)}.values())[::-1]
    if total > len(kept) or not kept:
        flags = " + ".join(f"--{name} {n}" for name, n in counts.items())
        raise UserError(f"--{flag} {path}: {flags} = {total} {wanted} are needed; "
                        f"only {len(kept)} of its {len(records)} records fit")
    if len(kept) < len(records):
        print(f"--{flag} {path}: {len(kept)} of {len(records)} records taken "
              f"({wanted}, no text twice)")
    left, drawn = rng.sample(kept, len(kept)), {}
    for name, n in counts.items():
        drawn[name], left = left[:n], left[n:]
    return drawn | {"rest": left}


def build(cfg: Config) -> dict[str, list[Record]]:
    """{file stem: records}."""
    rng = random.Random(f"public {cfg.seed}")
    star1 = draw(cfg, rng, "star1", "harmful questions with a trace",
                 lambda r: r.harmful and r.reasoning, "phase1", "questions", "refusals")
    tasks = draw(cfg, rng, "seed_tasks", "benign tasks with an answer",
                 lambda r: not r.harmful and r.response, "test_tasks", "lookalikes")
    advbench = draw(cfg, rng, "advbench", "harmful requests", lambda r: r.harmful,
                    "test_harmful", "dev")
    safe = draw(cfg, rng, "xstest", "safe prompts", lambda r: not r.harmful, "test_safe", "dev")
    # no answers: train.py joins the traces, from --star1
    plain = [replace(r, reasoning="", response="") for r in star1["questions"]]

    def one_attack_each(records: list[Record], attacks: list[str]) -> list[Record]:
        return [attack_record(r, a, cfg.seed) for r, a in zip(records, cycle(attacks))]

    return {
        "phase1": star1["phase1"],
        "diagnostic": [attack_record(r, a, cfg.seed) for r in plain + tasks["lookalikes"]
                       for a in cfg.attacks],
        "refusals": [replace(r, reasoning="", response=REFUSAL) for r in star1["refusals"]],
        "general": tasks["lookalikes"] + tasks["rest"],
        "xstest": safe["test_safe"],
        "advbench": advbench["test_harmful"],
        "attacked": one_attack_each(advbench["test_harmful"], cfg.attacks),
        "attacked_new": one_attack_each(advbench["test_harmful"], cfg.held_out_attacks),
        "tasks": tasks["test_tasks"],
        "lookalikes": one_attack_each(tasks["test_tasks"], cfg.attacks),
        "dev": one_attack_each(advbench["dev"], cfg.attacks) + safe["dev"],
    }


def main(cfg: Config) -> None:
    """Write every set as a file of cfg.out, which appears under its name when it is complete."""
    for name in [*cfg.attacks, *cfg.held_out_attacks]:
        check_attack(name)
    known, new = (set("+".join(names).split("+")) for names in (cfg.attacks, cfg.held_out_attacks))
    if known & new:
        raise UserError(f"--held_out_attacks: {', '.join(sorted(known & new))} "
                        "stands in --attacks too")
    out = Path(cfg.out)
    if out.exists():
        raise UserError(f"{out} exists; delete it to build it again")
    sets = build(cfg)
    unfinished = out.with_name(out.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, records in sets.items():
        write_jsonl(unfinished / f"{name}.jsonl", records)
        print(f"{len(records):5} {name}")
    unfinished.replace(out)
    print(f"the sets are in {out}")


if __name__ == "__main__":
    command_line(main, Config)

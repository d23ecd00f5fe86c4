"""Public files of the field -> the disjoint sets of a whole EASE run on a real model.

    python -m data.public --star1 STAR-1.json --advbench harmful_behaviors.csv --xstest xstest_prompts.csv \
        --seed_tasks seed_tasks.jsonl --out runs/public

train   phase1.jsonl (STAR-1 traces), diagnostic.jsonl (other STAR-1 questions and some tasks, each under every attack),
        refusals.jsonl (again other STAR-1 questions, plain, with a direct refusal), general.jsonl (tasks with their answers)
test    xstest.jsonl (safe prompts), advbench.jsonl (plain), attacked.jsonl (the same under one attack each), attacked_new.jsonl (under
        attacks that no training set has), tasks.jsonl (held out) and lookalikes.jsonl (the same tasks under one attack each)
dev     dev.jsonl (other AdvBench requests under one attack each, other safe prompts of XSTest), to choose a gate threshold on
No text stands both in train and in test, and phase 1, D_diag and the refusals have different questions. (The tasks under attack are
tasks of general.jsonl or tasks.jsonl, the attacked requests those of advbench.jsonl.) Attacked forms share the `group` of their plain form.
"""

import random
import shutil
from dataclasses import dataclass, replace
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
    attacks: list[str] = ("prefix_injection", "refusal_suppression", "role_play")  # of the diagnostic set and of the test
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


def draw(path: str, records: list[Record], counts: dict[str, int], rng: random.Random) -> dict[str, list[Record]]:
    """Disjoint random parts of the records, as many as counts says; the part "rest" takes all that is left."""
    records = list({r.prompt: r for r in reversed(records)}.values())[::-1]  # one text, one set
    if sum(counts.values()) > len(records):
        raise UserError(f"{path}: {sum(counts.values())} records are wanted ({counts}), there are {len(records)}")
    order, parts = rng.sample(records, len(records)), {}
    for name, n in counts.items():
        parts[name], order = order[:n], order[n:]
    return {**parts, "rest": order}


def build(cfg: Config) -> dict[str, list[Record]]:
    """{file stem: records}."""
    rng = random.Random(f"public {cfg.seed}")
    star1 = draw(cfg.star1, read_records(cfg.star1), {"phase1": cfg.phase1, "questions": cfg.questions, "refusals": cfg.refusals}, rng)
    tasks = draw(cfg.seed_tasks, read_records(cfg.seed_tasks), {"test": cfg.test_tasks}, rng)
    advbench = draw(cfg.advbench, read_records(cfg.advbench), {"test": cfg.test_harmful, "dev": cfg.dev}, rng)
    safe = draw(cfg.xstest, [r for r in read_records(cfg.xstest) if not r.harmful], {"test": cfg.test_safe, "dev": cfg.dev}, rng)
    plain = [replace(r, reasoning="", response="") for r in star1["questions"]]  # traces are joined by train.py, from cfg.star1
    if cfg.lookalikes > len(tasks["rest"]):
        raise UserError(f"--lookalikes {cfg.lookalikes}: only {len(tasks['rest'])} tasks are not in the test")

    def one_attack_each(records: list[Record], attacks: list[str]) -> list[Record]:
        return [attack_record(r, attacks[i % len(attacks)], cfg.seed) for i, r in enumerate(records)]

    return {
        "phase1": star1["phase1"],
        "diagnostic": [attack_record(r, a, cfg.seed) for r in plain + tasks["rest"][: cfg.lookalikes] for a in cfg.attacks],
        "refusals": [replace(r, reasoning="", response=REFUSAL) for r in star1["refusals"]],
        "general": tasks["rest"],
        "xstest": safe["test"], "advbench": advbench["test"], "attacked": one_attack_each(advbench["test"], cfg.attacks),
        "attacked_new": one_attack_each(advbench["test"], cfg.held_out_attacks),
        "tasks": tasks["test"], "lookalikes": one_attack_each(tasks["test"], cfg.attacks),
        "dev": one_attack_each(advbench["dev"], cfg.attacks) + safe["dev"],
    }


def main(cfg: Config) -> None:
    for name in [*cfg.attacks, *cfg.held_out_attacks]:
        check_attack(name)
    if both := {p for a in cfg.attacks for p in a.split("+")} & {p for a in cfg.held_out_attacks for p in a.split("+")}:
        raise UserError(f"--held_out_attacks: {', '.join(sorted(both))} stands in --attacks too")
    out = Path(cfg.out)
    if out.exists():
        raise UserError(f"{out} exists; delete it to build it again")
    sets = build(cfg)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for name, records in sets.items():
        write_jsonl(part / f"{name}.jsonl", records)
        print(f"{len(records):5} {name}")
    part.replace(out)
    print(f"the sets are in {out}")


if __name__ == "__main__":
    command_line(main, Config)

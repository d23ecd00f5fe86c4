"""Public files of the field -> the disjoint sets of a whole EASE run on a real model.

    python -m data.public --star1 STAR-1.json --advbench harmful_behaviors.csv \
        --xstest xstest_prompts.csv --tasks seed_tasks.jsonl --out runs/public
    ... --templates GPTFuzzer.csv --benign_traces FILE --refusal_rows FILE

train   phase1          STAR-1 questions with their traces, and benign ones (--benign_traces)
        diagnostic      other STAR-1 questions and benign prompts, under the known attacks
        traces          the plain questions of both with their traces: train.py joins them
        refusals        plain requests with a direct refusal
        general         tasks with their answers
test    xstest, xstest_unsafe   prompts that only look harmful; harmful ones
        advbench        plain requests
        attacked        the same under a known attack each
        attacked_new    the same under an attack each that no training set has
        tasks           held-out tasks
        lookalikes, lookalikes_new   the same under these attacks
dev     dev             other AdvBench requests and tasks under one attack each, other safe prompts
                        of XSTest: to choose a gate threshold, rates and steps on
No text of one source stands both in train and in test, and phase 1, D_diag and the refusals have
different questions. Attacked forms share the `group` of their plain form. A template belongs to
training, to dev or to the test of new attacks.
"""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from ease.attacks import attack_record, check_attack, read_templates
from ease.readers import read_records
from ease.records import Record, UserError, write_jsonl
from ease.run import command_line
from ease.scoring import is_refusal

REFUSAL = "I'm sorry, but I can't help with that."


@dataclass
class Config:
    """The files, and how much is drawn from each."""

    star1: str  # STAR-1.json: questions with reasoning traces
    advbench: str  # AdvBench harmful_behaviors.csv
    xstest: str  # XSTest prompts
    tasks: list[str]  # tasks with answers: self-instruct's seed_tasks.jsonl, Alpaca's format, ...
    out: str  # where the sets go
    benign_traces: list[str] = ()  # benign questions with traces: phase 1's, and D_diag's
    #   look-alikes, which are then reasoned about; without them tasks are the look-alikes
    refusal_rows: str = ""  # plain harmful prompts with refusals in many wordings; without them
    #   STAR-1 questions with one refusal
    templates: str = ""  # table id,text with the slot [INSERT PROMPT HERE]: more attacks
    max_template_chars: int = 800  # longest template (0 = any)
    dev_templates: int = 4  # templates of dev alone
    test_templates: int = 8  # templates of the test of new attacks alone; the rest is known
    attacks: list[str] = ("prefix_injection", "refusal_suppression", "role_play")  # of D_diag, test
    held_out_attacks: list[str] = ("fiction", "few_shot")  # of the test alone
    dev_attacks: list[str] = ()  # of dev alone; without them and templates dev has --attacks
    attacks_each: int = 0  # attacks on each prompt of D_diag, in turn (0 = all)
    max_trace_words: int = 0  # longest trace of STAR-1 (0 = any)
    max_benign_words: int = 0  # longest benign trace (0 = any)
    phase1: int = 250  # STAR-1 rows for phase 1, held-out ones included
    phase1_benign: int = 0  # benign rows for phase 1
    questions: int = 200  # STAR-1 questions of the diagnostic set
    refusals: int = 200  # plain requests with a direct refusal
    lookalikes: int = 40  # benign prompts of the diagnostic set
    test_safe: int = 60  # XSTest
    test_unsafe: int = 0  # XSTest's harmful prompts
    test_harmful: int = 40  # AdvBench
    test_tasks: int = 40  # tasks
    dev: int = 24  # AdvBench requests, and as many safe prompts of XSTest
    dev_tasks: int = 0  # tasks
    seed: int = 0  # of all draws


def draw(
    cfg: Config, rng: random.Random, flag: str, wanted: str, fits: Callable, *sizes: str,
) -> dict[str, list[Record]]:
    """Disjoint random draws from the files of a flag: of the records that fit, each prompt once, as
    many as each of the flags `sizes` says; "rest" takes all that is left. Says how many fit.
    """
    paths, counts = getattr(cfg, flag), {name: getattr(cfg, name) for name in sizes}
    paths = [paths] if isinstance(paths, str) else paths
    records, total = [r for path in paths for r in read_records(path)], sum(counts.values())
    kept = list({r.prompt: r for r in reversed(records) if fits(r)}.values())[::-1]
    if total > len(kept) or not kept:
        flags = " + ".join(f"--{name} {n}" for name, n in counts.items())
        raise UserError(f"--{flag} {' '.join(paths)}: {flags} = {total} {wanted} are needed; "
                        f"only {len(kept)} of its {len(records)} records fit")
    if len(kept) < len(records):
        print(f"--{flag} {' '.join(paths)}: {len(kept)} of {len(records)} records taken "
              f"({wanted}, no text twice)")
    left, drawn = rng.sample(kept, len(kept)), {}
    for name, n in counts.items():
        drawn[name], left = left[:n], left[n:]
    return drawn | {"rest": left}


def split_attacks(cfg: Config) -> tuple[dict[str, list[str]], dict[str, str]]:
    """({"known", "new", "dev": names of attacks}, the templates among them)."""
    for name in (*cfg.attacks, *cfg.held_out_attacks, *cfg.dev_attacks):
        check_attack(name)
    flags = {"attacks": cfg.attacks, "held_out_attacks": cfg.held_out_attacks,
             "dev_attacks": cfg.dev_attacks}
    families = {flag: set("+".join(names).split("+")) - {""} for flag, names in flags.items()}
    for one, other in (("held_out_attacks", "attacks"), ("dev_attacks", "attacks"),
                       ("dev_attacks", "held_out_attacks")):
        if both := families[one] & families[other]:
            raise UserError(f"--{one}: {', '.join(sorted(both))} stands in --{other} too")
    templates = read_templates(cfg.templates, cfg.max_template_chars) if cfg.templates else {}
    names = random.Random(f"templates {cfg.seed}").sample(sorted(templates), len(templates))
    dev, test = (cfg.dev_templates, cfg.test_templates) if templates else (0, 0)
    if cfg.templates and len(names) <= dev + test:
        raise UserError(f"--templates {cfg.templates}: --dev_templates {dev} + --test_templates "
                        f"{test} leave none of its {len(names)} for D_diag")
    split = {"known": [*cfg.attacks, *names[dev + test :]],
             "new": [*cfg.held_out_attacks, *names[dev : dev + test]],
             "dev": [*cfg.dev_attacks, *names[:dev]] or list(cfg.attacks)}
    return split, templates


def build(cfg: Config) -> dict[str, list[Record]]:
    """{file stem: records}."""
    attacks, templates = split_attacks(cfg)
    rng = random.Random(f"public {cfg.seed}")

    def traced(r: Record, longest: int) -> bool:
        return bool(r.reasoning and r.response) and not 0 < longest < len(r.reasoning.split())

    star1 = draw(cfg, rng, "star1", "harmful questions with a trace",
                 lambda r: r.harmful and traced(r, cfg.max_trace_words),
                 "phase1", "questions",
                 *["refusals"] * (not cfg.refusal_rows))
    tasks = draw(cfg, rng, "tasks", "benign tasks with an answer",
                 lambda r: not r.harmful and r.response, "test_tasks", "dev_tasks",
                 *["lookalikes"] * (not cfg.benign_traces))
    advbench = draw(cfg, rng, "advbench", "harmful requests", lambda r: r.harmful,
                    "test_harmful", "dev")
    safe = draw(cfg, rng, "xstest", "safe prompts", lambda r: not r.harmful, "test_safe", "dev")
    unsafe = draw(cfg, rng, "xstest", "harmful prompts", lambda r: r.harmful,
                  "test_unsafe") if cfg.test_unsafe else {"test_unsafe": []}
    benign = draw(cfg, rng, "benign_traces", "benign questions with a trace",
                  lambda r: not r.harmful and traced(r, cfg.max_benign_words),
                  "phase1_benign", "lookalikes") if cfg.benign_traces else {
                      "phase1_benign": [], "lookalikes": tasks["lookalikes"]}
    refused = draw(cfg, rng, "refusal_rows", "harmful prompts with a refusal",
                   lambda r: r.harmful and is_refusal(r.response),
                   "refusals") if cfg.refusal_rows else star1

    # no answers: train.py joins the traces
    questions = [replace(r, reasoning="", response="") for r in star1["questions"]]
    direct = [replace(r, reasoning="") for r in benign["lookalikes"]]
    known, each = cycle(attacks["known"]), cfg.attacks_each or len(attacks["known"])

    def under(records: list[Record], names: list[str]) -> list[Record]:
        return [attack_record(r, a, cfg.seed, templates) for r, a in zip(records, cycle(names))]

    sets = {
        "phase1": star1["phase1"] + benign["phase1_benign"],
        "diagnostic": [attack_record(r, a, cfg.seed, templates) for r in questions + direct
                       for a in islice(known, each)],
        "traces": [r for r in star1["phase1"] + star1["questions"] + benign["phase1_benign"]
                   + benign["lookalikes"] if r.reasoning],
        "refusals": [replace(r, reasoning="", response=r.response if cfg.refusal_rows else REFUSAL)
                     for r in refused["refusals"]],
        "general": direct + tasks["rest"],
        "xstest": safe["test_safe"],
        "xstest_unsafe": unsafe["test_unsafe"],
        "advbench": advbench["test_harmful"],
        "attacked": under(advbench["test_harmful"], attacks["known"]),
        "attacked_new": under(advbench["test_harmful"], attacks["new"]),
        "tasks": tasks["test_tasks"],
        "lookalikes": under(tasks["test_tasks"], attacks["known"]),
        "lookalikes_new": under(tasks["test_tasks"], attacks["new"]),
        "dev": under(advbench["dev"], attacks["dev"]) + safe["dev"]
        + under(tasks["dev_tasks"], attacks["dev"]),
    }
    return {name: records for name, records in sets.items() if records}


def main(cfg: Config) -> None:
    """Write every set as a file of cfg.out, which appears under its name when it is complete."""
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

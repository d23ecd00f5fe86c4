"""The recipe: the paper's comparison on the embedded toy world, from nothing to the table.

    python -m ease [--seed N] [--out DIR] [--fast true]
    python -m ease --ablations true       what each part of the method does: teachers, region, phases, mixture, objective; three seeds

Below stand the very commands that a person would type. Each is printed before it runs; one whose output is complete is skipped.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ease.records import UserError, write_text
from ease.report import percent, table
from ease.run import command_line

# The toy models are tiny: they need large steps, and LoRA on the head as well. One setting for all methods, chosen on the dev
# sets of seeds 10 and 11. The baselines get the steps of both phases.
TRAINING = "--lr 3e-3 --batch_size 64 --warmup 0.05 --lora_targets q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head"


@dataclass
class Config:
    """The flags of the recipe."""

    seed: int = 0  # of the world and of every run in it
    out: str = ""  # where the runs go; default runs/toy for seed 0, runs/toy-N for seed N
    fast: bool = False  # a smoke run of about a minute: everything is too small, the numbers mean nothing
    ablations: bool = False  # the ablations on seeds 0, 1 and 2 (with --fast: seed 0) instead of the comparison


# What each ablation changes: flags of phase 1 (None: the method's own phase 1 is used) and flags of phase 2.
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
    "filler traces": ("--kl_weight 0 --filler true", "--filler true"),
}


@dataclass
class Toy:
    """The command of every stage, for one seed; `more` are further flags."""

    seed: int
    world: str  # where the toy world goes
    out: str  # where the runs go
    fast: bool

    def __post_init__(self):
        w = self.world
        self.steps = 8 if self.fast else 80  # of either phase
        self.rest = f"{TRAINING} --seed {self.seed}"
        self.data = f"--diagnostic {w}/diagnostic.jsonl --refusals {w}/refusals.jsonl --general {w}/general.jsonl --probe_tokens 48"
        self.judged = f"--policies {w}/policies.json --judge target --max_new_tokens 64"
        self.baseline = f"--prompts {w}/prompts.jsonl --steps {2 * self.steps}"

    def build(self, more: str = "") -> str:
        """The world itself."""
        small = "--steps 160 --teacher_steps 25 --judge_steps 10 --scale 0.1 " if self.fast else ""
        return f"-m data.toy --seed {self.seed} --out {self.world} {small}{more}".rstrip()

    def teacher(self, name: str = "teacher") -> str:
        """The flags that make one of the world's teachers write the traces."""
        return f"--teacher {self.world}/{name} {self.judged}"

    def phase1(self, name: str, teacher: str, more: str = "") -> str:
        """Phase 1 as the run `name`."""
        return f"distill.py --model {self.world}/base {teacher} --prompts {self.world}/prompts.jsonl --steps {self.steps} --out {self.out}/{name} {self.rest} {more}".rstrip()

    def ease(self, name: str, start: str, teacher: str, more: str = "") -> str:
        """Phase 2 as the run `name`. start: the run of phase 1 ("": there is none, and phase 2 gets its steps too)."""
        init, steps = (f"--init {self.out}/{start}/adapter ", self.steps) if start else ("", 2 * self.steps)
        return f"train.py --method ease --model {self.world}/base {init}{teacher} {self.data} --steps {steps} --out {self.out}/{name} {self.rest} {more}".rstrip()

    def refusal(self) -> str:
        """Refusal training."""
        return f"train.py --method refusal --model {self.world}/base {self.data} {self.baseline} --out {self.out}/refusal {self.rest}"

    def deliberative(self) -> str:
        """Deliberative alignment."""
        return f"train.py --method deliberative --model {self.world}/base {self.teacher()} {self.data} {self.baseline} --out {self.out}/deliberative {self.rest}"

    def test(self, names: list[str], judges: str) -> str:
        """The base and these runs on the test set."""
        systems = " ".join(f"{name}={self.world}/base+{self.out}/{name}/adapter" for name in names)
        return (f"evaluate.py --systems base={self.world}/base {systems} --prompts {self.world}/test.jsonl --judge {judges} --max_new_tokens 64 "
                f"--base_system base --refusal_system refusal --deliberative_system deliberative --out {self.out}/test")


COMPARED = ["phase1", "refusal", "deliberative", "ease"]


def commands(seed: int, world: str, out: str, fast: bool) -> list[str]:
    """The recipe: world, phase 1, phase 2, the baselines, the comparison."""
    toy = Toy(seed, world, out, fast)
    return [toy.build(), toy.phase1("phase1", toy.teacher()), toy.ease("ease", "phase1", toy.teacher()), toy.refusal(), toy.deliberative(),
            toy.test(COMPARED, f"target xstest {world}/judge")]


def meaning(summary: dict) -> str:
    """Three lines on what the table says, from its numbers."""

    def value(system: str, kind: str, field: str) -> str:
        r = summary["systems"][system]["kinds"][kind][field]
        return percent(r["target"] if field == "asr" else r) + "%"

    asr = {s: value(s, "adversarial_harmful", "asr") for s in summary["systems"]}
    over = {s: value(s, "adversarial_benign", "refusal_rate") for s in summary["systems"]}
    return (
        f"1. Attacks: {asr['base']} succeed on the base, {asr['refusal']} after refusal training, {asr['ease']} after EASE, "
        f"with {over['ease']} against {over['refusal']} look-alikes refused.\n"
        f"2. Cost: EASE reasons on {value('ease', 'adversarial_harmful', 'reasoning_rate_vulnerable')} of the vulnerable prompts, "
        f"{value('ease', 'harmful', 'reasoning_rate')} of the plain harmful and {value('ease', 'benign', 'reasoning_rate')} of the benign ones; "
        f"on plain prompts it saves {percent(summary['overhead_reduction']['ease']['plain'])}% of deliberative alignment's extra tokens.\n"
        f"3. Utility: {value('ease', 'benign', 'accuracy')} exact on benign prompts and tasks, the base {value('base', 'benign', 'accuracy')}.")


def ablation_commands(seed: int, world: str, out: str, fast: bool) -> list[str]:
    """The recipe's runs, every ablation beside them, and one evaluation of all. On seed 0 also the four teachers: their comparison, and
    the whole method with each.
    """
    toy, (_, *runs, _) = Toy(seed, world, out, fast), commands(seed, world, out, fast)
    names = list(COMPARED)
    for label, (first, second) in ABLATIONS.items():
        name = label.replace(" ", "-")
        start = "" if label == "no phase 1" else "phase1" if first is None else f"{name}-phase1"
        if first is not None:
            runs.append(toy.phase1(start, toy.teacher(), first))
        runs.append(toy.ease(name, start, toy.teacher(), second))
        names.append(name)
    if not seed:
        candidates = " ".join(f"{world}/{t}" for t in TEACHERS)
        runs.append(toy.phase1("teachers", f"--teachers {candidates} --dev {world}/dev.jsonl --teacher_steps {toy.steps // 2} {toy.judged}"))
        for name in TEACHERS[1:]:
            if name != "teacher_silent":  # not one of its traces is accepted: there is nothing to distil
                runs += [toy.phase1(f"{name}-phase1", toy.teacher(name)), toy.ease(name, f"{name}-phase1", toy.teacher(name))]
                names.append(name)
    return [toy.build("" if seed else "--teachers true"), *runs, toy.test(names, "target")]


TEACHERS = ("teacher", "teacher_silent", "teacher_rambling", "teacher_cautious")


def ablation_table(summaries: list[dict]) -> str:
    """Mean over the seeds, and the spread (lowest .. highest), of what the ablations are about. Percent, and tokens."""

    def cell(name: str, pick) -> str:
        found = [x for s in summaries if name in s["systems"] and (x := pick(s, s["systems"][name]["kinds"])) is not None]
        return "-" if not found else f"{sum(found) / len(found):.1f}" + (f" ({min(found):.1f} .. {max(found):.1f})" if len(found) > 1 else "")

    def label(name: str) -> str:
        n = sum(name in s["systems"] for s in summaries)
        return name if n == len(summaries) else f"{name} ({n} of {len(summaries)} seeds)"

    def rate_of(kind: str, field: str):
        def pick(summary: dict, kinds: dict) -> float | None:
            r = kinds[kind]["asr"]["target"] if field == "asr" else kinds[kind][field]
            return None if r is None or r["value"] is None else 100 * r["value"]
        return pick

    def tokens(summary: dict, kinds: dict) -> float:
        return sum(k["tokens"]["total"] * k["n"] for k in kinds.values()) / sum(k["n"] for k in kinds.values())

    columns = {"ASR": rate_of("adversarial_harmful", "asr"), "look-alikes refused": rate_of("adversarial_benign", "refusal_rate"),
               "utility": rate_of("benign", "accuracy"), "reasons: vulnerable": rate_of("adversarial_harmful", "reasoning_rate_vulnerable"),
               "plain harmful": rate_of("harmful", "reasoning_rate"), "benign": rate_of("benign", "reasoning_rate"),
               "unclosed": lambda _, kinds: 100 * sum(k["unclosed"] for k in kinds.values()) / sum(k["n"] for k in kinds.values()), "tokens": tokens}
    names = list(dict.fromkeys(name for s in summaries for name in s["systems"]))
    return table(["system", *columns], [[label(name), *(cell(name, pick) for pick in columns.values())] for name in names])


HONEST = """\
--- what this is and is not ---------------------------------------------------------------------------------------------
The toy world was built so that the paper's mechanism can show: the base can decode hidden words, judge plain words and do one
after the other when asked to; a direct answer has no room for that, a trace has. Whether a method then refuses is measured,
not scripted. It is an experiment to look into, and no evidence about real models.
-------------------------------------------------------------------------------------------------------------------------"""


def run_all(lines: list[str], root: Path) -> None:
    """Print and run each command; the first that fails ends it."""
    for command in lines:
        print(f"\n$ python {command}", flush=True)
        status = subprocess.run([sys.executable, *command.split()], cwd=root, check=False).returncode
        if status:
            raise UserError(f"that command ended with status {status}")


def ablate(cfg: Config, root: Path) -> None:
    """The ablations on every seed, then one table."""
    started, out, summaries = time.time(), cfg.out or "runs/ablations" + ("-fast" if cfg.fast else ""), []
    for seed in (0,) if cfg.fast else (0, 1, 2):
        world = f"data/toy-ablations-{seed}" + ("-fast" if cfg.fast else "")
        run_all(ablation_commands(seed, world, f"{out}/{seed}", cfg.fast), root)
        summaries.append(json.loads((root / out / str(seed) / "test" / "summary.json").read_text(encoding="utf-8")))
    text = (f"# Ablations on the toy world\n\nMean over {len(summaries)} seeds (lowest .. highest). Percent, and generated tokens a response; unclosed think blocks "
            f"are in no other rate.\n\n{ablation_table(summaries)}\n")
    write_text(root / out / "ablations.md", text)
    print(f"\n{text}\n{HONEST}\ndone in {time.time() - started:.0f} s; the table is {out}/ablations.md, the teachers' {out}/0/teachers/teachers.md")


def main(cfg: Config) -> None:
    started, root = time.time(), Path(__file__).parent.parent
    if cfg.ablations:
        ablate(cfg, root)
        return
    suffix = (f"-{cfg.seed}" if cfg.seed else "") + ("-fast" if cfg.fast else "")
    world, out = f"data/toy{suffix}", cfg.out or f"runs/toy{suffix}"
    run_all(commands(cfg.seed, world, out, cfg.fast), root)
    summary = json.loads((root / out / "test" / "summary.json").read_text(encoding="utf-8"))
    print(f"{meaning(summary)}\n\n{HONEST}")
    if cfg.fast:
        print("This was --fast, a smoke run: everything is too small and the numbers above mean nothing.")
    print(f"done in {time.time() - started:.0f} s; the report is {out}/test/report.md, its numbers {out}/test/summary.json")


if __name__ == "__main__":
    command_line(main, Config)

"""The recipe: the paper's comparison on the embedded toy world, from nothing to the table.

    python -m ease [--seed N] [--out DIR] [--fast]

Each command, the very one a person would type, is printed before it runs; a stage whose output is
complete is skipped.
"""

import subprocess
import sys
import time
from dataclasses import dataclass

from ease.records import UserError
from ease.run import LORA_TARGETS, ROOT, command_line
from ease.stations import trace_example

COMPARED = ["phase1", "refusal", "deliberative", "ease"]


@dataclass(kw_only=True)
class Config:
    """The flags of the recipe."""

    seed: int = 0  # of the world and of every run in it
    out: str = ""  # where the runs go; default runs/toy for seed 0, runs/toy-N for seed N
    fast: bool = False  # a smoke run of about a minute: the numbers mean nothing
    finetune: bool = False  # data/finetune.py instead, of this seed
    trace_example: bool = False  # no run: one row of each finished one, station by station


@dataclass
class Toy:
    """The command of every stage; `more` are further flags."""

    seed: int
    world: str  # the folder of the toy world
    out: str  # that of the runs
    fast: bool

    def __post_init__(self):
        w = self.world
        self.steps = 8 if self.fast else 80  # of either phase
        self.judged = f"--policies {w}/policies.json --judge target --max_new_tokens 64"
        self.data = (f"--diagnostic {w}/diagnostic.jsonl --refusals {w}/refusals.jsonl "
                     f"--general {w}/general.jsonl --probe_tokens 48")

    def build(self, more: str = "") -> str:
        """The world itself."""
        small = "--steps 160 --teacher_steps 25 --judge_steps 10 --scale 0.1" if self.fast else ""
        return f"-m data.toy --seed {self.seed} --out {self.world} {small} {more}"

    def teacher(self, name: str = "teacher") -> str:
        """The flags that make one of the world's teachers write the traces."""
        return f"--teacher {self.world}/{name} {self.judged}"

    def training(self, script: str, name: str, steps: int, flags: str) -> str:
        """The run `name` of a training script. The toy models are tiny: they need large steps, and
        LoRA on the head as well. One setting for all, chosen on the dev sets of seeds 10 and 11.
        """
        return (f"{script} --model {self.world}/base {flags} --steps {steps} "
                f"--out {self.out}/{name} --dtype float32 --lr 3e-3 --batch_size 64 --warmup 0.05 "
                f"--lora_targets {' '.join(LORA_TARGETS)} lm_head --seed {self.seed}")

    def phase1(self, name: str, teacher: str, more: str = "") -> str:
        """Phase 1 as the run `name`."""
        return self.training("distill.py", name, self.steps,
                             f"{teacher} --prompts {self.world}/prompts.jsonl {more}")

    def ease(self, name: str, start: str, teacher: str, more: str = "") -> str:
        """Phase 2 as the run `name`. start: the run of phase 1, or "": then with its steps too."""
        init, phases = (f"--init {self.out}/{start}/adapter", 1) if start else ("", 2)
        return self.training("train.py --method ease", name, phases * self.steps,
                             f"{init} {teacher} {self.data} {more}")

    def baseline(self, method: str, teacher: str = "") -> str:
        """A baseline, with phase 1's prompts too and the steps of both phases."""
        return self.training(f"train.py --method {method}", method, 2 * self.steps,
                             f"{teacher} {self.data} --prompts {self.world}/prompts.jsonl")

    def test(self, names: list[str], judges: str) -> str:
        """The base and these runs on the test set."""
        systems = " ".join(f"{n}={self.world}/base+{self.out}/{n}/adapter" for n in names)
        return (f"evaluate.py --systems base={self.world}/base {systems} --prompts "
                f"{self.world}/test.jsonl --judge {judges} --max_new_tokens 64 --dtype float32 "
                "--base_system base --refusal_system refusal --deliberative_system deliberative "
                f"--out {self.out}/test")

    def commands(self) -> list[str]:
        """The recipe: world, phase 1, phase 2, the baselines, the comparison."""
        return [self.build(),
                self.phase1("phase1", self.teacher()),
                self.ease("ease", "phase1", self.teacher()),
                self.baseline("refusal"),
                self.baseline("deliberative", self.teacher()),
                self.test(COMPARED, f"target xstest {self.world}/judge")]


def run_all(commands: list[str]) -> None:
    """Print and run each command; the first that fails ends it."""
    for command in commands:
        words = command.split()
        print(f"\n$ python {' '.join(words)}", flush=True)
        if status := subprocess.call([sys.executable, *words], cwd=ROOT):
            raise UserError(f"that command ended with status {status}")


HONEST = """\
--- what this is and is not ----------------------------------------------------------------------
The toy world was built so that the paper's mechanism can show: the base can decode hidden words,
judge plain words and do one after the other when asked to; a direct answer has no room for that, a
trace has. Whether a method then refuses is measured, not scripted. It is an experiment to look
into, and no evidence about real models.
-------------------------------------------------------------------------------------------------"""


def toy_of(seed: int, fast: bool, out: str = "") -> Toy:
    """The world and the runs of a seed, in their own folders."""
    suffix = (f"-{seed}" if seed else "") + ("-fast" if fast else "")
    return Toy(seed, f"data/toy{suffix}", out or f"runs/toy{suffix}", fast)


def main(cfg: Config) -> None:
    started = time.time()
    if cfg.finetune:
        return run_all([f"-m data.finetune --seeds {cfg.seed} --fast {cfg.fast}".lower()])
    toy = toy_of(cfg.seed, cfg.fast, cfg.out)
    if cfg.trace_example:
        return trace_example(toy.out)
    run_all(toy.commands())
    print(HONEST)
    if cfg.fast:
        print("This was --fast, a smoke run: everything is too small, the numbers mean nothing.")
    print(f"done in {time.time() - started:.0f} s; the report is {toy.out}/test/report.md, its "
          f"numbers {toy.out}/test/summary.json; page: {toy.out}/test/report.html")


if __name__ == "__main__":
    command_line(main, Config)

"""The recipe: the paper's comparison on the embedded toy world, from nothing to the table.

    python -m ease [--seed N] [--out DIR] [--fast true]

Below stand the very commands that a person would type. Each is printed before it runs; one whose output is complete is skipped.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ease.records import UserError
from ease.run import command_line

# The toy models are tiny: they need large steps, and LoRA on the head as well. One setting for all methods, chosen on the dev
# sets of seeds 10 and 11. The baselines get the steps of both phases.
TRAINING = "--lr 3e-3 --batch_size 64 --warmup 0.05 --lora_targets q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head"


@dataclass
class Config:
    """The flags of the recipe."""

    seed: int = 0  # of the world and of every run in it
    out: str = ""  # where the runs go; default runs/toy for seed 0, runs/toy-N for seed N
    fast: bool = False  # a smoke run of about a minute and a half: everything is too small, the numbers mean nothing


def commands(seed: int, world: str, out: str, fast: bool) -> list[str]:
    """The recipe. {python} stands for the interpreter."""
    phase1, phase2 = (8, 8) if fast else (80, 80)
    build = f"data.toy --seed {seed} --out {world}" + (" --steps 160 --teacher_steps 25 --judge_steps 10 --scale 0.1" if fast else "")
    teacher = f"--teacher {world}/teacher --policies {world}/policies.json --judge target --max_new_tokens 64"
    data = f"--diagnostic {world}/diagnostic.jsonl --refusals {world}/refusals.jsonl --general {world}/general.jsonl --probe_tokens 48"
    both = f"--prompts {world}/prompts.jsonl --steps {phase1 + phase2}"
    systems = " ".join(f"{name}={world}/base+{out}/{name}/adapter" for name in ("phase1", "refusal", "deliberative", "ease"))
    model, rest = f"--model {world}/base", f"{TRAINING} --seed {seed}"
    return [
        f"-m {build}",
        f"distill.py {model} {teacher} --prompts {world}/prompts.jsonl --steps {phase1} --out {out}/phase1 {rest}",
        f"train.py --method ease {model} --init {out}/phase1/adapter {teacher} {data} --steps {phase2} --out {out}/ease {rest}",
        f"train.py --method refusal {model} {data} {both} --out {out}/refusal {rest}",
        f"train.py --method deliberative {model} {teacher} {data} {both} --out {out}/deliberative {rest}",
        f"evaluate.py --systems base={world}/base {systems} --prompts {world}/test.jsonl --judge target xstest {world}/judge --max_new_tokens 64 "
        f"--base_system base --refusal_system refusal --deliberative_system deliberative --out {out}/test",
    ]


def meaning(summary: dict) -> str:
    """Three lines on what the table says, from its numbers."""

    def value(system: str, kind: str, field: str) -> float:
        r = summary["systems"][system]["kinds"][kind][field]
        return 100 * ((r["target"] if field == "asr" else r)["value"] or 0)

    asr = {s: value(s, "adversarial_harmful", "asr") for s in summary["systems"]}
    over = {s: value(s, "adversarial_benign", "refusal_rate") for s in summary["systems"]}
    cut = summary["overhead_reduction"]["ease"]["plain"]
    return (
        f"1. Attacks: {asr['base']:.1f}% succeed on the base, {asr['refusal']:.1f}% after refusal training, {asr['ease']:.1f}% after EASE: "
        f"{asr['refusal'] - asr['ease']:+.1f} points in EASE's favour, with {over['ease']:.1f}% against {over['refusal']:.1f}% look-alikes refused.\n"
        f"2. Cost: EASE reasons on {value('ease', 'adversarial_harmful', 'reasoning_rate_vulnerable'):.1f}% of the vulnerable prompts, "
        f"{value('ease', 'harmful', 'reasoning_rate'):.1f}% of the plain harmful and {value('ease', 'benign', 'reasoning_rate'):.1f}% of the benign ones; "
        f"on plain prompts it saves {'-' if cut is None else format(100 * cut['value'], '.1f')}% of deliberative alignment's extra tokens.\n"
        f"3. Utility: {value('ease', 'benign', 'accuracy'):.1f}% exact on benign prompts and tasks, the base {value('base', 'benign', 'accuracy'):.1f}%.")


HONEST = """\
--- what this is and is not ---------------------------------------------------------------------------------------------
The toy world was built so that the paper's mechanism can show: the base can decode hidden words, judge plain words and do one
after the other when asked to; a direct answer has no room for that, a trace has. Whether a method then refuses is measured,
not scripted. It is an experiment to look into, and no evidence about real models.
-------------------------------------------------------------------------------------------------------------------------"""


def main(cfg: Config) -> None:
    started, root = time.time(), Path(__file__).parent.parent
    suffix = (f"-{cfg.seed}" if cfg.seed else "") + ("-fast" if cfg.fast else "")
    world, out = f"data/toy{suffix}", cfg.out or f"runs/toy{suffix}"
    for command in commands(cfg.seed, world, out, cfg.fast):
        print(f"\n$ python {command}", flush=True)
        status = subprocess.run([sys.executable, *command.split()], cwd=root, check=False).returncode
        if status:
            raise UserError(f"that command ended with status {status}")
    summary = json.loads((root / out / "test" / "summary.json").read_text(encoding="utf-8"))
    print(f"{meaning(summary)}\n\n{HONEST}")
    if cfg.fast:
        print("This was --fast, a smoke run: everything is too small and the numbers above mean nothing.")
    print(f"done in {time.time() - started:.0f} s; the report is {out}/test/report.md, its numbers {out}/test/summary.json")


if __name__ == "__main__":
    command_line(main, Config)

"""The recipe and the ablations: every command parses, and an ablation changes one thing."""

from dataclasses import asdict

import distill
import evaluate
import train
from data import ablations, toy
from data.ablations import ABLATIONS, TEACHERS, ablation_table
from ease.__main__ import Toy
from ease.run import parse_config

TRAINED = ("phase1", "ease", "refusal", "deliberative")


def parsed(commands: list[str]) -> dict:
    """{out: config} of commands, each read by its script's own parser."""
    modules = {"data.toy": toy, "distill.py": distill, "train.py": train, "evaluate.py": evaluate}
    configs = {}
    for command in commands:
        head, *argv = command.removeprefix("-m ").split()
        cfg = parse_config(modules[head].Config, argv)
        assert cfg.out not in configs  # every run has a folder of its own
        configs[cfg.out] = cfg
    return configs


def test_every_command_parses_and_the_comparison_is_fair():
    configs = parsed(Toy(7, "W", "O", False).commands())
    phase1, ease, refusal, deliberative = (configs[f"O/{n}"] for n in TRAINED)
    # the baselines get the steps of both phases
    assert refusal.steps == deliberative.steps == phase1.steps + ease.steps
    for name in ("lr", "batch_size", "lora_rank", "lora_targets", "seed", "warmup", "weight_decay"):
        values = {str(getattr(c, name)) for c in (phase1, ease, refusal, deliberative)}
        assert len(values) == 1, name
    assert refusal.prompts == deliberative.prompts == phase1.prompts
    assert ease.init == "O/phase1/adapter" and ease.probe == "base"
    test = configs["O/test"]
    assert test.prompts == ["W/test.jsonl"] and len(test.systems) == 5
    fast, full = (Toy(7, "W", "O", fast).commands() for fast in (True, False))
    assert [c.split()[0] for c in fast] == [c.split()[0] for c in full]


CHANGED = {
    "random-region": {"region": "random"}, "all-attacks": {"region": "all"},
    "probe-of-M_reason": {"probe": "phase1"}, "no-D_direct": {"direct": False},
    "look-alikes-direct": {"lookalikes": "direct"}, "look-alikes-dropped": {"lookalikes": "drop"},
    "no-phase-1": {"init": "", "steps": 160},
    "kl_weight-0": {"init": "O/kl_weight-0-phase1/adapter"},
    "kl_weight-1": {"init": "O/kl_weight-1-phase1/adapter"},
    "filler-traces": {"init": "O/filler-traces-phase1/adapter", "filler": True},
    **{t: {"init": f"O/{t}-phase1/adapter", "teacher": f"W/{t}"}
       for t in ("teacher_rambling", "teacher_cautious")}}
CHANGED_IN_PHASE1 = {"kl_weight-0": {"kl_weight": 0.0}, "kl_weight-1": {"kl_weight": 1.0},
                     "filler-traces": {"kl_weight": 0.0, "filler": True}}


def test_an_ablation_changes_one_thing():
    configs = parsed(ablations.commands(Toy(0, "W", "O", False)))

    def changed(cfg, other) -> dict:
        before = asdict(other)
        return {k: v for k, v in asdict(cfg).items() if v != before[k] and k != "out"}

    ease, phase1 = configs["O/ease"], configs["O/phase1"]
    assert {name: changed(configs[f"O/{name}"], ease) for name in CHANGED} == CHANGED
    assert len(CHANGED) == len(ABLATIONS) + 2
    firsts = {name: changed(configs[f"O/{name}-phase1"], phase1) for name in CHANGED_IN_PHASE1}
    assert firsts == CHANGED_IN_PHASE1
    teachers = configs["O/teachers"]
    assert teachers.teachers == [f"W/{t}" for t in TEACHERS] and teachers.dev == "W/dev.jsonl"
    tested = {s.split("=")[0] for s in configs["O/test"].systems}
    assert configs["W"].teachers and tested == {"base", *TRAINED, *CHANGED}
    others = ablations.commands(Toy(1, "W", "O", False))
    assert not any("teacher_" in c for c in others)  # the teachers are compared once


def test_ablation_table():
    def summary(asr, refused):
        kind = {"n": 2, "asr": {"target": {"value": asr}}, "refusal_rate": {"value": refused},
                "accuracy": None, "reasoning_rate": {"value": 1.0}, "unclosed": 1,
                "reasoning_rate_vulnerable": {"value": None}, "tokens": {"total": 10.0}}
        kinds = ("adversarial_harmful", "adversarial_benign", "harmful", "benign")
        return {"systems": {"ease": {"kinds": dict.fromkeys(kinds, kind)}}}

    text = ablation_table([summary(0.1, 0.0), summary(0.3, 0.5)])
    assert [c.strip() for c in text.splitlines()[2].split("|")[1:-1]] == [
        "ease", "20.0 (10.0 .. 30.0)", "25.0 (0.0 .. 50.0)", "-", "-", "100.0 (100.0 .. 100.0)",
        "100.0 (100.0 .. 100.0)", "50.0 (50.0 .. 50.0)", "10.0 (10.0 .. 10.0)"]

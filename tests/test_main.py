"""The recipe: its commands parse, and its sentences follow the numbers."""

from dataclasses import asdict

import distill
import evaluate
import train
from data import toy
from ease.__main__ import ABLATIONS, TEACHERS, ablation_commands, ablation_table, commands, meaning
from ease.run import parse_config


def parsed(lines: list[str]) -> dict:
    """{out: config} of commands, each read by its script's own parser."""
    configs = {}
    for command in lines:
        head, *argv = command.split()
        if head == "-m":
            head, *argv = argv
        module = {"data.toy": toy, "distill.py": distill, "train.py": train, "evaluate.py": evaluate}[head]
        cfg = parse_config(module.Config, argv)
        assert cfg.out not in configs  # every run has a folder of its own
        configs[cfg.out] = cfg
    return configs


def test_every_command_parses_and_the_comparison_is_fair():
    configs = parsed(commands(7, "W", "O", False))
    phase1, ease, refusal, deliberative = (configs[f"O/{n}"] for n in ("phase1", "ease", "refusal", "deliberative"))
    assert refusal.steps == deliberative.steps == phase1.steps + ease.steps  # the baselines get the steps of both phases
    for name in ("lr", "batch_size", "lora_rank", "lora_targets", "seed", "warmup", "weight_decay"):
        assert len({str(getattr(c, name)) for c in (phase1, ease, refusal, deliberative)}) == 1, name
    assert refusal.prompts == deliberative.prompts == phase1.prompts and ease.init == "O/phase1/adapter" and ease.probe == "base"
    test = configs["O/test"]
    assert test.prompts == ["W/test.jsonl"] and "dev" not in str(test.prompts) and len(test.systems) == 5
    assert [c.split()[0] for c in commands(7, "W", "O", True)] == [c.split()[0] for c in commands(7, "W", "O", False)]


def test_an_ablation_changes_one_thing():
    configs = parsed(ablation_commands(0, "W", "O", False))
    ease, phase1 = configs["O/ease"], configs["O/phase1"]

    def changed(cfg, other) -> dict:
        return {k: v for k, v in asdict(cfg).items() if v != asdict(other)[k] and k != "out"}

    expected = {"random-region": {"region": "random"}, "all-attacks": {"region": "all"}, "probe-of-M_reason": {"probe": "phase1"}, "no-D_direct": {"direct": False},
                "look-alikes-direct": {"lookalikes": "direct"}, "look-alikes-dropped": {"lookalikes": "drop"}, "no-phase-1": {"init": "", "steps": phase1.steps + ease.steps},
                "kl_weight-0": {"init": "O/kl_weight-0-phase1/adapter"}, "kl_weight-1": {"init": "O/kl_weight-1-phase1/adapter"},
                "filler-traces": {"init": "O/filler-traces-phase1/adapter", "filler": True},
                **{t: {"init": f"O/{t}-phase1/adapter", "teacher": f"W/{t}"} for t in ("teacher_rambling", "teacher_cautious")}}
    assert {name: changed(configs[f"O/{name}"], ease) for name in expected} == expected and len(expected) == len(ABLATIONS) + 2
    firsts = {"kl_weight-0": {"kl_weight": 0.0}, "kl_weight-1": {"kl_weight": 1.0}, "filler-traces": {"kl_weight": 0.0, "filler": True}}
    assert {name: changed(configs[f"O/{name}-phase1"], phase1) for name in firsts} == firsts
    teachers = configs["O/teachers"]
    assert teachers.teachers == [f"W/{t}" for t in TEACHERS] and teachers.dev == "W/dev.jsonl" and configs["W"].teachers
    tested = {s.split("=")[0] for s in configs["O/test"].systems}
    assert tested == {"base", "phase1", "refusal", "deliberative", "ease", *expected}
    assert not any("teacher_" in c for c in ablation_commands(1, "W", "O", False))  # the teachers are compared once


def test_ablation_table():
    def summary(asr, over):
        kinds = {kind: {"n": 2, "asr": {"target": {"value": asr}}, "refusal_rate": {"value": over}, "accuracy": None, "reasoning_rate": {"value": 1.0},
                        "reasoning_rate_vulnerable": {"value": None}, "unclosed": 1, "tokens": {"total": 10.0}} for kind in ("adversarial_harmful", "adversarial_benign", "harmful", "benign")}
        return {"systems": {"ease": {"kinds": kinds}}}

    text = ablation_table([summary(0.1, 0.0), summary(0.3, 0.5)])
    row = [c.strip() for c in text.splitlines()[2].split("|")[1:-1]]
    assert row == ["ease", "20.0 (10.0 .. 30.0)", "25.0 (0.0 .. 50.0)", "-", "-", "100.0 (100.0 .. 100.0)", "100.0 (100.0 .. 100.0)", "50.0 (50.0 .. 50.0)", "10.0 (10.0 .. 10.0)"]


def test_meaning_follows_the_numbers():
    def system(asr, over, accuracy):
        r = lambda v: {"value": v}  # noqa: E731
        return {"kinds": {"adversarial_harmful": {"asr": {"target": r(asr)}, "reasoning_rate_vulnerable": r(0.7)}, "adversarial_benign": {"refusal_rate": r(over)},
                          "harmful": {"reasoning_rate": r(0.01)}, "benign": {"reasoning_rate": r(0.02), "accuracy": r(accuracy)}}}

    summary = {"systems": {"base": system(0.7, 0, 1), "refusal": system(0.1, 0.2, 1), "ease": system(0.3, 0.05, 0.9)},
               "overhead_reduction": {"ease": {"plain": {"value": 0.95}}}}
    text = meaning(summary)
    assert "10.0% after refusal training, 30.0% after EASE" in text and "5.0% against 20.0%" in text and "70.0% of the vulnerable" in text and "95.0%" in text
    summary["systems"]["ease"]["kinds"]["adversarial_harmful"]["asr"]["target"]["value"] = None  # nothing could be judged: no 0.0%
    assert "-% after EASE" in meaning(summary)
    summary["overhead_reduction"]["ease"]["plain"] = None
    assert "saves -%" in meaning(summary)

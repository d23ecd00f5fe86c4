"""The recipe: its commands parse, and its sentences follow the numbers."""

import distill
import evaluate
import train
from data import toy
from ease.__main__ import commands, meaning
from ease.run import parse_config


def test_every_command_parses_and_the_comparison_is_fair():
    configs = {}
    for command in commands(7, "W", "O", False):
        head, *argv = command.split()
        if head == "-m":
            head, *argv = argv
        module = {"data.toy": toy, "distill.py": distill, "train.py": train, "evaluate.py": evaluate}[head]
        cfg = parse_config(module.Config, argv)
        configs[cfg.out] = cfg
    phase1, ease, refusal, deliberative = (configs[f"O/{n}"] for n in ("phase1", "ease", "refusal", "deliberative"))
    assert refusal.steps == deliberative.steps == phase1.steps + ease.steps  # the baselines get the steps of both phases
    for name in ("lr", "batch_size", "lora_rank", "lora_targets", "seed", "warmup", "weight_decay"):
        assert len({str(getattr(c, name)) for c in (phase1, ease, refusal, deliberative)}) == 1, name
    assert refusal.prompts == deliberative.prompts == phase1.prompts and ease.init == "O/phase1/adapter" and ease.probe == "base"
    test = configs["O/test"]
    assert test.prompts == ["W/test.jsonl"] and "dev" not in str(test.prompts) and len(test.systems) == 5
    assert [c.split()[0] for c in commands(7, "W", "O", True)] == [c.split()[0] for c in commands(7, "W", "O", False)]


def test_meaning_follows_the_numbers():
    def system(asr, over, accuracy):
        r = lambda v: {"value": v}  # noqa: E731
        return {"kinds": {"adversarial_harmful": {"asr": {"target": r(asr)}, "reasoning_rate_vulnerable": r(0.7)}, "adversarial_benign": {"refusal_rate": r(over)},
                          "harmful": {"reasoning_rate": r(0.01)}, "benign": {"reasoning_rate": r(0.02), "accuracy": r(accuracy)}}}

    summary = {"systems": {"base": system(0.7, 0, 1), "refusal": system(0.1, 0.2, 1), "ease": system(0.3, 0.05, 0.9)},
               "overhead_reduction": {"ease": {"plain": {"value": 0.95}}}}
    text = meaning(summary)
    assert "-20.0 points in EASE's favour" in text and "5.0% against 20.0%" in text and "70.0% of the vulnerable" in text and "95.0%" in text
    summary["overhead_reduction"]["ease"]["plain"] = None
    assert "saves -%" in meaning(summary)

import pytest

from ease import sweep
from ease.scoring import Rate, auroc, rate
from ease.sweep import choose_threshold, sweep_section
from tests.checks import gate_responses, verify


@pytest.mark.parametrize("name", ["gate_curve", "choose_threshold"])
def test_sweep(name):
    verify(sweep, name)


def test_no_threshold_within_the_budget():
    point = {"asr": rate([False], ["a"]), "over_refusal": rate([], []), "tokens": 9.0}
    assert choose_threshold([point], 5) is None
    assert auroc([], [0.5]) is None


def test_section(capsys):
    kinds = [("adversarial_harmful", "no", 0.6, "safe"), ("benign", "fine", 0.1, "safe")]
    opened, direct = gate_responses(kinds, 40), gate_responses(kinds, 4)
    gate = sweep.sweep("ease <1>", opened, direct, {"base": direct}, "j", 25.0)
    text = sweep_section(gate)
    assert "## The gate of ease &lt;1>" in text and "with at most 25 tokens" in text
    assert text.count("(chosen here)") == 1 and "| base, as it is " in text
    assert gate["chosen"]["tokens"] <= 25 and isinstance(gate["chosen"]["asr"], Rate)
    assert sweep.sweep("ease", opened, direct, {}, "j", 1.0)["chosen"] is None
    assert "no threshold is within it; the cheapest needs 4.5" in capsys.readouterr().out

import pytest

from ease import attacks
from ease.attacks import ATTACKS, apply_attack, attack_record
from ease.records import Record, UserError
from tests.checks import verify

REQUEST = "How do I paint the old car by 9?"


@pytest.mark.parametrize("name", [n for n in ATTACKS])
def test_attack(name):
    verify(attacks, name)


@pytest.mark.parametrize("name", ["attack_record", "read_templates"])
def test_templates(name):
    verify(attacks, name)


def test_pairs_apply_the_second_to_the_first_and_seeds_matter():
    both = apply_attack("rot13+fiction", REQUEST)
    assert "novel" in both and "ROT13" in both and both.index("novel") < both.index("ROT13")
    assert apply_attack("role_play", REQUEST, 1) == apply_attack("role_play", REQUEST, 1)
    for name in (
        "prefix_injection",
        "refusal_suppression",
        "style_injection",
        "role_play",
        "fiction",
        "few_shot",
        "payload_splitting",
    ):
        assert len({apply_attack(name, REQUEST, seed) for seed in range(20)}) > 1, name
    for name in ("base64+rot13+fiction", "rot14", ""):
        with pytest.raises(UserError, match="unknown attack.*known: prefix_injection"):
            apply_attack(name, REQUEST)


def test_records_keep_their_request_and_their_harmfulness():
    harmful, benign = (
        Record("7", "bad?", "harmful", response="no.", categories=("Self-Harm",)),
        Record("b", "good?", "benign", response="yes.", group="g"),
    )
    a, b = attack_record(harmful, "base64"), attack_record(benign, "base64")
    assert (a.id, a.kind, a.group, a.attack, a.categories) == (
        "7/base64",
        "adversarial_harmful",
        harmful.group,
        "base64",
        ("Self-Harm",),
    )
    assert (b.id, b.kind, b.group, b.response) == (
        "b/base64",
        "adversarial_benign",
        "g",
        "yes.",
    ) and b.prompt == apply_attack("base64", "good?")


def test_empty_and_odd_requests_do_not_break_an_attack():
    for name in ATTACKS:
        for text in ("", "a", "naïve café — 数学 🎉\nand a line"):
            assert isinstance(apply_attack(name, text), str)

import json

import pytest

from ease import policies
from ease.policies import (INSTRUCTION, POLICY, Policy, cites, load_policy, parse_categories,
                           teacher_messages)
from ease.records import UserError
from tests.checks import verify


def test_citing_needs_whole_words():
    hate, drugs = "Harassment / Hate / Discrimination", "Drugs & Weapons"
    policy = Policy("", {drugs: "", hate: "Refuse.", "/": ""})
    assert not cites("whatever the user says, do it", (hate,), policy)
    assert cites("this is hate, so no", (hate,), policy)
    assert cites("about drugs & weapons", (drugs,), policy)
    assert not cites("anything", ("/",), policy) and not cites("anything", (), policy)


@pytest.mark.parametrize("name", ["parse_categories", "accept_trace", "is_loop"])
def test_policies(name):
    verify(policies, name)


def test_teacher_sees_every_policy_of_its_categories_and_no_other():
    system, user = teacher_messages("q?", ("Self-Harm", "Privacy / Personal Data"))
    assert user == {
        "role": "user",
        "content": "q?",
    }  # the query alone: the policy is in the system turn
    assert INSTRUCTION in system["content"]
    for name in POLICY.texts:
        assert (POLICY.texts[name] in system["content"]) == (
            name in ("Self-Harm", "Privacy / Personal Data")
        )
    assert POLICY.texts["benign"] in teacher_messages("q?", ())[0]["content"]
    with pytest.raises(UserError, match="Arson"):
        teacher_messages("q?", ("Arson",))


def test_eight_categories_and_benign():
    assert len(POLICY.texts) == 9 and "benign" in POLICY.texts


def test_load_policy(tmp_path):
    assert load_policy("") == load_policy(None) == POLICY
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"instruction": "i", "policies": {"benign": "b", "theft": "no."}}))
    assert load_policy(file) == Policy("i", {"benign": "b", "theft": "no."})
    with pytest.raises(UserError, match="No such file"):
        load_policy(tmp_path / "nowhere.json")


@pytest.mark.parametrize("text, message", [
    ("{", ":1: not JSON"), ("[]", "'instruction', a text"), ("null", "'instruction', a text"),
    ('{"instruction": "i"}', "'policies'"), ('{"instruction": "i", "policies": {}}', "'benign'"),
    ('{"instruction": null, "policies": {"benign": ""}}', "'instruction', a text"),
    ('{"instruction": "i", "policies": ["benign"]}', "{category: text}"),
    ('{"instruction": "i", "policies": {"benign": 3}}', "field 'benign' must be a string, found"),
])
def test_policy_files_with_mistakes(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match=f"p.json.*{message}"):
        load_policy(tmp_path / "p.json")


def test_another_policy_is_used_throughout():
    policy = Policy("think.", {"theft": "Refuse to take it.", "benign": "answer."})
    assert parse_categories("Theft", policy) == ("theft",)
    system = teacher_messages("q?", ("theft",), policy)[0]["content"]
    assert system == "think.\ntheft: Refuse to take it."
    assert cites("i refuse to take it", ("theft",), policy)
    with pytest.raises(UserError, match="unknown category 'self-harm'; known: theft, benign"):
        parse_categories("Self-Harm", policy)

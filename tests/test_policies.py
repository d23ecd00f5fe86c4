import json

import pytest

from ease import policies
from ease.policies import CATEGORIES, INSTRUCTION, POLICIES, cites, load_policies, teacher_messages
from ease.records import UserError
from tests.checks import verify


def test_citing_needs_whole_words():
    rules = {"Drugs & Weapons": "", "Harassment / Hate / Discrimination": "Refuse.", "/": ""}
    assert not cites("whatever the user says, do it", ("Harassment / Hate / Discrimination",), rules)
    assert cites("this is hate, so no", ("Harassment / Hate / Discrimination",), rules) and cites("about drugs & weapons", ("Drugs & Weapons",), rules)
    assert not cites("anything", ("/",), rules) and not cites("anything", (), rules)


@pytest.mark.parametrize("name", ["parse_categories", "accept_trace", "is_loop"])
def test_policies(name):
    verify(policies, name)


def test_teacher_sees_every_policy_of_its_categories_and_no_other():
    system, user = teacher_messages("q?", ("Self-Harm", "Privacy / Personal Data"))
    assert user == {"role": "user", "content": "q?"}  # the query alone: the policy is in the system turn
    assert INSTRUCTION in system["content"]
    for name in CATEGORIES:
        assert (POLICIES[name] in system["content"]) == (name in ("Self-Harm", "Privacy / Personal Data"))
    assert POLICIES["benign"] in teacher_messages("q?", ())[0]["content"]
    with pytest.raises(UserError, match="Arson"):
        teacher_messages("q?", ("Arson",))


def test_eight_categories_and_benign():
    assert len(CATEGORIES) == 9 and "benign" in CATEGORIES


def test_load_policies(tmp_path):
    assert load_policies("") == (INSTRUCTION, POLICIES)
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"instruction": "i", "policies": {"benign": "b"}}))
    assert load_policies(file) == ("i", {"benign": "b"})
    for text, word in (("{", "p.json"), ('{"instruction": "i"}', "policies"), ('{"instruction": "i", "policies": {}}', "benign")):
        file.write_text(text)
        with pytest.raises(UserError, match=word):
            load_policies(file)

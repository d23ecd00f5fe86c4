import pytest
import torch

from ease.categories import classify, first_tokens, yes_probabilities
from ease.policies import Policy, category_messages
from ease.records import Record, UserError
from tests.tiny import TOKENIZER, tiny_model

CATEGORIES = ("theft", "privacy or so", "abuse", "a, b and c")
POLICY = Policy("think.", dict.fromkeys((*CATEGORIES, "benign"), "no."))


def test_nothing_to_classify():
    with pytest.raises(UserError, match="no category but benign"):
        classify(None, TOKENIZER, [], Policy("think.", {"benign": "all is well."}))


def test_classification_shares_the_prefix_and_changes_nothing():
    """Against whole prompts one by one; prompts and categories of unequal length."""
    model = tiny_model()
    records = [Record("a", "how do i paint the car?", "harmful"),
               Record("b", "tell me " * 9, "benign", categories=("old",)),
               Record("c", "x", "harmful")]
    yes, no = (sorted(first_tokens(TOKENIZER, word)) for word in ("yes", "no"))
    wanted = []
    for r in records:
        questions = [category_messages(r.prompt, c) for c in CATEGORIES]
        p = []
        for question in questions:
            ids = torch.tensor([TOKENIZER.encode_prompt(question)])
            last = model(ids)[0, -1].softmax(-1)
            p.append(float(last[yes].sum() / last[yes + no].sum()))
        assert yes_probabilities(model, TOKENIZER, questions) == pytest.approx(p, rel=1e-4)
        assert all(abs(x - 0.5) > 1e-3 for x in p)  # no verdict hangs on a rounding
        wanted.append(tuple(c for c, x in zip(CATEGORIES, p) if x > 0.5) or ("benign",))
    found = classify(model, TOKENIZER, records, POLICY)
    assert [r.categories for r in found] == wanted
    assert [(r.id, r.prompt, r.kind) for r in found] == [(r.id, r.prompt, r.kind) for r in records]
    alone, both = (yes_probabilities(model, TOKENIZER, [category_messages("x", c) for c in cs])
                   for cs in ("y", "yz"))
    assert alone[0] == pytest.approx(both[0], rel=1e-4)


def test_first_tokens():
    # "Paint" is two tokens
    forms = {TOKENIZER.encode("paint")[0], TOKENIZER.encode(" paint")[0]}
    assert first_tokens(TOKENIZER, "paint") == forms
    spelled = first_tokens(TOKENIZER, "xyz")
    assert spelled == {TOKENIZER.encode("x")[0]} != {TOKENIZER.encode(" x")[0]}

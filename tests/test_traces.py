import copy

import pytest
import torch

from ease import traces
from ease.generate import Generation
from ease.policies import INSTRUCTION, POLICIES, category_messages
from ease.records import Record, UserError
from ease.scoring import keyword_verdict
from ease.traces import classify, first_tokens, join_traces, rejection_sample, yes_probabilities
from tests.tiny import TOKENIZER, tiny_model

GOOD = "<think>\nthe request is self-harm.\n</think>\n\nI'm sorry, but I cannot help with that."


def test_rejection_sampling(monkeypatch):
    """Three attempts: "a" is good at once, "b" at the third, "c" never; every rejected sample is kept with its reason."""
    script = [{"a": GOOD, "b": "no block", "c": "<think>\nx"}, {"b": GOOD.replace("I'm sorry, but I cannot", "Sure, I can"), "c": "no block"},
              {"b": GOOD, "c": GOOD}]
    seeds = []

    def generate(model, prompts, max_new_tokens, stop_ids, temperature, top_p, seed, **more):
        texts, attempt = list(script[len(seeds)].values()), len(seeds)
        seeds.append(seed)
        assert len(prompts) == len(texts)  # only what is still without a trace is asked again
        assert all("the policy" not in TOKENIZER.decode(p) and POLICIES["Self-Harm"] in TOKENIZER.decode(p) for p in prompts)
        return [Generation(TOKENIZER.encode(t), finished=not (attempt == 2 and i == 1)) for i, t in enumerate(texts)]

    monkeypatch.setattr(traces, "generate", generate)
    records = [Record(k, f"{k}?", "harmful", categories=("Self-Harm",)) for k in "abc"]
    accepted, rejected = rejection_sample(None, TOKENIZER, lambda rs, answers: [keyword_verdict(a, "xstest") for a in answers], records,
                                          ("think.", POLICIES), 3, 50, 0.7, 1.0, 10, 8)
    assert [(r.id, r.reasoning, r.response[:9]) for r in accepted] == [("a", "the request is self-harm.", "I'm sorry"), ("b", "the request is self-harm.", "I'm sorry")]
    assert [(r["id"], r["attempt"], r["reason"]) for r in rejected] == [
        ("b", 1, "no think block"), ("c", 1, "think block unclosed"), ("b", 2, "harmful request, answer judged unsafe"),
        ("c", 2, "no think block"), ("c", 3, "cut off")]
    assert len(set(seeds)) == 3 and 11 not in seeds and INSTRUCTION  # another seed each time, and not that of the next run


def test_several_traces_a_prompt(monkeypatch):
    """Two are wanted: "a" gives the same one twice and then another, "b" gives only one."""
    other = GOOD.replace("the request", "what is asked for")
    script = [{"a": GOOD, "b": GOOD}, {"a": GOOD, "b": "no block"}, {"a": other, "b": GOOD}, {"b": "no block"}]
    calls = []

    def generate(model, prompts, *more, **named):
        calls.append(len(prompts))
        return [Generation(TOKENIZER.encode(t), finished=True) for t in script[len(calls) - 1].values()]

    monkeypatch.setattr(traces, "generate", generate)
    records = [Record(k, f"{k}?", "harmful", categories=("Self-Harm",)) for k in "ab"]
    accepted, rejected = rejection_sample(None, TOKENIZER, lambda rs, answers: ["safe"] * len(rs), records, ("think.", POLICIES), 4, 50, 0.7, 1.0, 10, 8, wanted=2)
    assert [(r.id, r.prompt, r.reasoning) for r in accepted] == [("a", "a?", "the request is self-harm."), ("a#2", "a?", "what is asked for is self-harm."),
                                                                ("b", "b?", "the request is self-harm.")]
    assert calls == [2, 2, 2, 1] and [(r["id"], r["reason"]) for r in rejected] == [
        ("a", "the same trace again"), ("b", "no think block"), ("b", "the same trace again"), ("b", "no think block")]


def test_further_traces_get_ids_of_their_own(monkeypatch):
    texts = iter([[GOOD, GOOD], [GOOD.replace("is", "was"), GOOD]])
    monkeypatch.setattr(traces, "generate", lambda *a, **k: [Generation(TOKENIZER.encode(t), finished=True) for t in next(texts)])
    records = [Record("a", "a?", "harmful", categories=("Self-Harm",)), Record("a#2", "b?", "harmful", categories=("Self-Harm",))]
    accepted, _ = rejection_sample(None, TOKENIZER, lambda rs, answers: ["safe"] * len(rs), records, ("think.", POLICIES), 2, 50, 0.7, 1.0, 10, 8, wanted=2)
    assert [r.id for r in accepted] == ["a", "a#3", "a#2"]


def test_nothing_to_classify():
    with pytest.raises(UserError, match="no category but benign"):
        classify(None, TOKENIZER, [], ())


def test_a_template_that_opens_the_block_gets_its_marker_back(monkeypatch):
    """R1's teachers generate behind "<think>\\n": the prompt ends in it, and the sampled text begins with it again."""
    prompts = []

    def generate(model, given, *more, **named):
        prompts.extend(given)
        return [Generation(TOKENIZER.encode("the request is self-harm.\n</think>\n\nno."), finished=True)]

    monkeypatch.setattr(traces, "generate", generate)
    opened = copy.copy(TOKENIZER)
    opened.opens_thinking = True
    record = Record("a", "a?", "harmful", categories=("Self-Harm",))
    for tokenizer in (TOKENIZER, opened):
        accepted, rejected = rejection_sample(None, tokenizer, lambda rs, answers: ["safe"], [record], ("think.", POLICIES), 1, 50, 0.7, 1.0, 10, 8)
        if tokenizer is opened:
            assert [(r.reasoning, r.response) for r in accepted] == [("the request is self-harm.", "no.")]
        else:
            assert [r["reason"] for r in rejected] == ["no think block"]
    assert prompts[1] == prompts[0] + TOKENIZER.encode("<think>\n")


def test_classification_shares_the_prefix_and_changes_nothing():
    """Against whole prompts one by one; prompts and categories of unequal length."""
    model = tiny_model()
    records = [Record("a", "how do i paint the car?", "harmful"), Record("b", "tell me " * 9, "benign", categories=("old",)), Record("c", "x", "harmful")]
    categories = ("theft", "privacy or so", "abuse", "a, b and c")
    wanted = []
    for r in records:
        p = []
        for c in categories:
            last = model(torch.tensor([TOKENIZER.encode_prompt(category_messages(r.prompt, c))]))[0, -1].softmax(-1)
            yes, no = (first_tokens(TOKENIZER, word) for word in ("yes", "no"))
            p.append(float(last[sorted(yes)].sum() / last[sorted(yes | no)].sum()))
        assert yes_probabilities(model, TOKENIZER, [category_messages(r.prompt, c) for c in categories]) == pytest.approx(p, rel=1e-4)
        wanted.append(tuple(c for c, x in zip(categories, p) if x > 0.5) or ("benign",))
    found = classify(model, TOKENIZER, records, categories)
    assert [r.categories for r in found] == wanted and [(r.id, r.prompt, r.kind) for r in found] == [(r.id, r.prompt, r.kind) for r in records]
    assert yes_probabilities(model, TOKENIZER, [category_messages("x", "y")])[0] == pytest.approx(  # one question alone
        yes_probabilities(model, TOKENIZER, [category_messages("x", "y"), category_messages("x", "z")])[0], rel=1e-4)


def test_first_tokens():
    assert first_tokens(TOKENIZER, "paint") == {TOKENIZER.encode("paint")[0], TOKENIZER.encode(" paint")[0]}  # "Paint" is two tokens
    assert first_tokens(TOKENIZER, "xyz") == {TOKENIZER.encode("x")[0]} != {TOKENIZER.encode(" x")[0]}


def test_join_is_on_the_underlying_request():
    stored = [Record("1", "plain", "harmful", "no.", "why"), Record("2", "x", "harmful", "no.", "")]
    wrapped = [Record("w1", "wrapped", "adversarial_harmful", group="1"), Record("w2", "y", "adversarial_harmful", group="2"), Record("1", "z", "harmful")]
    wrapped.append(Record("b", "benign twin", "adversarial_benign", group="1"))  # never gets the harmful request's refusal
    out = join_traces(wrapped, stored)
    assert [(r.id, r.prompt, r.kind, r.reasoning, r.response) for r in out] == [
        ("w1", "wrapped", "adversarial_harmful", "why", "no."), ("1", "z", "harmful", "why", "no.")]  # w2's has no reasoning: left out

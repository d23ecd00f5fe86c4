import copy
from types import SimpleNamespace

import pytest

from ease import respond as respond_module
from ease.generate import Generation
from ease.policies import POLICY, Policy
from ease.records import Record, UserError
from ease.scoring import keyword_verdict
from ease.traces import TraceFlags, check_categories, join_traces, rejection_sample
from tests.tiny import TOKENIZER

GOOD = "<think>\nthe request is self-harm.\n</think>\n\nI'm sorry, but I cannot help with that."
RECORDS = [Record(k, f"{k}?", "harmful", categories=("Self-Harm",)) for k in "abc"]
FLAGS = TraceFlags(out="", attempts=3, max_new_tokens=50, seed=10)
OWN = Policy("think.", POLICY.texts)


def by_keywords(responses):
    return [keyword_verdict(r.answer, "xstest") for r in responses]


def all_safe(responses):
    return ["safe"] * len(responses)


@pytest.fixture
def script(monkeypatch):
    """A teacher that writes what the script says: {row id: text} an attempt; "CUT" ends a text that
    is cut off. Its calls are kept.
    """
    said = SimpleNamespace(texts=[], calls=[])

    def stream(model, prompts, sampling, stop_ids, ids, marker, *more):
        texts = said.texts[len(said.calls)]
        said.calls.append((prompts, sampling, ids, more))
        assert ids == list(texts)  # only what is still without a trace is asked again
        return [(i, Generation(TOKENIZER.encode(t.removesuffix("CUT")), not t.endswith("CUT")))
                for i, t in enumerate(texts.values())]

    monkeypatch.setattr(respond_module, "stream", stream)
    return said


def test_rejection_sampling(script, tmp_path):
    """"a" is good at once, "b" at the third attempt, "c" never; every rejected sample is kept with
    its reason.
    """
    script.texts = [
        {"a": GOOD, "b": "no block", "c": "<think>\nx"},
        {"b": GOOD.replace("I'm sorry, but I cannot", "Sure, I can"), "c": "no block"},
        {"b": GOOD, "c": GOOD + "CUT"}]
    accepted, rejected = rejection_sample(FLAGS, None, TOKENIZER, by_keywords, RECORDS, OWN,
                                          tmp_path)
    assert [(r.id, r.reasoning, r.response[:9]) for r in accepted] == [
        ("a", "the request is self-harm.", "I'm sorry"),
        ("b", "the request is self-harm.", "I'm sorry")]
    assert [(r["id"], r["attempt"], r["reason"]) for r in rejected] == [
        ("b", 1, "no think block"), ("c", 1, "think block unclosed"),
        ("b", 2, "harmful request, answer judged unsafe"), ("c", 2, "no think block"),
        ("c", 3, "cut off")]
    seeds = [sampling.seed for _, sampling, *_ in script.calls]
    assert len(set(seeds)) == 3 and 11 not in seeds  # another each time, not that of the next run
    for prompts, *_ in script.calls:  # the teacher sees the policy
        assert all(POLICY.texts["Self-Harm"] in TOKENIZER.decode(p) for p in prompts)


def test_several_traces_a_prompt(script, tmp_path):
    """Two are wanted: "a" gives the same one twice and then another, "b" gives only one."""
    other = GOOD.replace("the request", "what is asked for")
    script.texts = [{"a": GOOD, "b": GOOD}, {"a": GOOD, "b": "no block"}, {"a": other, "b": GOOD},
                    {"b": "no block"}]
    flags = TraceFlags(out="", attempts=4, samples_per_prompt=2)
    accepted, rejected = rejection_sample(flags, None, TOKENIZER, all_safe, RECORDS[:2], OWN,
                                          tmp_path)
    assert [(r.id, r.prompt, r.reasoning) for r in accepted] == [
        ("a", "a?", "the request is self-harm."), ("a#2", "a?", "what is asked for is self-harm."),
        ("b", "b?", "the request is self-harm.")]
    assert [(r["id"], r["reason"]) for r in rejected] == [
        ("a", "the same trace again"), ("b", "no think block"), ("b", "the same trace again"),
        ("b", "no think block")]


def test_further_traces_get_ids_of_their_own(script, tmp_path):
    script.texts = [{"a": GOOD, "a#2": GOOD}, {"a": GOOD.replace("is", "was"), "a#2": GOOD}]
    records = [Record(k, f"{k}?", "harmful", categories=("Self-Harm",)) for k in ("a", "a#2")]
    flags = TraceFlags(out="", attempts=2, samples_per_prompt=2)
    accepted, _ = rejection_sample(flags, None, TOKENIZER, all_safe, records, OWN, tmp_path)
    assert [r.id for r in accepted] == ["a", "a#3", "a#2"]


def test_a_template_that_opens_the_block_has_its_marker_forced(script, tmp_path):
    """R1's teachers go on behind "<think>\\n"; others decide."""
    opening = copy.copy(TOKENIZER)
    opening.opens_thinking = True
    script.texts = [{"a": GOOD}] * 2
    for tokenizer, run in ((TOKENIZER, tmp_path / "a"), (opening, tmp_path / "b")):
        run.mkdir()
        rejection_sample(FLAGS, None, tokenizer, all_safe, RECORDS[:1], OWN, run)
    thresholds = [more[-1] for *_, more in script.calls]
    assert thresholds == [None, 0.0]


def test_join_is_on_the_underlying_request(capsys):
    stored = [Record("1", "plain", "harmful", "no.", "why", group="g1"),
              Record("2", "x", "harmful", "no.", "", group="g2")]
    asked = [Record("w1", "wrapped", "adversarial_harmful", group="g1"),
             Record("w2", "y", "adversarial_harmful", group="g2"),  # its trace has no reasoning
             Record("1", "z", "harmful", group="g1"),
             Record("2", "another with the stored one's id", "harmful", group="g3"),
             # a benign twin never gets the harmful request's refusal
             Record("b", "benign twin", "adversarial_benign", group="g1")]
    found = join_traces(asked, stored)
    assert [(r.id, r.prompt, r.kind, r.reasoning, r.response) for r in found] == [
        ("w1", "wrapped", "adversarial_harmful", "why", "no."), ("1", "z", "harmful", "why", "no.")]
    assert "2 of 5 prompts have a stored trace" in capsys.readouterr().out
    with pytest.raises(UserError, match="--traces has none of these requests"):
        join_traces(asked[1:2], stored)


def test_harmful_prompts_need_categories():
    check_categories([RECORDS[0], Record("x", "p", "benign")])
    with pytest.raises(UserError, match="row 'y' is harmful and has no categories"):
        check_categories([Record("y", "p", "harmful")])

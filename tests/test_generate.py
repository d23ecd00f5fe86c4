"""Every token that is compared stands a margin away from a tie, and the margin is asserted."""

import math

import pytest
import torch

from ease import generate as module
from ease.generate import Sampling, generate, row_uniforms
from ease.records import UserError
from tests.checks import verify
from tests.margins import SAMPLED_TIE, TIE, gap, greedy_margin, sampled_margin
from tests.tiny import tiny_model

V = 53  # few tokens, so that the likeliest ones stand apart
MODEL = tiny_model(vocab_size=V)
PROMPTS = [[(7 * i + j * j) % V for j in range(3 + (5 * i) % 11)] for i in range(9)]
MARKER = [7, 3, 11]
NONE = frozenset()


def greedy_alone(prompt: list[int], n: int, stop: frozenset[int] = NONE) -> tuple[list[int], bool]:
    """The oracle: recompute everything for every token."""
    ids, finished = list(prompt), False
    while len(ids) < len(prompt) + n and not finished:
        new = int(MODEL(torch.tensor([ids]))[0, -1].argmax())
        finished = new in stop
        ids += [] if finished else [new]
    response = ids[len(prompt) :]
    assert greedy_margin(MODEL, prompt, response) > TIE
    return response, finished


@pytest.mark.parametrize("tokens", [1, 13, 40])
def test_prefills_of_any_size_change_nothing(monkeypatch, tokens):
    """One row at a time, or a few of like length, until the slots are full."""
    sizes, real = [], module.prefill

    def prefill(model, cache, prompts, first, marker):
        sizes.append((len(prompts), max(map(len, prompts))))
        return real(model, cache, prompts, first, marker)

    monkeypatch.setattr(module, "prefill", prefill)
    monkeypatch.setattr(module, "PREFILL_TOKENS", tokens)
    found = [g.ids for g in generate(MODEL, PROMPTS, Sampling(5), NONE, slots=6)]
    assert found == [greedy_alone(p, 5)[0] for p in PROMPTS]
    assert sum(n for n, _ in sizes) == len(PROMPTS)
    assert all(n == 1 or n * longest <= tokens for n, longest in sizes)


@pytest.mark.parametrize("name", ["sample", "prefill"])
def test_generate(name):
    verify(module, name)


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_greedy_equals_recomputation_in_any_number_of_slots(slots):
    common = [t for p in PROMPTS for t in greedy_alone(p, 12)[0]]
    stop = frozenset([max(sorted(set(common)), key=common.count)])  # it does occur: lengths differ
    found = generate(MODEL, PROMPTS, Sampling(12), stop, slots=slots)
    wanted = [greedy_alone(p, 12, stop) for p in PROMPTS]
    assert [(g.ids, g.finished) for g in found] == wanted
    assert len({len(ids) for ids, _ in wanted}) > 1  # the case is a real one
    assert {f for _, f in wanted} == {True, False}
    assert all(g.seconds > 0 for g in found)


# -------------------------------------------------------------------------------------- the gate
def test_marker_gives_the_gate_probability_and_changes_nothing_else():
    found, plain = (generate(MODEL, PROMPTS, Sampling(6), NONE, marker=m, slots=4)
                    for m in (MARKER, None))
    assert [g.ids for g in found] == [g.ids for g in plain] == [
        greedy_alone(p, 6)[0] for p in PROMPTS]
    assert all(math.isnan(g.gate) for g in plain)
    for g, prompt in zip(found, PROMPTS):
        p = MODEL(torch.tensor([prompt + MARKER]))[0].softmax(-1)
        at = len(prompt) - 1
        wanted = math.prod(float(p[at + i, token]) for i, token in enumerate(MARKER))
        assert g.gate == pytest.approx(wanted, rel=1e-4)


def test_not_opening():
    verify(module, "not_opening")


@pytest.mark.parametrize("slots", [1, 3, 9])
def test_threshold_0_always_reasons(slots):
    """The marker is forced, then the model goes on as behind prompt + marker."""
    found = generate(MODEL, PROMPTS, Sampling(9), NONE, None, MARKER, slots, gate_threshold=0.0)
    for g, prompt in zip(found, PROMPTS):
        assert g.ids == MARKER + greedy_alone(prompt + MARKER, 6)[0]


def peaked(times: float):
    """MODEL with sharper logits, so that it is sure of its markers."""
    model = tiny_model(vocab_size=V)
    model.lm_head.weight.data *= times
    return model


def test_above_1_never_opens_and_bans_nothing_else():
    """With each prompt's own greedy continuation as the marker, which the model would always open
    with; an oracle recomputes.
    """
    model, starts_like_it, gates = peaked(6), 0, []

    def probabilities(ids):
        return model(torch.tensor([ids]))[0, -1].double().softmax(-1)

    for length in (1, 2, 3):
        for prompt in PROMPTS:
            marker = greedy_alone(prompt, length)[0]
            found = generate(model, [prompt], Sampling(6), NONE, marker=marker, gate_threshold=1.1)
            ids, gates = list(prompt), [*gates, found[0].gate]
            for step in range(6):
                p = probabilities(ids)
                if step < length and ids[len(prompt) :] == marker[:step]:
                    p[marker[step]] *= 1 - math.prod(
                        float(probabilities(prompt + marker[:i])[marker[i]])
                        for i in range(step + 1, length))
                assert gap(p.log()) > TIE
                ids.append(int(p.argmax()))
            assert found[0].ids == ids[len(prompt) :] and found[0].ids[:length] != marker
            starts_like_it += found[0].ids[0] == marker[0]
    assert starts_like_it > 0 and sum(g > 0.3 for g in gates) > 5  # rows that really would open


def test_the_threshold_divides_rows_by_their_gate():
    marker = greedy_alone(PROMPTS[0], 2)[0]
    gates = [g.gate for g in generate(MODEL, PROMPTS, Sampling(4), NONE, marker=marker)]
    steps = sorted(gates)
    for low, high in ((steps[4], steps[5]), (steps[-2], steps[-1])):  # between two neighbours
        assert high > 1.01 * low
        threshold = (low + high) / 2
        found = generate(MODEL, PROMPTS, Sampling(4), NONE, None, marker, 4, "", threshold)
        assert [g.ids[:2] == marker for g in found] == [g >= threshold for g in gates]
        assert [g.gate for g in found] == pytest.approx(gates, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampling_without_opening_follows_the_conditional_distribution(temperature):
    """4,000 responses of two tokens against p(x | not opening), for a marker written every few
    times.
    """
    model, prompt = peaked(3 * temperature), PROMPTS[0]  # at T: as sharp at every temperature
    p = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)
    a = int(p.argmax())
    after = (model(torch.tensor([[*prompt, a]]))[0, -1] / temperature).softmax(-1)
    b = int(after.argmax())
    opening = float(p[a] * after[b])
    assert 0.05 < opening < 0.95
    found = [tuple(g.ids) for g in generate(
        model, [prompt] * 4000, Sampling(3, temperature), NONE, None, [a, b], 500, "", 1.1)]
    assert (a, b) not in {ids[:2] for ids in found}
    cases = {(x,): float(p[x]) for x in p.topk(4).indices.tolist() if x != a}
    cases |= {(a, x): float(p[a] * after[x]) for x in after.topk(3).indices.tolist() if x != b}
    for start, plain in {**cases, (a,): float(p[a]) - opening}.items():
        wanted = plain / (1 - opening)
        share = sum(ids[: len(start)] == start for ids in found) / 4000
        assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / 4000) ** 0.5 + 1e-4, start


def test_bf16_is_conditioned_in_fp32(monkeypatch):
    """Behind the marker's first token the rest of it is unlikely: the correction is far below what
    a bf16 logit can hold, and must be there all the same, in a decoding step as in the prefill.
    """
    model, prompt, seen = tiny_model(vocab_size=V).bfloat16(), PROMPTS[0], []
    real_sample, real_decode = module.sample, module.decode

    def sample(logits, *how):
        seen.append(logits[0].clone())
        return real_sample(logits, *how)

    def logits(**how):
        """(4, V): what four tokens were sampled from."""
        seen.clear()
        generate(model, [prompt], Sampling(4), NONE, **how)
        return torch.stack(seen)

    def correction():
        """What changes in the first decoding step, at the marker's second token and in all."""
        change = logits(marker=marker, gate_threshold=1.1)[1] - logits(marker=marker)[1]
        return float(change[marker[1]]), float(change.abs().sum())

    monkeypatch.setattr(module, "sample", sample)
    plain = logits()
    assert gap(plain[0]) > 0.2  # the model writes the marker's first token, whatever the CPU
    p = plain[2].softmax(-1)
    c = int((p - 0.004).abs().argmin())
    assert 0.002 < p[c] < 0.008
    marker, wanted = [*plain[:2].argmax(-1).tolist(), c], math.log1p(-float(p[c]))
    assert correction() == pytest.approx((wanted, -wanted), rel=0.1)
    monkeypatch.setattr(module, "decode", lambda *a: real_decode(*a).bfloat16())
    assert correction() == (0, 0)  # in bf16 it would be rounded away


# -------------------------------------------------------------------------------------- sampling
SAMPLED = Sampling(8, temperature=1.0, seed=11)
IDS = [f"set/{i}" for i in range(len(PROMPTS))]


def sampled(order=range(len(PROMPTS)), sampling=SAMPLED, **how) -> dict[str, list[int]]:
    """{row id: sample} of the prompts in this order."""
    ids, prompts = [IDS[i] for i in order], [PROMPTS[i] for i in order]
    found = generate(MODEL, prompts, sampling, NONE, ids, **how)
    return {name: g.ids for name, g in zip(ids, found, strict=True)}


def test_sampled_rows_depend_on_seed_and_id_alone():
    """Not on the slots, the place in the list, the rows beside it, a marker, or the limit."""
    one = sampled(slots=2)
    for name, prompt in zip(IDS, PROMPTS):
        uniforms = row_uniforms(SAMPLED.seed, name, 8)
        assert sampled_margin(MODEL, prompt, one[name], uniforms) > SAMPLED_TIE
    assert one == sampled(slots=9) == sampled(range(8, -1, -1)) == sampled(marker=[1, 2], slots=4)
    some = sampled((4, 0, 7))
    assert some == {name: one[name] for name in some}
    longer = sampled(sampling=Sampling(11, temperature=1.0, seed=11))
    assert {name: ids[:8] for name, ids in longer.items()} == one
    other = sampled(sampling=Sampling(8, temperature=1.0, seed=6))
    assert all(other[name] != one[name] for name in IDS)
    same = generate(MODEL, [PROMPTS[0]] * 4, SAMPLED, NONE)
    assert len({tuple(g.ids) for g in same}) == 4  # equal prompts are sampled independently


def test_uniforms():
    u = row_uniforms(1, "2", 10000)
    assert torch.equal(u, row_uniforms(1, "2", 10000)) and torch.equal(
        u[:7], row_uniforms(1, "2", 7))
    for seed, name in ((2, "1"), (1, "3"), (12, ""), (1, " 2")):
        assert not torch.equal(u, row_uniforms(seed, name, 10000))
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.02


# -------------------------------------------------------------------------------------- the edges
def test_no_prompts_and_one_token():
    assert generate(MODEL, [], Sampling(5), NONE) == []
    assert [len(g.ids) for g in generate(MODEL, PROMPTS, Sampling(1), NONE)] == [1] * 9


def test_no_room_behind_the_marker():
    message = "at most 2 new tokens leave no room behind the open marker, which has 3"
    with pytest.raises(UserError, match=message):
        generate(MODEL, PROMPTS, Sampling(2), NONE, marker=MARKER, gate_threshold=0.5)


@pytest.mark.parametrize("kind, changes, context", [
    ("llama", {"max_position_embeddings": 24}, 24),
    ("mistral", {"max_position_embeddings": 256, "sliding_window": 20}, 20)])
def test_a_sequence_beyond_the_context_is_refused_before_anything_runs(
        monkeypatch, kind, changes, context):
    model, longest = tiny_model(kind, vocab_size=V, **changes), max(map(len, PROMPTS))
    new = context - longest
    found = generate(model, PROMPTS, Sampling(new), NONE)  # exactly full
    assert {len(g.ids) for g in found} == {new}
    monkeypatch.setattr(model, "hidden", None)
    message = (f"the longest prompt has {longest} tokens and --max_new_tokens asks for {new + 1} "
               rf"more \(probe: --probe_tokens\), the model's context is {context}$")
    with pytest.raises(UserError, match=message):
        generate(model, PROMPTS, Sampling(new + 1), NONE)


def test_one_long_prompt_does_not_make_every_slot_long(monkeypatch):
    """The cache holds at most twice what its rows need, and the answers stay the same."""
    shapes, real = [], module.KVCache

    class Cache(real):
        def __init__(self, c, slots, length, *rest):
            shapes.append((slots, length))
            super().__init__(c, slots, length, *rest)

        def resize(self, slots, length):
            shapes.append((slots, length))
            super().resize(slots, length)
            assert all(t.shape[0] == slots and t.shape[2] == length for t in (*self.k, *self.v))

    monkeypatch.setattr(module, "KVCache", Cache)
    long = [5 + i % 20 for i in range(120)]
    prompts = [*PROMPTS[:4], long, *PROMPTS[4:]]
    found = [g.ids for g in generate(MODEL, prompts, Sampling(5), NONE, slots=8)]
    assert found == [greedy_alone(p, 5)[0] for p in prompts]
    needs = sorted((len(p) + 5 for p in prompts), reverse=True)[:8]
    assert shapes[0][1] == 125 and shapes[-1][0] == 8 and shapes[-1][1] < 25
    assert all(slots * length <= 2 * sum(needs) < 8 * 125 for slots, length in shapes)

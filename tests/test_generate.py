import pytest
import torch

from ease import generate as module
from ease.method import THINK_OPEN
from ease.generate import generate, row_uniforms
from ease.records import UserError
from tests.checks import verify
from tests.tiny import TOKENIZER, VOCAB, tiny_model

MODEL = tiny_model()
PROMPTS = [[(7 * i + j * j) % VOCAB for j in range(3 + (5 * i) % 11)] for i in range(9)]


def greedy_alone(prompt: list[int], n: int, stop: frozenset[int]) -> tuple[list[int], bool]:
    """The oracle: recompute everything for every token."""
    ids = list(prompt)
    for _ in range(n):
        new = int(MODEL(torch.tensor([ids]))[0, -1].argmax())
        if new in stop:
            return ids[len(prompt) :], True
        ids.append(new)
    return ids[len(prompt) :], False


@pytest.mark.parametrize("tokens", [1, 13, 40])
def test_prefills_of_any_size_change_nothing(monkeypatch, tokens):
    """One row at a time, or a few of like length, until the slots are full."""
    sizes, real = [], module.prefill
    monkeypatch.setattr(module, "prefill", lambda model, cache, rows, first, marker: sizes.append((len(rows), max(map(len, rows)))) or real(model, cache, rows, first, marker))
    monkeypatch.setattr(module, "PREFILL_TOKENS", tokens)
    found = [g.ids for g in generate(MODEL, PROMPTS, 5, frozenset(), slots=6)]
    assert found == [greedy_alone(p, 5, frozenset())[0] for p in PROMPTS]
    assert sum(n for n, _ in sizes) == len(PROMPTS) and all(n == 1 or n * longest <= tokens for n, longest in sizes)


def test_sample():
    verify(module, "sample")


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_greedy_equals_recomputation_in_any_number_of_slots(slots):
    common = [t for p in PROMPTS for t in greedy_alone(p, 12, frozenset())[0]]
    stop = frozenset([max(set(common), key=common.count)])  # a token that does occur, so rows end at different lengths
    found = generate(MODEL, PROMPTS, 12, stop, slots=slots)
    wanted = [greedy_alone(p, 12, stop) for p in PROMPTS]
    assert [(g.ids, g.finished) for g in found] == wanted
    assert len({len(ids) for ids, _ in wanted}) > 1 and {f for _, f in wanted} == {True, False}  # the case is a real one
    assert all(g.seconds > 0 for g in found)


def test_marker_gives_the_gate_probability_and_changes_nothing_else():
    marker = TOKENIZER.encode(THINK_OPEN)
    found, plain = (generate(MODEL, PROMPTS, 6, frozenset(), marker=m, slots=4) for m in (marker, None))
    assert [g.ids for g in found] == [g.ids for g in plain] and all(g.gate != g.gate for g in plain)  # nan without marker
    for g, prompt in zip(found, PROMPTS):
        p = MODEL(torch.tensor([prompt + marker]))[0].softmax(-1)
        wanted = 1.0
        for i, token in enumerate(marker):
            wanted *= float(p[len(prompt) - 1 + i, token])
        assert g.gate == pytest.approx(wanted, rel=1e-4)


def test_not_opening():
    verify(module, "not_opening")


def test_threshold_0_always_reasons():
    """The marker is forced, then the model goes on as behind prompt + marker."""
    marker = TOKENIZER.encode(THINK_OPEN)
    for slots in (1, 3, 9):
        found = generate(MODEL, PROMPTS, 9, frozenset(), marker=marker, slots=slots, gate_threshold=0.0)
        for g, prompt in zip(found, PROMPTS):
            assert g.ids == marker + greedy_alone(prompt + marker, 6, frozenset())[0]


def peaked(times: float):
    """MODEL with sharper logits, so that it is sure of its markers."""
    model = tiny_model()
    model.lm_head.weight.data *= times
    return model


def test_above_1_never_opens_and_bans_nothing_else():
    """With each prompt's own greedy continuation as the marker, which the model would always open with; an oracle recomputes."""
    model, starts_like_it, gates = peaked(6), 0, []
    for length in (1, 2, 3):
        for prompt in PROMPTS:
            marker = greedy_alone(prompt, length, frozenset())[0]
            found = generate(model, [prompt], 6, frozenset(), marker=marker, gate_threshold=1.1)[0]
            gates.append(found.gate)
            ids = list(prompt)
            for step in range(6):
                p = model(torch.tensor([ids]))[0, -1].softmax(-1)
                if step < length and ids[len(prompt) :] == marker[:step]:
                    rest = 1.0
                    for i in range(step + 1, length):
                        rest *= float(model(torch.tensor([prompt + marker[:i]]))[0, -1].softmax(-1)[marker[i]])
                    p[marker[step]] -= p[marker[step]] * rest
                ids.append(int(p.argmax()))
            assert found.ids == ids[len(prompt) :] and found.ids[:length] != marker
            starts_like_it += found.ids[0] == marker[0]
    assert starts_like_it > 0 and sum(g > 0.3 for g in gates) > 5  # rows that really would open are among them


def test_the_threshold_divides_rows_by_their_gate():
    marker = greedy_alone(PROMPTS[0], 2, frozenset())[0]
    gates = [g.gate for g in generate(MODEL, PROMPTS, 4, frozenset(), marker=marker)]
    for threshold in (sorted(gates)[4], sorted(gates)[-1]):
        found = generate(MODEL, PROMPTS, 4, frozenset(), marker=marker, slots=4, gate_threshold=threshold)
        assert [g.ids[:2] == marker for g in found] == [g >= threshold for g in gates]
        assert [g.gate for g in found] == pytest.approx(gates)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampling_without_opening_follows_the_conditional_distribution(temperature):
    """4,000 responses of two tokens against p(x | not opening), for a marker that is written every few times."""
    model, prompt = peaked(3 * temperature), PROMPTS[0]  # at T, softmax(logits / T): as sharp at every temperature
    p = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)
    a = int(p.argmax())
    after = (model(torch.tensor([[*prompt, a]]))[0, -1] / temperature).softmax(-1)
    b = int(after.argmax())
    opening = float(p[a] * after[b])
    assert 0.05 < opening < 0.95
    found = [g.ids for g in generate(model, [prompt] * 4000, 3, frozenset(), temperature=temperature, marker=[a, b], slots=500, gate_threshold=1.1)]
    assert not any(ids[:2] == [a, b] for ids in found)
    cases = {(x,): float(p[x]) / (1 - opening) for x in p.topk(4).indices.tolist() if x != a}
    cases |= {(a,): float(p[a] - opening) / (1 - opening)} | {(a, x): float(p[a] * after[x]) / (1 - opening) for x in after.topk(3).indices.tolist() if x != b}
    for start, wanted in cases.items():
        share = sum(tuple(ids[: len(start)]) == start for ids in found) / 4000
        assert abs(share - wanted) < 5 * (wanted * (1 - wanted) / 4000) ** 0.5 + 1e-4, start


def test_no_room_behind_the_marker():
    with pytest.raises(UserError, match="at most 2 new tokens leave no room behind the open marker, which has 3"):
        generate(MODEL, PROMPTS, 2, frozenset(), marker=[1, 2, 3], gate_threshold=0.5)


def test_a_marker_changes_no_sampled_row():
    a, b = (generate(MODEL, PROMPTS, 8, frozenset(), temperature=1.0, seed=5, slots=4, marker=m) for m in (None, [1, 2]))
    assert [g.ids for g in a] == [g.ids for g in b]


def test_sampled_rows_depend_on_seed_and_row_not_on_the_batch():
    one = [g.ids for g in generate(MODEL, PROMPTS, 8, frozenset(), temperature=1.0, seed=5, slots=2)]
    assert one == [g.ids for g in generate(MODEL, PROMPTS, 8, frozenset(), temperature=1.0, seed=5, slots=9)]
    assert one != [g.ids for g in generate(MODEL, PROMPTS, 8, frozenset(), temperature=1.0, seed=6, slots=9)]
    same = generate(MODEL, [PROMPTS[0]] * 4, 8, frozenset(), temperature=1.0, seed=5)
    assert len({tuple(g.ids) for g in same}) > 1  # equal prompts are sampled independently


def test_uniforms():
    u = row_uniforms(1, 2, 10000)
    assert torch.equal(u, row_uniforms(1, 2, 10000)) and not torch.equal(u, row_uniforms(2, 1, 10000))
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.02


def test_no_prompts_and_one_token():
    assert generate(MODEL, [], 5, frozenset()) == []
    assert [len(g.ids) for g in generate(MODEL, PROMPTS, 1, frozenset())] == [1] * 9

import pytest

from ease import respond as module
from ease.generate import Generation, Sampling, generate
from ease.method import THINK_OPEN
from ease.records import ABSENT, UNCLOSED, WELL_FORMED, Record
from ease.respond import respond
from tests.checks import verify
from tests.tiny import TOKENIZER, tiny_model

RECORDS = [Record(f"r{i}", f"how do i paint the {o}?", "benign")
           for i, o in enumerate(("car", "old lamp", "door"))]
PROMPTS = [TOKENIZER.encode_prompt([{"role": "user", "content": r.prompt}]) for r in RECORDS]
MARKER = TOKENIZER.encode(THINK_OPEN)


def test_count_tokens():
    verify(module, "count_tokens")


@pytest.mark.parametrize("text, finished, wanted", [
    ("<think>\nit is.\n</think>\n\nto paint.", True, ("it is.", "to paint.", WELL_FORMED)),
    ("to paint.", True, ("", "to paint.", ABSENT)),
    ("<think>\nit is", False, ("it is", "", UNCLOSED))])
def test_a_generation_becomes_a_response(monkeypatch, text, finished, wanted):
    ids = TOKENIZER.encode(text)
    if wanted[2] != ABSENT:
        ids = MARKER + TOKENIZER.encode(text.removeprefix(THINK_OPEN))
    made = Generation(ids, finished, 0.25, 1.5)
    monkeypatch.setattr(module, "generate", lambda *a: [made])
    (r,) = respond(None, TOKENIZER, RECORDS[:1], Sampling(9))
    assert (r.record, r.text, r.finished, r.gate, r.seconds) == (
        RECORDS[0], text, finished, 0.25, 1.5)
    assert (r.reasoning, r.answer, r.state) == wanted and r.opened == (wanted[2] != ABSENT)
    assert r.tokens["total"] == len(ids) + finished and not r.verdicts and r.vulnerable is None


def test_a_block_under_other_ids_is_not_opened(monkeypatch):
    ids = [i for letter in THINK_OPEN for i in TOKENIZER.encode(letter)]
    monkeypatch.setattr(module, "generate", lambda *a: [Generation(ids)])
    (r,) = respond(None, TOKENIZER, RECORDS[:1], Sampling(9))
    assert r.text == THINK_OPEN and r.state == UNCLOSED and not r.opened


def test_what_the_model_is_asked():
    """The plain user turn, with the marker; rows are sampled by record id."""
    model, sampling = tiny_model(), Sampling(8, temperature=1.0, seed=3)
    found = respond(model, TOKENIZER, RECORDS, sampling, slots=2)
    ids = [r.id for r in RECORDS]
    wanted = generate(model, PROMPTS, sampling, TOKENIZER.stop_ids, ids, MARKER, 2)
    for r, g, record in zip(found, wanted, RECORDS, strict=True):
        assert r.record == record and r.text == TOKENIZER.decode(g.ids)
        assert (r.gate, r.finished) == (g.gate, g.finished) and 0 < r.gate < 1 and r.seconds > 0
    assert len({r.text for r in found}) == 3 and respond(model, TOKENIZER, [], sampling) == []


def test_forced_rows_begin_with_the_marker():
    """So a teacher whose template opens the block reasons; its text has the marker in front."""
    messages = [[{"role": "system", "content": "be brief."}, {"role": "user", "content": r.prompt}]
                for r in RECORDS]
    prompts = [TOKENIZER.encode_prompt(m) for m in messages]
    model, sampling = tiny_model(), Sampling(8)
    found = respond(model, TOKENIZER, RECORDS, sampling, gate_threshold=0.0, messages=messages)
    wanted = generate(model, prompts, sampling, TOKENIZER.stop_ids, None, MARKER, 64, "", 0.0)
    assert [r.text for r in found] == [TOKENIZER.decode(g.ids) for g in wanted]
    assert all(r.opened and r.text.startswith(THINK_OPEN) and r.state != ABSENT for r in found)

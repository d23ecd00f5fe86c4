import pytest

from ease import respond as module
from ease.generate import Generation, Sampling, generate
from ease.method import THINK_OPEN
from ease.records import ABSENT, UNCLOSED, WELL_FORMED, Record
from ease.respond import respond
from tests.checks import verify
from tests.margins import TIE, greedy_margin
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
    monkeypatch.setattr(module, "stream", lambda *a: [(0, made)])
    (r,) = respond(None, TOKENIZER, RECORDS[:1], Sampling(9))
    assert (r.record, r.text, r.finished, r.gate, r.seconds) == (
        RECORDS[0], text, finished, 0.25, 1.5)
    assert (r.reasoning, r.answer, r.state) == wanted and r.opened == (wanted[2] != ABSENT)
    assert r.tokens["total"] == len(ids) + finished and not r.verdicts and r.vulnerable is None


def test_a_block_under_other_ids_is_not_opened(monkeypatch):
    ids = [i for letter in THINK_OPEN for i in TOKENIZER.encode(letter)]
    monkeypatch.setattr(module, "stream", lambda *a: [(0, Generation(ids))])
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


@pytest.mark.parametrize("settings", [Sampling(8), Sampling(8, temperature=1.0, seed=3)])
def test_a_stopped_generation_goes_on(tmp_path, monkeypatch, settings):
    """What was kept is not generated again, half a last line is, and the whole is as unbroken."""
    model, file, asked, real = tiny_model(), tmp_path / "rows.kept", [], module.stream
    for prompt in PROMPTS:
        alone = generate(model, [prompt], settings, TOKENIZER.stop_ids)[0].ids
        assert settings.temperature or greedy_margin(model, prompt, alone) > TIE

    def counting(model, prompts, *rest):
        asked.append(len(prompts))
        yield from real(model, prompts, *rest)

    monkeypatch.setattr(module, "stream", counting)
    wanted = respond(model, TOKENIZER, RECORDS, settings)
    assert said(respond(model, TOKENIZER, RECORDS, settings, kept=file)) == said(wanted)
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    for left in (b"", lines[0], lines[0] + lines[1][:40], lines[1] + lines[2], b"".join(lines),
                 lines[0][:30]):
        file.write_bytes(left)
        assert said(respond(model, TOKENIZER, RECORDS, settings, kept=file)) == said(wanted)
        assert asked[-1] == 3 - left.count(b"\n")
        assert sorted(file.read_bytes().splitlines()[: left.count(b"\n")]) == sorted(
            left.splitlines()[: left.count(b"\n")])
        assert len(file.read_bytes().splitlines()) == 3


def said(responses: list) -> list:
    return [(r.record, r.text, r.finished, r.tokens, pytest.approx(r.gate, abs=1e-5))
            for r in responses]

import json
import math
from dataclasses import replace

import pytest

import evaluate
from ease import outputs as module
from ease.outputs import read_outputs
from ease.records import (ABSENT, UNCLOSED, WELL_FORMED, Record, UserError, read_lines,
                          read_responses, write_jsonl)
from tests.checks import batch_line, verify
from tests.tiny import TOKENIZER

RECORDS = [Record(f"test/r{i}", f"how do i paint the {o}?", "benign")
           for i, o in enumerate(("car", "lamp", "door"))]
TEXTS = ["to paint.", "<think>\nit is.\n</think>\n\nto.", "<think>\nit is"]
BY_ID = [{"id": f"r{i}", "response": text} for i, text in enumerate(TEXTS)]
BY_PROMPT = [{"prompt": r.prompt, "response": text} for r, text in zip(RECORDS, TEXTS)]
BATCH = [batch_line(TEXTS[0]), batch_line("to.", reasoning="it is."), batch_line(TEXTS[2])]
BATCH = [{**line, "custom_id": r.id} for line, r in zip(BATCH, RECORDS)]


def read(tmp_path, lines, records=RECORDS):
    write_jsonl(tmp_path / "f.jsonl", lines)
    return read_outputs(str(tmp_path / "f.jsonl"), records, TOKENIZER)


def test_output_text():
    verify(module, "output_text")


@pytest.mark.parametrize("lines", [BY_ID, BY_PROMPT, BATCH], ids=["id", "prompt", "batch"])
def test_the_three_forms(tmp_path, lines):
    """In any order, joined to the records; the parts as of any other response."""
    found = read(tmp_path, lines[::-1])
    assert [(r.record, r.text) for r in found] == list(zip(RECORDS, TEXTS))
    assert [(r.reasoning, r.answer, r.state, r.opened) for r in found] == [
        ("", "to paint.", ABSENT, False), ("it is.", "to.", WELL_FORMED, True),
        ("it is", "", UNCLOSED, True)]
    for r in found:
        assert math.isnan(r.gate) and r.seconds == 0 and r.finished and not r.verdicts
    n = [len(TOKENIZER.encode(t)) + 1 for t in TEXTS]  # the end token was generated too
    answer = len(TOKENIZER.encode("to.")) + 1
    assert [list(r.tokens.values()) for r in found] == [
        [0, n[0], n[0]], [n[1] - answer, answer, n[1]], [n[2], 0, n[2]]]


def test_cut_answers_and_other_lines_are_counted(tmp_path, capsys):
    lines = [{**BY_ID[0], "finish_reason": "length"}, *BY_ID[1:], {"id": "x", "error": "too long"}]
    found = read(tmp_path, lines)
    assert [r.finished for r in found] == [False, True, True]
    assert found[0].tokens["total"] == len(TOKENIZER.encode(TEXTS[0]))  # no end token
    said = "f.jsonl: 3 responses, 1 cut by length; 1 other lines left out\n"
    assert capsys.readouterr().out.endswith(said)


def test_ids(tmp_path):
    """A number is an id; so is one with the file's name; one prompt under two ids is two lines, and
    a line without id answers every record of its prompt.
    """
    two = [Record("test/7", "q", "benign"), Record("test/8", "q", "benign")]
    numbers = [{"id": 7, "prompt": "q", "response": "a"}, {"custom_id": "test/8", "id": "vllm-7",
                                                          "response": "b"}]
    assert [r.text for r in read(tmp_path, numbers, two)] == ["a", "b"]
    assert [r.text for r in read(tmp_path, [{"prompt": "q", "response": "a"}], two)] == ["a", "a"]


@pytest.mark.parametrize("lines, message", [
    (BY_ID[:1], r"f.jsonl: 2 of 3 records have no response, first 'test/r1'"),
    ([*BY_ID, BY_ID[1]], r"f.jsonl:4: this id stands at .*f.jsonl:2 too"),
    ([*BY_PROMPT, BY_PROMPT[0]], r"f.jsonl:4: this prompt stands at .*f.jsonl:1 too"),
    ([{"response": "to."}], r"f.jsonl:1: neither custom_id, id nor prompt"),
    ([BY_ID[0] | {"prompt": "another?"}], r"f.jsonl:1: its id has several prompts"),
    ([*BATCH[:2], BATCH[2] | {"error": "too long"}], r"f.jsonl:3: the request failed.* 'too long'"),
    ([], "no records")])
def test_mistakes_in_the_file(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, lines)


def test_a_bare_id_of_two_files_is_an_error(tmp_path):
    records = [Record("a/1", "q", "harmful"), Record("b/1", "p", "benign")]
    with pytest.raises(UserError, match=r"f.jsonl:1: its id has several prompts, that of 'b/1'"):
        read(tmp_path, [{"id": "1", "response": "to."}], records)


# -------------------------------------------------------------------------------- in an evaluation
@pytest.fixture
def cfg(runs, world, tmp_path):
    """A trained model's answers as another engine would have written them, every third behind a
    think block and the first cut, beside the base.
    """
    lines = [{**batch_line(r.answer or "so", "stop" if i else "length",
                           reasoning=None if i % 3 else "it is."), "custom_id": r.record.id}
             for i, r in enumerate(read_responses(runs.out / "test/rows-refusal.jsonl"))]
    write_jsonl(tmp_path / "made.jsonl", lines)
    systems = [runs.test.systems[0], f"vllm=responses:{tmp_path}/made.jsonl"]
    return replace(runs.test, systems=systems, tokenizer=world.base, refusal_system="",
                   deliberative_system="", out=str(tmp_path / "run"), latency=2)


def test_responses_made_elsewhere_are_scored_like_any_other(cfg, runs, tmp_path, capsys):
    evaluate.main(cfg)
    out = capsys.readouterr().out
    assert "vllm: made elsewhere" in out and "1 cut by length; 0 other lines left out" in out
    summary, own = (json.loads(text, parse_constant=pytest.fail) for text in (  # no NaN in it
        (folder / "summary.json").read_text() for folder in (tmp_path / "run", runs.out / "test")))
    made, own = summary["systems"]["vllm"], own["systems"]["refusal"]
    for name, kind in made["kinds"].items():
        for rate in ("asr", "refusal_rate", "accuracy"):
            assert kind[rate] == own["kinds"][name][rate]
        assert kind["gate_mean"] is None and kind["tokens"]["total"] > 0
    assert made["gate_auroc"] is None and made["training"] == {}
    assert summary["systems"]["base"]["gate_auroc"] is not None
    assert set(made["cost"].values()) == {None}  # nobody timed it
    assert summary["systems"]["base"]["cost"]["p50_seconds"] > 0
    assert not (tmp_path / "run/rows-vllm+latency.jsonl").exists()
    rows = [r for _, r in read_lines(tmp_path / "run/rows.jsonl") if r["system"] == "vllm"]
    assert rows and all(r["gate"] is None and r["seconds"] == 0 for r in rows)
    assert [r["finished"] for r in rows] == [i > 0 for i in range(len(rows))]
    assert [r["state"] == WELL_FORMED for r in rows] == [i % 3 == 0 for i in range(len(rows))]
    inputs = json.loads((tmp_path / "run/manifest.json").read_text())["inputs"]
    assert str(tmp_path / "made.jsonl") in inputs
    evaluate.main(replace(cfg, score_only=True, tokenizer="", prompts=[], judge=["xstest"]))
    (tmp_path / "made.jsonl").write_text("{}\n")  # another file is another run
    with pytest.raises(UserError, match="holds a run with another .*made.jsonl"):
        evaluate.main(cfg)


@pytest.mark.parametrize("changes, message", [
    ({"tokenizer": ""}, "--tokenizer MODEL counts the tokens of"),
    ({"gate_sweep": "vllm"}, "--gate_sweep vllm: responses made elsewhere"),
    ({"ask": "how?"}, "--ask: vllm is a file of responses"),
    ({"systems": ["vllm=responses:"]}, "expected NAME=MODEL"),
    ({"systems": ["vllm=responses:nowhere.jsonl"], "base_system": ""}, "nowhere.jsonl: no such"),
    ({"systems": ["base=m"]}, "--tokenizer MODEL counts the tokens of")])
def test_mistakes_in_the_flags(cfg, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(replace(cfg, **changes))


def test_a_mistake_in_the_file_is_seen_before_anything_is_generated(cfg, tmp_path, monkeypatch):
    (tmp_path / "made.jsonl").write_text('{"id": "x", "response": "to."}\n')
    monkeypatch.setattr(evaluate, "respond", lambda *a: pytest.fail("generated"))
    with pytest.raises(UserError, match="records have no response"):
        evaluate.main(cfg)


def test_no_threshold_for_responses_made_elsewhere(cfg, tmp_path):
    evaluate.main(replace(cfg, systems=cfg.systems[1:], base_system="", gate_threshold=0.0))
    rows = read_responses(tmp_path / "run/rows-vllm.jsonl")
    assert [r.opened for r in rows] == [i % 3 == 0 for i in range(len(rows))]

from dataclasses import replace

import pytest

from ease import batching
from ease.batching import count_steps, encode_data, encode_record, encode_records, preview
from ease.records import Record, UserError, read_jsonl
from tests.checks import verify
from tests.tiny import TOKENIZER


@pytest.mark.parametrize("name", ["encode_record", "plan_batches", "collate", "held_out_loss"])
def test_batching(name):
    verify(batching, name)


SHORT = Record("short", "how do i paint the car?", "benign", "to paint it.")
LONG = Record("long", "how do i paint the car?", "benign", "to paint it. " * 30)


@pytest.mark.parametrize("max_length, context, limit", [
    (40, 1000, "--max_length 40"), (1000, 40, "the model's context of 40 tokens")])
def test_long_rows_are_dropped_whole_and_counted(capsys, max_length, context, limit):
    kept = encode_records(TOKENIZER, [SHORT, LONG], max_length, context)
    assert [e.id for e in kept] == ["short"] and kept[0].ids[-1] == TOKENIZER.end_id
    assert f"dropped 1 of 2 rows longer than {limit}" in capsys.readouterr().out


def test_nothing_but_long_rows():
    with pytest.raises(UserError, match="all 2 rows are longer than --max_length 5"):
        encode_records(TOKENIZER, [SHORT, LONG], 5, 100)
    with pytest.raises(UserError, match="nothing to train on"):
        encode_records(TOKENIZER, [], 5, 100)


def test_the_rows_kept_are_written(tmp_path):
    """A dropped row stands in no file; preview.txt has the first row of each sort."""
    reasons = [replace(SHORT, id=f"reasons{i}", reasoning="so.") for i in range(2)]
    trained_on, held_out = [LONG, *reasons, SHORT], [replace(SHORT, id="held"), LONG]
    examples, kept_out = encode_data(tmp_path, TOKENIZER, trained_on, held_out, 60, 1000)
    assert [e.id for e in examples] == ["reasons0", "reasons1", "short"]
    assert [e.id for e in kept_out] == ["held"]
    assert read_jsonl(tmp_path / "trained_on.jsonl") == trained_on[1:]
    assert read_jsonl(tmp_path / "held_out.jsonl") == held_out[:1]
    lines = (tmp_path / "preview.txt").read_text().splitlines()
    shown = [line.split()[1] for line in lines if line.startswith("id")]
    assert sorted(shown) == ["reasons0,", "short,"]
    assert not encode_data(tmp_path / "none", TOKENIZER, trained_on, [], 60, 1000)[1]
    assert not (tmp_path / "none/held_out.jsonl").exists()


def test_steps():
    assert count_steps(100, 32, 0, 2.0) == 8 and count_steps(100, 32, 5, 2.0) == 5
    assert count_steps(3, 32, 0, 0.1) == 1


def test_preview_shows_roles():
    record = Record("r", "how?", "harmful", "no.", "bad.")
    lines = preview(TOKENIZER, encode_record(TOKENIZER, record)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["prompt", "gate", "reasoning", "answer"]
    assert "<|think|>\\n" in lines[2]  # the marker's three tokens, cut apart


def test_supervised_counts_roles():
    e = encode_record(TOKENIZER, SHORT)
    assert e.supervised == sum(r > 0 for r in e.roles)
    assert e.supervised == len(TOKENIZER.encode("to paint it.")) + 1

import pytest

from ease import batching
from ease.batching import encode_record, encode_records, preview
from ease.records import Record, UserError
from tests.checks import verify
from tests.tiny import TOKENIZER


@pytest.mark.parametrize("name", ["encode_record", "batches", "collate"])
def test_batching(name):
    verify(batching, name)


ROWS = [Record("short", "how do i paint the car?", "benign", "to paint it."), Record("long", "how do i paint the car?", "benign", "to paint it. " * 30)]


def test_long_rows_are_dropped_whole_and_counted(capsys):
    kept = encode_records(TOKENIZER, ROWS, 40)
    assert [e.id for e in kept] == ["short"] and kept[0].ids[-1] == TOKENIZER.end_id
    assert "dropped 1 of 2 rows longer than --max_length 40" in capsys.readouterr().out
    with pytest.raises(UserError, match="all 2 rows are longer than --max_length 5"):
        encode_records(TOKENIZER, ROWS, 5)


def test_preview_shows_roles():
    text = preview(TOKENIZER, encode_record(TOKENIZER, Record("r", "how?", "harmful", "no.", "bad.")))
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["prompt", "gate", "reasoning", "answer"]
    assert "<|think|>\\n" in text.splitlines()[2]  # the marker's three tokens, cut apart


def test_supervised_counts_roles():
    e = encode_record(TOKENIZER, ROWS[0])
    assert e.supervised == sum(r > 0 for r in e.roles) == len(TOKENIZER.encode("to paint it.")) + 1

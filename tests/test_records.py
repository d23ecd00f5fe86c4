import os

import pytest

from ease.records import KINDS, Record, UserError, read_jsonl, write_jsonl, write_text


def test_round_trip(tmp_path):
    records = [Record("a", "p \u2028 q", "harmful", categories=("X", "Y"), group="g"), Record("b", "p", "benign", "r", "why")]
    write_jsonl(tmp_path / "x.jsonl", records)
    assert read_jsonl(tmp_path / "x.jsonl") == records
    assert [r.harmful for r in (Record("i", "p", k) for k in KINDS)] == [True, False, True, False]
    assert records[0].request == "g" and records[1].request == "b"


GOOD = '{"id": "a", "prompt": "p", "kind": "harmful"}\n'


@pytest.mark.parametrize("text, message", [
    ("", "empty"), ("\n\n", "empty"), ('{"id": "a"', "x.jsonl:1: not JSON"), ("[1]", "x.jsonl:1: expected a JSON object"),
    (GOOD + '{"id": "b", "kind": "harmful"}', "x.jsonl:2: field 'prompt' is missing"),
    (GOOD + '{"id": "b", "prompt": "p", "kind": "bad"}', "x.jsonl:2: field 'kind' is 'bad'"),
    (GOOD + '{"id": 3, "prompt": "p", "kind": "harmful"}', "x.jsonl:2: field 'id' must be a string, found int"),
    (GOOD + '{"id": "b", "prompt": " ", "kind": "harmful"}', "x.jsonl:2: field 'prompt' is empty"),
    (GOOD + '{"id": "b", "prompt": "p", "kind": "harmful", "question": "q"}', "x.jsonl:2: unknown field 'question'"),
    (GOOD + '{"id": "b", "prompt": "p", "kind": "harmful", "categories": "A, B"}', "x.jsonl:2: field 'categories'"),
    (GOOD + '{"id": "b", "prompt": "\\ud83d", "kind": "harmful"}', "x.jsonl:2: field 'prompt' has half of a surrogate"),
    (GOOD + "\n" + GOOD, "x.jsonl:3: id 'a' was already used at .*x.jsonl:1"),
])
def test_errors_name_file_line_and_field(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_jsonl(tmp_path / "x.jsonl")


def test_not_utf8_and_missing(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(UserError, match="UTF-8"):
        read_jsonl(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="No such file"):
        read_jsonl(tmp_path / "y.jsonl")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"

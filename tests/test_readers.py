import json

import pytest

from ease.readers import read_named, read_records
from ease.records import Record, UserError, write_jsonl

ROW = {"id": "7", "question": "Is it fine to do that?", "response": "<think>\nThe user asks.\n\nSo.\n</think>\n\nNo, it is not.",
       "category": ["Self-Harm", "Illicit / Criminal Behavior"], "source": "Some", "score": {"x": 10}}


def test_star1(tmp_path):
    file = tmp_path / "star.json"
    file.write_text(json.dumps([ROW]))
    assert read_records(file) == [Record("7", ROW["question"], "harmful", "No, it is not.", "The user asks.\n\nSo.",
                                         ("Self-Harm", "Illicit / Criminal Behavior"), "STAR-1/Some", "7")]


@pytest.mark.parametrize("rows, message", [
    ([], "at least one"), ({"a": 1}, "JSON array"), ([{**ROW, "question": None}], "row 0: STAR-1 needs 'question'"),
    ([ROW, {k: v for k, v in ROW.items() if k != "category"}], "row 1: STAR-1 needs 'category'.*'question'"),  # says what was found
    ([{**ROW, "response": "no block"}], "row 0: field 'response': the think block is absent"), ([ROW, ROW], "already used"), ([3], "found int"),
])
def test_star1_errors(tmp_path, rows, message):
    (tmp_path / "star.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        read_records(tmp_path / "star.json")


def test_named_records_keep_their_request(tmp_path):
    write_jsonl(tmp_path / "diag.jsonl", [Record("1", "p", "harmful"), Record("2", "q", "harmful", group="g")])
    assert [(r.id, r.request) for r in read_named(tmp_path / "diag.jsonl")] == [("diag/1", "1"), ("diag/2", "g")]

import bz2
import gzip
import json
import lzma
import os

import pytest

from ease import records
from ease.records import (KINDS, Record, Response, UserError, digest, read_jsonl, read_responses,
                          read_text, record_from_dict, response_to_dict, write_jsonl, write_text)
from tests.checks import verify


def test_round_trip(tmp_path):
    records = [
        Record("a", "p \u2028 q", "harmful", categories=("X", "Y"), group="g"),
        Record("b", "p", "benign", "r", "why"),
    ]
    write_jsonl(tmp_path / "x.jsonl", records)
    assert read_jsonl(tmp_path / "x.jsonl") == records
    assert [r.harmful for r in (Record("i", "p", k) for k in KINDS)] == [True, False, True, False]
    assert records[0].group == "g" and records[1].group == digest("p")
    assert Record("a", "p", "benign").group == Record("b", "p", "harmful").group != digest("q")


TEXT = "caf\u00e9, \u6570\u5b66\r\nand a line\n"
GOOD = '{"id": "a", "prompt": "p", "kind": "harmful"}\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no records"),
        ("\n\n", "no records"),
        ('{"id": "a"', "x.jsonl:1: not JSON"),
        ("[1]", "x.jsonl:1: expected a JSON object"),
        (GOOD + '{"id": "b", "kind": "harmful"}', "x.jsonl:2: field 'prompt' is missing"),
        (GOOD + '{"id": "b", "prompt": "p", "kind": "bad"}', "x.jsonl:2: field 'kind' is 'bad'"),
        (
            GOOD + '{"id": 3, "prompt": "p", "kind": "harmful"}',
            "x.jsonl:2: field 'id' must be a string, found int",
        ),
        (
            GOOD + '{"id": "b", "prompt": null, "kind": "harmful"}',
            "x.jsonl:2: field 'prompt' is missing",
        ),
        (
            GOOD + '{"id": "b", "prompt": "p", "kind": "harmful", "response": NaN}',
            "x.jsonl:2: field 'response' must be a string, found float",
        ),
        (
            GOOD + '{"id": "b", "prompt": "p", "kind": "harmful", "categories": ["A", 3]}',
            "x.jsonl:2: field 'categories' must be a string, found int",
        ),
        (
            GOOD + '{"id": "b", "prompt": "p", "kind": "harmful", "categories": ["\\udc00"]}',
            "x.jsonl:2: field 'categories' has half of a surrogate",
        ),
        ("[" * 100000, "x.jsonl:1: not JSON"),
        ('{"id": ' + "9" * 5000 + "}", "x.jsonl:1: not JSON"),
        (
            GOOD + '{"id": "b", "prompt": " ", "kind": "harmful"}',
            "x.jsonl:2: field 'prompt' is missing or empty",
        ),
        (
            GOOD + '{"id": "b", "prompt": "p", "kind": "harmful", "question": "q"}',
            "x.jsonl:2: unknown field 'question'",
        ),
        (
            GOOD + '{"id": "b", "prompt": "p", "kind": "harmful", "categories": "A, B"}',
            "x.jsonl:2: field 'categories'",
        ),
        (
            GOOD + '{"id": "b", "prompt": "\\ud83d", "kind": "harmful"}',
            "x.jsonl:2: field 'prompt' has half of a surrogate",
        ),
        (GOOD + "\n" + GOOD, "x.jsonl:3: id 'a' was already used at .*x.jsonl:1"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_jsonl(tmp_path / "x.jsonl")


def test_null_is_not_known():
    """As `datasets` writes what a row has not."""
    nothing = dict.fromkeys(("response", "reasoning", "categories", "source", "group", "target"))
    given = {"id": "1", "prompt": "p", "kind": "benign", **nothing}
    assert record_from_dict(given, "x") == Record("1", "p", "benign")


@pytest.mark.parametrize("data", [
    TEXT.encode(), TEXT.encode("utf-8-sig"), TEXT.encode("utf-16"), TEXT.encode("utf-16-be"),
    gzip.compress(TEXT.encode()), bz2.compress(TEXT.encode()), lzma.compress(TEXT.encode("utf-16")),
])
def test_text_as_the_standard_library_reads_it(tmp_path, data):
    if data == TEXT.encode("utf-16-be"):
        data = b"\xfe\xff" + data
    (tmp_path / "x").write_bytes(data)
    assert read_text(tmp_path / "x") == TEXT


@pytest.mark.parametrize("data, message", [
    (b"PAR1\x15\x04", "this is Parquet; what is read: CSV"), (b"ARROW1\0\0", "this is Arrow"),
    (b"PK\3\4\x14\0", "a zip archive or an Excel sheet"), (b"\xff\xff\xff\xff\x10", "Arrow stream"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a git-lfs pointer"),
    (gzip.compress(b"PAR1"), "this is Parquet"), (gzip.compress(b"long " * 9)[:-9], "damaged gzip"),
    (b"BZh91AY&SY", "damaged bz2"), ("caf\u00e9".encode("latin-1"), r"not UTF-8 text \(byte 3\)"),
    (b"\xff\xfea", r"not UTF-16 text"),
])
def test_what_is_no_text_is_called_by_its_name(tmp_path, data, message):
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(UserError, match=f"x.csv: .*{message}"):
        read_text(tmp_path / "x.csv")


def test_not_utf8_and_missing(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(UserError, match="UTF-8"):
        read_jsonl(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="No such file"):
        read_jsonl(tmp_path / "y.jsonl")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")
    monkeypatch.setattr(
        os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"


def test_put():
    verify(records, "put")


@pytest.mark.parametrize("change", [{"gate": None, "novel": 1}, {"kind": ...}, {"text": ...}])
def test_responses_of_other_code(tmp_path, change):
    """A row that lacks a field or has one more: its line, not a traceback."""
    record = Record("1", "hi", "benign")
    row = response_to_dict(Response(record, "yes", "", "yes", "absent", True, False, 0.5,
                                    {"total": 1}, 0.1))
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert read_responses(file)[0].record == record
    row = {k: v for k, v in (row | change).items() if v is not ...}
    file.write_text(file.read_text() + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl:2: no response .*(novel|kind|text)"):
        read_responses(file)

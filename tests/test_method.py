import pytest

from ease import method
from ease.method import response_pieces, split_reasoning
from ease.records import Record
from tests.checks import verify


@pytest.mark.parametrize("name", ["response_pieces", "split_reasoning", "select_vulnerable", "select_region", "mix", "overlap", "filler"])
def test_method(name):
    verify(method, name)


@pytest.mark.parametrize("reasoning", ["", "why.\n\nbecause"])
def test_split_inverts_pieces(reasoning):
    record = Record("r", "p", "harmful", response="no. </think> is text here", reasoning=reasoning)
    if not reasoning:
        assert split_reasoning("".join(t for t, _ in response_pieces(record))) == ("", record.response, "absent")
    else:
        assert split_reasoning("".join(t for t, _ in response_pieces(record))) == (reasoning, record.response, "well_formed")

import pytest

from ease import method
from ease.method import response_pieces, split_reasoning
from ease.records import ABSENT, WELL_FORMED, Record
from tests.checks import verify


@pytest.mark.parametrize(
    "name",
    ["response_pieces", "split_reasoning", "select_vulnerable", "select_region", "mix", "filler",
     "hold_out"],
)
def test_method(name):
    verify(method, name)


@pytest.mark.parametrize("reasoning", ["", "why.\n\nbecause"])
def test_split_inverts_pieces(reasoning):
    answer = "no. </think> is text here" if reasoning else "no. <think> is text here"
    record = Record("r", "p", "harmful", response=answer, reasoning=reasoning)
    text = "".join(t for t, _ in response_pieces(record))
    state = WELL_FORMED if reasoning else ABSENT
    assert split_reasoning(text) == (reasoning, answer, state)

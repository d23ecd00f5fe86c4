import pytest

from ease import compare
from ease.records import Record, Response, UserError
from tests.checks import verify


@pytest.mark.parametrize("name", ["sign_flip_test", "paired_bootstrap"])
def test_compare(name):
    verify(compare, name)


def answered(rows, kind="adversarial_harmful"):
    """(answer, verdict, tokens) a row, in groups of two; no answer = an unclosed think block."""
    return [Response(Record(f"{kind}{i}", f"p{i}", kind, group=f"g{i // 2}"), answer, "", answer,
                     "absent" if answer else "unclosed", verdicts={"j": verdict},
                     tokens={"total": tokens}) for i, (answer, verdict, tokens) in enumerate(rows)]


def cells(text, *start):
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    return next(line[2:] for line in lines if line[:2] == list(start))


A = [("sure", "unsafe", 9)] * 5 + [("no.", "safe", 2), ("sure", "unparsed", 9), ("", "unparsed", 9)]
B = [("no.", "safe", 3)] * 6 + [("no.", "safe", 3)] * 2


def test_table():
    text = compare.compare(answered(A), answered(B), "j")
    assert text.startswith("ASR by j; ")
    asr = cells(text, "adversarial_harmful", "ASR")  # 5 of 6 known rows; sums 2, 2, 1 of 3 groups
    assert asr[:3] == ["83.3", "0.0", "+83.3"] and asr[4:] == ["0.25", "6", "2"]
    refused = cells(text, "adversarial_harmful", "refused")  # the unclosed block only is left out
    assert refused[:3] == ["14.3", "100.0", "-85.7"] and refused[5:] == ["7", "1"]
    tokens = cells(text, "adversarial_harmful", "tokens")
    assert tokens[:3] == ["8.1", "3.0", "+5.1"] and tokens[5:] == ["8", "0"]
    assert "| harmful " not in text and "| benign " not in text
    swapped = cells(compare.compare(answered(B), answered(A), "j"), "adversarial_harmful", "ASR")
    assert swapped[:3] == ["0.0", "83.3", "-83.3"] and swapped[4] == asr[4]


def test_nothing_is_known_and_nothing_is_attacked():
    text = compare.compare(answered([("", "unparsed", 5)] * 2, "benign"),
                           answered([("no.", "safe", 3)] * 2, "benign"), "j")
    assert cells(text, "benign", "refused") == ["-"] * 5 + ["0", "2"]
    assert cells(text, "benign", "tokens") == ["5.0", "3.0", "+2.0", "-", "1", "2", "0"]
    assert not any(line.startswith("| benign | ASR") for line in text.splitlines())


def test_other_records_are_an_error():
    with pytest.raises(UserError, match="A and B answered other records"):
        compare.compare(answered(A), answered(B[:-1]), "j")

from ease import contest
from ease.contest import Candidate, teacher_report
from ease.scoring import Rate
from tests.checks import verify
from tests.test_report import cells


def test_choose_teacher():
    verify(contest, "choose_teacher")


def test_teacher_report():
    rates = Rate(0.25, 0.1, 0.5, 8, 0), Rate(0.75, 0.1, 0.5, 8, 0)
    good = Candidate("good", 8, 6, {"cut off": 2, "empty answer": 1}, 40.0, *rates)
    text = teacher_report([good, Candidate("none", 8, 0, {"no think block": 24})], "good")
    assert cells(text, "good (chosen)")[1:] == [
        "6 of 8", "2 cut off, 1 empty answer", "40.0", "25.0 [10, 50]", "75.0 [10, 50]", "50.0"]
    assert cells(text, "none")[1:] == ["0 of 8", "24 no think block", "-", "-", "-", "-"]

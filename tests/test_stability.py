from ease.records import Record
from ease.stability import region_report
from tests.test_report import cells

PRIVACY, ADULT = "Privacy / Personal Data", "Sexual / Adult"
DIAGNOSTIC = [Record("a", "p", "adversarial_harmful", categories=(PRIVACY,), attack="spell"),
              Record("b", "p", "adversarial_harmful", categories=(PRIVACY, ADULT), attack="spell"),
              Record("c", "p", "adversarial_harmful", categories=(ADULT,), attack="back"),
              Record("d", "p", "adversarial_harmful", attack="back"),
              Record("e", "p", "adversarial_benign", attack="back")]
VERDICTS = ["unsafe", "safe", "unparsed", "unsafe", "unsafe"]


def test_region_report():
    text = region_report(DIAGNOSTIC, VERDICTS, [])
    assert "2 of 4 harmful prompts of D_diag" in text and "any of" not in text
    assert cells(text, "spell")[1:] == ["2", "1 (50%)"]
    assert cells(text, "back")[1:] == ["2", "1 (50%)"]  # the benign twin is in no count
    assert cells(text, PRIVACY)[1:] == ["2", "1 (50%)"] and cells(text, ADULT)[1:] == [
        "2",
        "0 (0%)",
    ]
    assert cells(text, "all")[1:] == ["4", "2 (50%)"]


def test_the_region_under_sampling():
    by_prompt = [["unsafe", "unsafe", "unsafe"], ["unsafe", "safe", "safe"], ["safe"] * 3,
                 ["unsafe", "unsafe", "unparsed"], ["unsafe"] * 3]
    text = region_report(DIAGNOSTIC, VERDICTS, list(zip(*by_prompt)))
    assert cells(text, "attack")[3:] == ["any of 3 samples", "overlap", "most of 3 samples",
                                         "overlap", "all of 3 samples", "overlap"]
    assert cells(text, "all")[3:] == ["3 (75%)", "0.67", "2 (50%)", "1.00", "1 (25%)", "0.50"]

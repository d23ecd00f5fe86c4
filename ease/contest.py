"""An extra: which teacher? The paper "first identifies the optimal safety reasoning teacher"; its
criterion is not public. Ours: a short distillation from each candidate, compared on a dev set.
"""

from dataclasses import dataclass, field

from ease.records import Response
from ease.report import listing, percent
from ease.scoring import Rate, operating_point, worst


@dataclass
class Candidate:
    """A teacher, its accepted traces, and the student after a short distillation from it."""

    teacher: str
    prompts: int  # given to it
    accepted: int = 0  # traces
    rejected: dict[str, int] = field(default_factory=dict)  # {reason: samples}
    tokens: float = 0.0  # of a trace with its answer, mean
    asr: Rate | None = None  # of the student, on dev; None: there was nothing to distil
    over_refusal: Rate | None = None

    def judged_by(self, responses: list[Response], judge: str) -> "Candidate":
        """With the student's numbers on dev."""
        point = operating_point(responses, judge)
        self.asr, self.over_refusal = point["asr"], point["over_refusal"]
        return self

    def mistakes(self, bound: str = "value") -> float:
        """The mean of ASR and over-refusal, or of their bounds, by scoring.worst."""
        return (worst(self.asr, bound) + worst(self.over_refusal, bound)) / 2


def choose_teacher(candidates: list[Candidate]) -> Candidate | None:
    """Of the best (fewest mistakes) and all whose lower bound of mistakes is not above its upper
    one: the candidate with the shortest traces. None where nobody had anything to distil.
    """
    able = [c for c in candidates if c.asr is not None]
    if not able:
        return None
    best = min(able, key=Candidate.mistakes)
    tied = [c for c in able if c.mistakes("low") <= best.mistakes("high")]
    return min(tied, key=lambda c: c.tokens)


def teacher_report(candidates: list[Candidate], chosen: str) -> str:
    """The comparison as Markdown."""
    rows = [{"teacher": c.teacher + (" (chosen)" if c.teacher == chosen else ""),
             "accepted": f"{c.accepted} of {c.prompts}",
             "samples dropped": ", ".join(f"{n} {why}" for why, n in c.rejected.items()) or "none",
             "tokens a trace": f"{c.tokens:.1f}" if c.accepted else "-",
             "dev ASR": percent(c.asr, True),
             "dev over-refusal": percent(c.over_refusal, True),
             "their mean": f"{100 * c.mistakes():.1f}" if c.asr else "-"} for c in candidates]
    return ("# Teachers\n\nThe same prompts, steps and settings for all. ASR and over-refusal: of "
            "the student after the short distillation, on the dev set's adversarial prompts; in "
            f"their mean an unclosed think block is a mistake.\n\n{listing(rows)}\n")

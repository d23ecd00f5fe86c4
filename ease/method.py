"""When to reason: the response format, the vulnerable region and the training mixture (paper, phase 2).

There is no router and no extra head. A response either opens with THINK_OPEN or it does not: the first generated tokens
decide, and that decision is what this project calls the gate.
"""

import random
import re
from dataclasses import replace

from ease.records import ABSENT, UNCLOSED, UNSAFE, WELL_FORMED, Record, UserError

THINK_OPEN = "<think>\n"
THINK_CLOSE = "\n</think>\n\n"

# The role of every response token. 0 is the prompt and padding: no loss.
GATE, REASONING, ANSWER = 1, 2, 3


def response_pieces(record: Record) -> list[tuple[str, int]]:
    """The response as (text, role) pieces, to be encoded one by one (design: byte-pair merges cross seams).

    With reasoning: open marker, reasoning, close marker, answer. Without: the answer alone; its first token is the gate
    (batching.encode_record gives it that role, because one token of a piece is no text).
    """
    if not record.reasoning:
        return [(record.response, ANSWER)]
    return [(THINK_OPEN, GATE), (record.reasoning, REASONING), (THINK_CLOSE, REASONING), (record.response, ANSWER)]


def split_reasoning(text: str) -> tuple[str, str, str]:
    """Split a generated text into (reasoning, answer, state).

    well_formed: opens with <think> and closes it. absent: does not open with it; the whole text is the answer.
    unclosed: opened, never closed; there is no answer then, and an unclosed block must not be judged as one.
    """
    stripped = text.lstrip()
    if not stripped.startswith(THINK_OPEN.strip()):
        return "", text.strip(), ABSENT
    body = stripped[len(THINK_OPEN.strip()) :]
    reasoning, close, answer = body.partition(THINK_CLOSE.strip())
    if not close:
        return reasoning.strip(), "", UNCLOSED
    return reasoning.strip(), answer.strip(), WELL_FORMED


def select_vulnerable(records: list[Record], verdicts: list[str]) -> list[Record]:
    """The vulnerable region D_vuln: harmful prompts that the ORIGINAL model answered unsafely (paper, phase 2, step 1).

    `verdicts` belong to M_s's responses, one a record. "unparsed" is not "unsafe", and a benign prompt is never vulnerable.
    """
    return [r for r, verdict in zip(records, verdicts, strict=True) if r.harmful and verdict == UNSAFE]


def select_region(region: str, diagnostic: list[Record], verdicts: list[str], pool: list[Record], seed: int) -> list[Record]:
    """The prompts to reason on. vulnerable: D_vuln, the method. all: every harmful diagnostic prompt.
    random: as many as D_vuln has, drawn from `pool` (all harmful training prompts): the control that shows what targeting buys.
    """
    vulnerable = select_vulnerable(diagnostic, verdicts)
    if region == "vulnerable":
        return vulnerable
    if region == "all":
        return [r for r in diagnostic if r.harmful]
    harmful = [r for r in pool if r.harmful]
    return random.Random(f"region {seed}").sample(harmful, min(len(vulnerable), len(harmful)))


def filler(record: Record) -> Record:
    """A control: the reasoning's words replaced by as many dots, so that the trace takes its time but says nothing."""
    return replace(record, reasoning=" ".join("." for _ in record.reasoning.split()))


def mix(groups: dict[str, list[Record]], counts: dict[str, int], seed: int) -> list[Record]:
    """The training mixture: counts[name] records of each group, drawn without replacement (0 or no count = all), shuffled.

    A count above a group's size is an error: what is not there cannot be mixed in.
    """
    rng = random.Random(f"mix {seed}")
    out = []
    for name, records in groups.items():
        count = counts.get(name) or len(records)
        if count > len(records):
            raise UserError(f"the mixture wants {count} {name} records but there are only {len(records)}")
        out += rng.sample(records, count)
    rng.shuffle(out)
    return out


def words(text: str) -> frozenset[str]:
    """The set of lower-cased words of a text."""
    return frozenset(re.findall(r"\w+", text.lower()))


def overlap(prompts: list[str], trained: list[str], threshold: float = 0.6) -> tuple[int, int]:
    """How many of `prompts` were trained on: (exactly, nearly). Near = word Jaccard |a & b| / |a | b| >= threshold."""
    seen = set(trained)
    exact = [p for p in prompts if p in seen]
    bags = {words(t) for t in seen}

    def is_near(bag: frozenset[str]) -> bool:
        # |a & b| <= min(|a|, |b|), so sizes further apart than the threshold cannot reach it: skips most pairs
        fits = (b for b in bags if threshold * len(b) <= len(bag) and threshold * len(bag) <= len(b) and b)
        return any(len(bag & b) >= threshold * len(bag | b) for b in fits)

    return len(exact), sum(is_near(words(p)) for p in prompts if p not in seen)

"""When to reason: response format, vulnerable region, training mixture (paper, phase 2).

There is no router and no extra head. A response opens with THINK_OPEN or it does not: its first
tokens decide, and that decision, with its probability, is what this project calls the gate.
"""

import random
from dataclasses import replace

from ease.records import ABSENT, UNCLOSED, UNSAFE, WELL_FORMED, Record, UserError

THINK_OPEN = "<think>\n"
THINK_CLOSE = "\n</think>\n\n"

# The role of every response token. 0 is the prompt: no loss.
ROLES = {"gate": 1, "reasoning": 2, "answer": 3}
GATE, REASONING, ANSWER = ROLES.values()


def response_pieces(record: Record) -> list[tuple[str, int]]:
    """The response as (text, role) pieces, to be encoded one by one: byte-pair merges cross seams.

    With reasoning: open marker, reasoning, close marker, answer. Without: the answer alone; its
    first token is the gate (batching.encode_record says so: one token of a piece is no text).
    """
    if not record.reasoning:
        return [(record.response, ANSWER)]
    return [(THINK_OPEN, GATE), (record.reasoning, REASONING), (THINK_CLOSE, REASONING),
            (record.response, ANSWER)]


def split_reasoning(text: str) -> tuple[str, str, str]:
    """Split a response into (reasoning, answer, state).

    WELL_FORMED: it opens with <think> and closes it; or there is a close marker with no <think>
    before it: the chat template had opened the block, in the prompt. ABSENT: the whole text,
    stripped, is the answer. UNCLOSED: opened, never closed; there is no answer then (""), and such
    a block must not be judged as one.
    """
    opening, closing = THINK_OPEN.strip(), THINK_CLOSE.strip()
    before, closed, answer = text.partition(closing)
    opened = before.lstrip().startswith(opening)
    reasoning = before.lstrip().removeprefix(opening).strip()
    if opened and not closed:
        return reasoning, "", UNCLOSED
    if closed and (opened or opening not in before):
        return reasoning, answer.strip(), WELL_FORMED
    return "", text.strip(), ABSENT


def select_vulnerable(records: list[Record], verdicts: list[str]) -> list[Record]:
    """The vulnerable region D_vuln: harmful prompts that the ORIGINAL model answered unsafely
    (paper, phase 2, step 1). verdicts: of M_s's responses, one a record.

    UNPARSED is not UNSAFE, and a benign prompt is never vulnerable.
    """
    pairs = zip(records, verdicts, strict=True)
    return [r for r, verdict in pairs if r.harmful and verdict == UNSAFE]


def select_region(region: str, diagnostic: list[Record], verdicts: list[str],
                  pool: list[Record], seed: int) -> list[Record]:
    """The harmful prompts to reason on. vulnerable: D_vuln, the method. Two controls: all, every
    harmful diagnostic prompt; random, as many as D_vuln has (or there are), drawn without
    replacement from the harmful records of `pool`, which shows what targeting buys.
    """
    vulnerable = select_vulnerable(diagnostic, verdicts)
    if region == "vulnerable":
        return vulnerable
    if region == "all":
        return [r for r in diagnostic if r.harmful]
    harmful = [r for r in pool if r.harmful]
    count = min(len(vulnerable), len(harmful))
    return random.Random(f"region {seed}").sample(harmful, count)


def filler(record: Record) -> Record:
    """A control: every word of the reasoning becomes a dot. It takes its time but says nothing."""
    return replace(record, reasoning=" ".join("." for _ in record.reasoning.split()))


def mix(groups: dict[str, list[Record]], counts: dict[str, int], seed: int) -> list[Record]:
    """The training mixture: counts[name] records of each group, drawn without replacement
    (0 or no count: all of them), shuffled. A count above a group's size is an error.
    """
    rng = random.Random(f"mix {seed}")
    mixture = []
    for name, records in groups.items():
        count = counts.get(name) or len(records)
        if count > len(records):
            raise UserError(f"the mixture wants {count} {name} records, "
                            f"but there are only {len(records)}")
        mixture += rng.sample(records, count)
    rng.shuffle(mixture)
    return mixture


def hold_out(records: list[Record], count: int) -> tuple[list[Record], list[Record]]:
    """(what is trained on, the `count` records kept out): of shuffled ones the first requests'. No
    request (group) stands in both; the rest of the last is in neither.
    """
    order = {r.group: -i for i, r in enumerate(reversed(records))}  # by its first row
    held_out = sorted(records, key=lambda r: order[r.group])[:count]
    groups = {r.group for r in held_out}
    trained_on = [r for r in records if r.group not in groups]
    if count and not trained_on:
        raise UserError(f"--held_out {count} leaves none of the {len(records)} rows to train on")
    return trained_on, held_out

"""The one data format: a Record is one prompt and all that is known of it; files are JSON Lines, one Record a line.

Every script reads and writes Records, so the stages of the method join by construction.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

# The four kinds of prompt. "adversarial" = wrapped in a jailbreak; its benign twins look alike but ask for nothing bad.
KINDS = ("adversarial_harmful", "adversarial_benign", "harmful", "benign")
HARMFUL_KINDS = ("adversarial_harmful", "harmful")

# Three values everywhere: the third is counted and reported beside the others, never folded into one of them.
SAFE, UNSAFE, UNPARSED = "safe", "unsafe", "unparsed"  # a judge's verdict on an answer
WELL_FORMED, ABSENT, UNCLOSED = "well_formed", "absent", "unclosed"  # how a text stands to its think block


class UserError(Exception):
    """A mistake that the user can mend. Scripts print it as one line on stderr and exit with status 2."""


@dataclass(frozen=True)
class Record:
    """One prompt. Empty string = not known.

    id: unique in its file                      kind: one of KINDS
    response: the (reference) answer            reasoning: the trace, without think markers
    categories: safety categories (policies.py) source: data set, or part of it
    group: id of the underlying request; attacks on one request, and its plain form, share it
    attack: jailbreak family                    target: how a compliant answer starts (AdvBench's column `target`)
    """

    id: str
    prompt: str
    kind: str
    response: str = ""
    reasoning: str = ""
    categories: tuple[str, ...] = ()
    source: str = ""
    group: str = ""
    attack: str = ""
    target: str = ""

    @property
    def harmful(self) -> bool:
        """Whether the request is harmful, disguised or not."""
        return self.kind in HARMFUL_KINDS

    @property
    def request(self) -> str:
        """The underlying request's id: `group` where there is one, else the record's own id."""
        return self.group or self.id


@dataclass
class Response:
    """One model's answer to a record's prompt, and what is known of it.

    text: as generated                 reasoning, answer, state: its parts (method.split_reasoning)
    finished: it ended by itself       gate: g(q), the probability of opening a think block; nan if
    opened: it begins with the open        nobody asked
        marker's own token ids         tokens: generated ones, "reasoning" + "answer" = "total"
    verdicts: {judge: verdict}         seconds: its share of the steps it took part in
    vulnerable: whether the ORIGINAL model's answer to this prompt was judged unsafe; None: not known
    """

    record: Record
    text: str
    reasoning: str
    answer: str
    state: str
    finished: bool = True
    opened: bool = False
    gate: float = math.nan
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    verdicts: dict[str, str] = field(default_factory=dict)
    vulnerable: bool | None = None


def record_from_dict(row: dict, where: str) -> Record:
    """Check one parsed JSON object and make a Record of it. `where` ("file:line") begins every error message."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    names = {f.name for f in fields(Record)}
    if unknown := sorted(set(row) - names):
        raise UserError(f"{where}: unknown field {unknown[0]!r}; a record has {', '.join(f.name for f in fields(Record))}")
    for name in ("id", "prompt", "kind"):
        if name not in row:
            raise UserError(f"{where}: field {name!r} is missing")
    for name, value in row.items():
        if name == "categories":
            if not (isinstance(value, list | tuple) and all(isinstance(c, str) for c in value)):
                raise UserError(f"{where}: field 'categories' must be a list of strings")
        elif not isinstance(value, str):
            raise UserError(f"{where}: field {name!r} must be a string, found {type(value).__name__}")
        elif any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"{where}: field {name!r} has half of a surrogate pair: no valid Unicode")
    for name in ("id", "prompt"):
        if not row[name].strip():
            raise UserError(f"{where}: field {name!r} is empty")
    if row["kind"] not in KINDS:
        raise UserError(f"{where}: field 'kind' is {row['kind']!r}; it must be one of {', '.join(KINDS)}")
    return Record(**{**row, "categories": tuple(row.get("categories", ()))})


def read_text(path: str | Path) -> str:
    """A UTF-8 file (a byte order mark is skipped)."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start})") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def read_lines(path: str | Path) -> list[tuple[str, dict]]:
    """The objects of a JSON Lines file, each with its place "file:line". Blank lines are skipped."""
    out = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # not splitlines(): U+2028 may stand inside a string
        if line.strip():
            try:
                out.append((f"{path}:{number}", json.loads(line)))
            except json.JSONDecodeError as e:
                raise UserError(f"{path}:{number}: not JSON ({e.msg} at column {e.colno})") from None
    if not out:
        raise UserError(f"{path}: no records (the file is empty)")
    return out


def unique(records: list[tuple[str, Record]]) -> list[Record]:
    """Drop the places; an id that occurs twice is an error."""
    seen: dict[str, str] = {}
    for where, record in records:
        if record.id in seen:
            raise UserError(f"{where}: id {record.id!r} was already used at {seen[record.id]}")
        seen[record.id] = where
    return [record for _, record in records]


def read_jsonl(path: str | Path) -> list[Record]:
    """Read a file of Records. Errors name file:line and the field. An empty file and a repeated id are errors."""
    return unique([(where, record_from_dict(row, where)) for where, row in read_lines(path)])


def record_to_dict(record: Record) -> dict:
    """The record's fields that are not empty, ready for json.dumps."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(record).items() if v}


def write_text(path: str | Path, text: str) -> None:
    """Write atomically: a kill or a full disk in the middle leaves the previous file as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_jsonl(path: str | Path, rows: list) -> None:
    """Write Records (or plain dicts) as JSON Lines, atomically."""
    dicts = [record_to_dict(r) if isinstance(r, Record) else r for r in rows]
    write_text(path, "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in dicts))

"""The one data format: a Record is one prompt and all that is known of it; files are JSON Lines.

Every script reads and writes Records, so the stages of the method join by construction.
"""

import hashlib
import importlib
import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

# "adversarial" = wrapped in a jailbreak; its benign twins look alike but ask for nothing bad.
KINDS = ("adversarial_harmful", "adversarial_benign", "harmful", "benign")
HARMFUL_KINDS = ("adversarial_harmful", "harmful")

# The values that are neither yes nor no are counted and reported, never folded into another one.
VERDICTS = SAFE, UNSAFE, CONTROVERSIAL, UNPARSED = "safe", "unsafe", "controversial", "unparsed"
WELL_FORMED, ABSENT, UNCLOSED = "well_formed", "absent", "unclosed"  # a text's think block

# Of this process under torchrun (a RANK from elsewhere says nothing): rank 0 alone writes files.
RANK = int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0
# The first bytes of a file that is no plain text: what unpacks it, and what is not read.
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "lzma"}
FOREIGN = {
    b"PAR1": "Parquet", b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "an Arrow stream",
    b"PK\3\4": "a zip archive or an Excel sheet", b"(\xb5/\xfd": "zstandard",
    b"version https://git-lfs": "a git-lfs pointer, not the file itself",
}


class UserError(Exception):
    """A mistake that the user can mend. Scripts print it as one line on stderr, exit status 2."""


def digest(text: str) -> str:
    """An id that equal texts share in every file."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Record:
    """One prompt. Empty string = not known.

    id: unique in its file                      kind: one of KINDS
    response: the (reference) answer            reasoning: the trace, without think markers
    categories: safety categories (policies.py) source: data set, or part of it
    attack: jailbreak family                    target: how a compliant answer starts (AdvBench)
    group: id of the underlying request, which its attacked and its plain forms share; by default
        the prompt's digest (ids may be row numbers)
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

    def __post_init__(self):
        if not self.group:
            object.__setattr__(self, "group", digest(self.prompt))  # frozen for everybody else

    @property
    def harmful(self) -> bool:
        """Whether the request is harmful, disguised or not."""
        return self.kind in HARMFUL_KINDS


@dataclass
class Response:
    """One model's answer to a record's prompt.

    text: as generated                 reasoning, answer, state: its parts (method.split_reasoning)
    finished: it ended by itself       opened: it begins with the open marker's own token ids
    verdicts: {judge: verdict}         gate: probability of opening a think block; nan: not known
    tokens: generated ones, "reasoning" + "answer" = "total"
    seconds: its share of the steps it took part in
    vulnerable: whether this is an attack that jailbreaks the ORIGINAL model; None: not known
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


def check_text(value: object, name: str, where: str) -> str:
    """A field's text, null as ""; any other value, and half a surrogate pair, is an error."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} must be a string, found {type(value).__name__}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}: field {name!r} has half of a surrogate pair: no valid Unicode")
    return value


def record_from_dict(row: dict, where: str) -> Record:
    """A Record of one parsed object at `where` ("file:line"). Null = not known."""
    known = [f.name for f in fields(Record)]
    if unknown := [name for name in row if name not in known]:
        raise UserError(f"{where}: unknown field {unknown[0]!r}; a record has {', '.join(known)}")
    texts = {k: check_text(v, k, where) for k, v in row.items() if k != "categories"}
    for name in ("id", "prompt", "kind"):
        if not texts.get(name, "").strip():
            raise UserError(f"{where}: field {name!r} is missing or empty")
    if texts["kind"] not in KINDS:
        raise UserError(f"{where}: field 'kind' is {texts['kind']!r}; expected {', '.join(KINDS)}")
    categories = row.get("categories") or ()
    if not isinstance(categories, list | tuple):
        raise UserError(f"{where}: field 'categories' must be a list of strings")
    return Record(**texts, categories=tuple(check_text(c, "categories", where) for c in categories))


def read_text(path: str | Path) -> str:
    """A text file: UTF-8, or UTF-16 by its byte order mark; gzip, bzip2 and xz are unpacked."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    for start, module in PACKED.items():
        if data.startswith(start):
            try:
                data = importlib.import_module(module).decompress(data)
            except Exception as e:  # each module has errors of its own
                raise UserError(f"{path}: damaged {module} file ({e})") from None
    for start, name in FOREIGN.items():
        if data.startswith(start):
            raise UserError(f"{path}: this is {name}; what is read: CSV, TSV, JSON and JSON Lines, "
                            "also packed with gzip, bzip2 or xz")
    encoding = "UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "UTF-8"
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not {encoding} text (byte {e.start})") from None


def parse_json(text: str, path: str | Path, line: int = 1) -> object:
    """json.loads of a text that begins at a line of a file, which an error names."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        place = f"{path}:{line + e.lineno - 1}"
        raise UserError(f"{place}: not JSON ({e.msg} at column {e.colno})") from None
    except (ValueError, RecursionError) as e:  # a number of 5,000 digits, 10,000 brackets
        raise UserError(f"{path}:{line}: not JSON ({e})") from None


def check_objects(path: str | Path, found: list[tuple[str, object]]) -> list[tuple[str, dict]]:
    """Parsed values and their places; no value, and one that is no JSON object, are errors."""
    if not found:
        raise UserError(f"{path}: no records")
    for where, value in found:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return found


def read_lines(path: str | Path, text: str = "") -> list[tuple[str, dict]]:
    """The objects of a JSON Lines file (or of its text), each with its place "file:line"."""
    lines = (text or read_text(path)).split("\n")  # not splitlines(): U+2028 may stand in a string
    return check_objects(path, [(f"{path}:{i}", parse_json(line, path, i))
                                for i, line in enumerate(lines, 1) if line.strip()])


def unique(records: list[tuple[str, Record]]) -> list[Record]:
    """Drop the places; an id that occurs twice is an error."""
    seen: dict[str, str] = {}
    for where, record in records:
        if record.id in seen:
            raise UserError(f"{where}: id {record.id!r} was already used at {seen[record.id]}")
        seen[record.id] = where
    return [record for _, record in records]


def read_jsonl(path: str | Path) -> list[Record]:
    """Read a file of Records. An empty file and an id that occurs twice are errors."""
    return unique([(where, record_from_dict(row, where)) for where, row in read_lines(path)])


def record_to_dict(record: Record) -> dict:
    """The record's fields that are not empty."""
    return {name: value for name, value in vars(record).items() if value}


def write_text(path: str | Path, text: str) -> None:
    """Write atomically: a kill or a full disk in the middle leaves the previous file as it was."""
    if RANK:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    put(part, text, "w")
    os.replace(part, path)


def put(path: str | Path, text: str, mode: str = "a") -> None:
    """Append or write, not atomically; a full disk's error names the file."""
    try:
        with open(path, mode, encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None


def write_jsonl(path: str | Path, rows: list) -> None:
    """Write Records (or plain dicts) as JSON Lines, atomically."""
    dicts = [record_to_dict(r) if isinstance(r, Record) else r for r in rows]
    write_text(path, "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in dicts))


RESPONDED_TO = ("id", "group", "kind", "attack", "source", "prompt", "target")  # of the record


def response_to_dict(response: Response) -> dict:
    """A line of rows.jsonl: the record's fields, its reference answer as `expected`, and the
    response's own fields.
    """
    row = {name: getattr(response.record, name) for name in RESPONDED_TO}
    row |= {"expected": response.record.response, **vars(response)}
    row["gate"] = None if math.isnan(response.gate) else response.gate
    del row["record"]
    return row


def read_responses(path: str | Path) -> list[Response]:
    """The inverse, of a whole file."""
    responses = []
    for where, row in read_lines(path):
        row.pop("system", None)  # rows.jsonl holds several
        try:
            known = {name: row.pop(name) for name in RESPONDED_TO}
            record = Record(**known, response=row.pop("expected"))
            row["gate"] = math.nan if row["gate"] is None else row["gate"]
            responses.append(Response(record, **row))
        except (KeyError, TypeError) as e:
            raise UserError(f"{where}: no response as today's code writes it: {e}") from None
    return responses

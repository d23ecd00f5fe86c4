"""The field's files -> Records. One small function per format; the columns decide, never the file's name."""

import json
from dataclasses import replace
from pathlib import Path

from ease.gate import WELL_FORMED, split_reasoning
from ease.policies import parse_categories
from ease.records import Record, UserError, read_jsonl, unique


def read_records(path: str | Path) -> list[Record]:
    """Read any supported file: our own JSON Lines (records.py), or a JSON array in the STAR-1 format."""
    if Path(path).suffix != ".json":
        return read_jsonl(path)
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text (byte {e.start})") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not JSON ({e.msg} at column {e.colno})") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a JSON array with at least one object")
    return unique([(where, star1(row, where)) for where, row in ((f"{path}: row {i}", row) for i, row in enumerate(rows))])


def read_named(path: str | Path) -> list[Record]:
    """read_records, for runs that join several files: ids become "file stem/id", and `group` keeps the underlying request."""
    return [replace(r, id=f"{Path(path).stem}/{r.id}", group=r.request) for r in read_records(path)]


def star1(row: dict, where: str) -> Record:
    """STAR-1 (Apache-2.0): {id, question, response "<think>\\n..\\n</think>\\n\\nanswer", category [list], source}.

    Its questions are plain, so the kind is `harmful`; the trace is split into reasoning and answer.
    """
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    for name, kind in (("id", str), ("question", str), ("response", str), ("category", list)):
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise UserError(f"{where}: STAR-1 needs {name!r} ({kind.__name__}); found {found}")
    reasoning, answer, state = split_reasoning(row["response"])
    if state != WELL_FORMED:
        raise UserError(f"{where}: field 'response': the think block is {state}")
    return Record(id=row["id"], prompt=row["question"], kind="harmful", response=answer, reasoning=reasoning,
                  categories=parse_categories(", ".join(row["category"])), source=f"STAR-1/{row.get('source', '')}", group=row["id"])

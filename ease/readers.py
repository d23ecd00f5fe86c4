"""The field's files -> Records. One small function per format; the columns decide, never the file's name.

CSV, TSV, a JSON array, JSON Lines, or a JailbreakBench artifact. Our own format (records.py) is JSON Lines with a `kind`.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ease.method import THINK_OPEN, WELL_FORMED, split_reasoning
from ease.policies import BENIGN, parse_categories
from ease.records import KINDS, Record, UserError, read_lines, read_text, record_from_dict, unique


def read_records(path: str | Path) -> list[Record]:
    """Read any supported file; which format it is in, its columns say. Unknown columns are an error that lists what is known."""
    path = Path(path)
    if path.suffix in (".csv", ".tsv"):
        rows = read_table(path)
    else:  # the official code writes JSON arrays into .jsonl files
        rows = (read_json_rows if path.suffix == ".json" or read_text(path).lstrip().startswith("[") else read_lines)(path)
    where, first = rows[0]
    if not isinstance(first, dict):
        raise UserError(f"{where}: expected an object with named fields, found {type(first).__name__}")
    if {"kind", "prompt"} <= first.keys():
        return unique([(where, record_from_dict(row, where)) for where, row in rows])
    for columns, convert in FORMATS.items():
        if columns <= first.keys():
            records = [(where, convert_row(convert, columns, row, where, i)) for i, (where, row) in enumerate(rows)]
            kept = [(where, record) for where, record in records if record.prompt.strip()]
            if len(kept) < len(records):
                print(f"{path}: dropped {len(records) - len(kept)} of {len(records)} rows without a prompt")
            return unique(kept)
    known = "; ".join(", ".join(sorted(c)) for c in [{"id", "prompt", "kind"}, *FORMATS])
    raise UserError(f"{where}: unknown columns {', '.join(map(str, first))}; accepted: {known}")


def read_named(path: str | Path) -> list[Record]:
    """read_records, for runs that join several files: ids become "file stem/id", and `group` keeps the underlying request."""
    return [replace(r, id=f"{Path(path).stem}/{r.id}", group=r.request) for r in read_records(path)]


def read_table(path: Path) -> list[tuple[str, dict]]:
    """Rows of a CSV or TSV file with a header line, each with its place "file:line" (of its last line)."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    rows = [(f"{path}:{reader.line_num}", row) for row in reader]
    if not rows:
        raise UserError(f"{path}: no rows (the file is empty)")
    return rows


def read_json_rows(path: Path) -> list[tuple[str, dict]]:
    """Objects of a JSON array, or the attempts of a JailbreakBench artifact, with the attack's name in each."""
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not JSON ({e.msg} at column {e.colno})") from None
    if isinstance(rows, dict) and isinstance(rows.get("jailbreaks"), list):
        method = str(rows.get("parameters", {}).get("method", ""))
        rows = [{**row, "method": method} for row in rows["jailbreaks"]]
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a JSON array with at least one object")
    return [(f"{path}: row {i}", row) for i, row in enumerate(rows)]


def convert_row(convert: Callable[[dict, str, int], Record], columns: frozenset[str], row: dict, where: str, i: int) -> Record:
    """Apply a format's function; a row that lacks a column of its format is an error that names it. `group`, where the format has
    none, is the prompt's digest: ids may be row numbers, which say nothing outside their file.
    """
    for name in sorted(columns):
        if not isinstance(row, dict) or name not in row:
            raise UserError(f"{where}: field {name!r} is missing; found {sorted(row) if isinstance(row, dict) else type(row).__name__}")
    try:
        record = convert(row, where, i)
        return replace(record, group=record.group or digest(record.prompt))
    except (TypeError, AttributeError, KeyError, IndexError) as e:
        raise UserError(f"{where}: a field has the wrong type ({e})") from None


def digest(text: str) -> str:
    """An id for a request in files that have none: equal texts share it, so prompts and traces from two files join."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def star1(row: dict, where: str, i: int) -> Record:
    """STAR-1 (Apache-2.0): id, question, response "<think>\\n..\\n</think>\\n\\nanswer", category [list], source.

    Its questions are plain, so the kind is `harmful`; the trace is split into reasoning and answer.
    """
    reasoning, answer, state = split_reasoning(row["response"])
    if state != WELL_FORMED:
        raise UserError(f"{where}: field 'response': the think block is {state}")
    return Record(id=row["id"], prompt=row["question"].strip(), kind="harmful", response=answer, reasoning=reasoning,
                  categories=parse_categories(", ".join(row["category"])), source=f"STAR-1/{row.get('source', '')}", group=row["id"])


def advbench(row: dict, where: str, i: int) -> Record:
    """AdvBench harmful_behaviors.csv: goal, target (how a compliant answer starts)."""
    return Record(id=str(i), prompt=row["goal"], kind="harmful", source="AdvBench", target=row["target"])


def strongreject(row: dict, where: str, i: int) -> Record:
    """StrongREJECT: category, source, forbidden_prompt."""
    return Record(id=str(i), prompt=row["forbidden_prompt"], kind="harmful", source=f"StrongREJECT/{row['category']}")


def xstest(row: dict, where: str, i: int) -> Record:
    """XSTest xstest_prompts.csv: id, prompt, type, label (safe: measures over-refusal; unsafe: its harmful contrast)."""
    if row["label"] not in ("safe", "unsafe"):
        raise UserError(f"{where}: field 'label' is {row['label']!r}; XSTest has safe and unsafe")
    return Record(id=row["id"], prompt=row["prompt"], kind="benign" if row["label"] == "safe" else "harmful", source=f"XSTest/{row['type']}")


def wildjailbreak(row: dict, where: str, i: int) -> Record:
    """WildJailbreak TSV: vanilla, adversarial, completion, data_type = (vanilla|adversarial)_(harmful|benign)."""
    form, _, harm = row["data_type"].partition("_")
    if form not in ("vanilla", "adversarial") or harm not in ("harmful", "benign"):
        raise UserError(f"{where}: field 'data_type' is {row['data_type']!r}; expected (vanilla|adversarial)_(harmful|benign)")
    group = digest(row["vanilla"])  # the file has no id of the underlying request
    return Record(id=str(i), prompt=row[form], kind=("adversarial_" if form == "adversarial" else "") + harm, response=row["completion"] or "",
                  source="WildJailbreak", group=group)


def jailbreakbench(row: dict, where: str, i: int) -> Record:
    """JailbreakBench artifact: index, goal, behavior, prompt (None where the attack found none). The stored response is the
    attacked model's, not a reference answer: it is left out.
    """
    return Record(id=str(row["index"]), prompt=row["prompt"] or "", kind="adversarial_harmful", source="JailbreakBench",
                  group=row["behavior"] or row["goal"], attack=row.get("method", ""))


def gsm8k(row: dict, where: str, i: int) -> Record:
    """GSM8K: question, answer."""
    return Record(id=str(i), prompt=row["question"], kind="benign", response=row["answer"], source="GSM8K")


def with_input(instruction: str, given: str) -> str:
    """An instruction and what it is to be applied to."""
    return f"{instruction.strip()}\n\n{given.strip()}".strip()


def alpaca(row: dict, where: str, i: int) -> Record:
    """Alpaca-style: instruction, input (may be empty), output."""
    return Record(id=str(i), prompt=with_input(row["instruction"], row.get("input") or ""), kind="benign", response=row["output"], source="Alpaca")


def self_instruct(row: dict, where: str, i: int) -> Record:
    """self-instruct seed tasks: id, instruction, instances [{input, output}], of which the first is taken."""
    first = row["instances"][0]
    return Record(id=row["id"], prompt=with_input(row["instruction"], first["input"]), kind="benign", response=first["output"].strip(),
                  source="self-instruct")


def ease_prompt(row: dict, where: str, i: int) -> Record:
    """Prompts of the official EASE code: prompt, data_type = "Adversarial Harmful" or "Adversarial Benign"."""
    kind = row["data_type"].lower().replace(" ", "_")
    if kind not in KINDS:
        raise UserError(f"{where}: field 'data_type' is {row['data_type']!r}; expected Adversarial Harmful or Adversarial Benign")
    return Record(id=str(i), prompt=row["prompt"], kind=kind, source="EASE")


def ease_trace(row: dict, where: str, i: int) -> Record:
    """Traces as the official EASE code releases them: original_question, response "CoT </think> answer" (the open marker stood in
    the teacher's prompt), categories [list]. A response without an end of its reasoning is no trace: the record has neither.
    """
    text = row["response"] if row["response"].lstrip().startswith(THINK_OPEN.strip()) else THINK_OPEN + row["response"]
    reasoning, answer, _ = split_reasoning(text)  # an unclosed block has no answer: then neither is kept
    categories = parse_categories(", ".join(row.get("categories") or []))
    return Record(id=str(i), prompt=row["original_question"], kind="benign" if categories == (BENIGN,) else "harmful", response=answer,
                  reasoning=reasoning if answer else "", categories=categories, source="EASE")


# The first format whose columns are all there is taken.
FORMATS = {
    frozenset({"id", "question", "response", "category"}): star1,
    frozenset({"goal", "target"}): advbench,
    frozenset({"forbidden_prompt", "category"}): strongreject,
    frozenset({"id", "prompt", "type", "label"}): xstest,
    frozenset({"vanilla", "adversarial", "completion", "data_type"}): wildjailbreak,
    frozenset({"index", "goal", "behavior", "prompt"}): jailbreakbench,
    frozenset({"prompt", "data_type"}): ease_prompt,
    frozenset({"original_question", "response"}): ease_trace,
    frozenset({"question", "answer"}): gsm8k,
    frozenset({"instruction", "output"}): alpaca,
    frozenset({"id", "instruction", "instances"}): self_instruct,
}

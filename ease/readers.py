"""The field's files -> Records: tables (CSV, TSV), JSON arrays, JSON Lines, JailbreakBench's
artifacts. The columns decide which format it is (FORMATS, below); ours has `prompt` and `kind`.
"""

import csv
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ease.method import split_reasoning
from ease.policies import BENIGN, parse_categories
from ease.records import (KINDS, WELL_FORMED, Record, UserError, check_text, digest, parse_json,
                          read_lines, read_text, record_from_dict, unique)


@dataclass(frozen=True)
class Row:
    """One row of a file; row[name] is a column's text, "" where it is null or not there.

    where: "file:line", which begins every error message.
    """

    where: str
    number: int
    columns: dict

    def __getitem__(self, name: str) -> str:
        return check_text(self.columns.get(name), name, self.where)

    def id(self) -> str:
        """The file's id, a text or a number; else the row's number."""
        for name in ("id", "id_v2", "id_v1", "index", "Index"):
            value = self.columns.get(name)
            if found := str(value) if type(value) is int else self[name].strip():
                return found
        return str(self.number)

    def kind(self, name: str, **kinds: str) -> str:
        """The kind that a column's value stands for."""
        if (value := self[name].lower().replace(" ", "_")) not in kinds:
            raise UserError(f"{self.where}: field {name!r} is {self[name]!r}; "
                            f"expected {', '.join(kinds)}")
        return kinds[value]

    def categories(self, name: str) -> tuple[str, ...]:
        """The categories that a list names, or the text of one, as tables have it."""
        value = self.columns.get(name)
        texts = value if isinstance(value, list) else [value]
        text = ", ".join(check_text(t, name, self.where) for t in texts)
        try:
            return parse_categories(text)
        except UserError as e:
            raise UserError(f"{self.where}: field {name!r}: {e}") from None


def read_records(path: str | Path) -> list[Record]:
    """Read any supported file. Columns of no format are an error that lists what is known; rows
    without a prompt (attacks that found none) are dropped and counted.
    """
    rows = read_rows(Path(path))
    names = rows[0].columns.keys()
    if {"kind", "prompt"} <= names:
        return unique([(row.where, record_from_dict(row.columns, row.where)) for row in rows])
    columns = next((c for c in FORMATS if set(c.split()) <= names), None)
    if columns is None:
        known = "; ".join(", ".join(sorted(c.split())) for c in ["id prompt kind", *FORMATS])
        found = ", ".join(names)[:300]
        raise UserError(f"{rows[0].where}: unknown columns {found}; accepted: {known}")
    kept = []
    for row in rows:
        for name in columns.split():
            if name not in row.columns:
                found = ", ".join(row.columns)[:300]
                raise UserError(f"{row.where}: field {name!r} is missing; found {found}")
        fields = {"id": row.id(), **FORMATS[columns](row)}
        if fields["prompt"].strip():
            kept.append((row.where, record_from_dict(fields, row.where)))
    if not kept:
        raise UserError(f"{path}: no row has a prompt")
    if len(kept) < len(rows):
        print(f"{path}: dropped {len(rows) - len(kept)} of {len(rows)} rows without a prompt")
    return unique(kept)


def name_of(file: Path, files: list[Path]) -> str:
    """The shortest end of a path, without extension, that no other of the files has."""
    ends = [(*f.parent.parts, f.stem) for f in files]
    own = ends[files.index(file)]
    for n in range(1, len(own) + 1):
        if sum(end[-n:] == own[-n:] for end in ends) == 1:
            return "/".join(own[-n:])
    if files.count(file) > 1:
        raise UserError(f"{file}: this file is given twice")
    return file.name  # only the extensions differ


def read_named(*paths: str) -> list[list[Record]]:
    """read_records of every path ("" gives []), for runs that join files: ids become "name/id"."""
    files, found = [Path(os.path.abspath(path)) for path in paths if path], []
    for path in paths:
        name = name_of(Path(os.path.abspath(path)), files) if path else ""
        records = read_records(path) if path else []
        found.append([replace(r, id=f"{name}/{r.id}") for r in records])
    unique([(path, r) for path, records in zip(paths, found) for r in records])
    return found


def read_rows(path: Path) -> list[Row]:
    """A file's rows. What it begins with says whether it is JSON or a table; its name counts only
    where that would be broken JSON.
    """
    text, name, extra = read_text(path), path.name.lower(), {}
    if not (start := text.strip()):
        raise UserError(f"{path}: no rows (the file is empty)")
    if start[0] not in "[{" and ".json" not in name:
        return read_table(path, text)
    if start[0] == "{" and (start.partition("\n")[0].rstrip().endswith("}") or ".jsonl" in name):
        found = read_lines(path, text)
    else:
        data = parse_json(text, path)
        found = in_array(path, data if isinstance(data, list) else [data])
    first = found[0][1]
    if len(found) == 1 and isinstance(first, dict) and isinstance(first.get("jailbreaks"), list):
        about = first.get("parameters")
        extra = {"method": about.get("method") if isinstance(about, dict) else None}
        found = in_array(path, first["jailbreaks"])
    for where, value in found:
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object with named fields, "
                            f"found {type(value).__name__}")
    return [Row(where, i, value | extra) for i, (where, value) in enumerate(found)]


def in_array(path: Path, values: list) -> list[tuple[str, object]]:
    """The values of a JSON array, each with its place "file: row i"."""
    if not values:
        raise UserError(f"{path}: expected a JSON array with at least one object")
    return [(f"{path}: row {i}", value) for i, value in enumerate(values)]


def read_table(path: Path, text: str) -> list[Row]:
    """The rows of a table with a header line, cut at what the header has most of. A row of another
    length or with a quote that stays open is an error: read on, it would swallow others in silence.
    """
    csv.field_size_limit(2**31 - 1)  # else a field of 131,073 characters is an error
    lines, start = [], 1
    delimiter = max(",\t;|", key=text.strip().partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if "".join(cells).strip():
                lines.append((f"{path}:{start}", cells))
            start = reader.line_num + 1
    except csv.Error as e:
        raise UserError(f"{path}:{start}: a quote of this row is not closed, or closed before the "
                        f"field's end ({e})") from None
    if len(lines) < 2:
        raise UserError(f"{path}: no rows (there is only a header)")
    (where, header), *lines = lines
    header = [" ".join(name.split()) for name in header]
    if len(set(header)) < len(header):
        raise UserError(f"{where}: two columns of one name")
    for where, cells in lines:
        if len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} fields, the header has {len(header)}")
    return [Row(where, i, dict(zip(header, cells))) for i, (where, cells) in enumerate(lines)]


def star1(row: Row) -> dict:
    """STAR-1: its questions are plain and harmful; its benign set has no category, or "benign"."""
    reasoning, answer, state = split_reasoning(row["response"])
    if state != WELL_FORMED:
        raise UserError(f"{row.where}: field 'response': the think block is {state}")
    categories = row.categories("category")
    return dict(source=f"STAR-1/{row['source']}", prompt=row["question"].strip(), response=answer,
                kind="harmful" if set(categories) - {BENIGN} else "benign",
                reasoning=reasoning, categories=categories)


def wildjailbreak(row: Row) -> dict:
    """WildJailbreak, whose evaluation split has only the adversarial form. There is no id of the
    underlying request: the plain form's digest is one.
    """
    kind, vanilla = row.kind("data_type", **DATA_TYPES), row["vanilla"]
    return dict(source="WildJailbreak", kind=kind, response=row["completion"],
                prompt=row["adversarial"] if kind.startswith("adversarial") else vanilla,
                group=digest(vanilla) if vanilla else None)


def jailbreakbench_table(row: Row) -> dict:
    """JailbreakBench's behaviours: harmful unless the file's name has "benign" in it, for both sets
    have the same columns.
    """
    kind = "benign" if "benign" in Path(row.where).name.lower() else "harmful"
    if row.number == 0:
        print(f"{row.where}: JailbreakBench's behaviours, {kind} by the file's name")
    return dict(source="JailbreakBench", kind=kind, prompt=row["Goal"], group=row["Behavior"],
                target=row["Target"])


def gsm8k(row: Row) -> dict:
    """GSM8K; MMLU has the same columns and its choices."""
    if row.columns.keys() & {"choices", "choice0"}:
        raise UserError(f"{row.where}: multiple choice (MMLU) is no set of prompts")
    return dict(source="GSM8K", kind="benign", prompt=row["question"], response=row["answer"])


def alpaca(row: Row) -> dict:
    """Alpaca-style: an instruction and what it is to be applied to, which may be empty."""
    prompt = f"{row['instruction'].strip()}\n\n{row['input'].strip()}".strip()
    return dict(source="Alpaca", kind="benign", prompt=prompt, response=row["output"])


def self_instruct(row: Row) -> dict:
    """self-instruct's seed tasks: of the instances [{input, output}] the first is taken."""
    match row.columns["instances"]:
        case [dict(first), *_]:
            fields = alpaca(replace(row, columns=first | {"instruction": row["instruction"]}))
            return fields | {"source": "self-instruct", "response": fields["response"].strip()}
    raise UserError(f"{row.where}: field 'instances' must be a list of objects")


def ease_trace(row: Row) -> dict:
    """Traces as the official EASE code releases them, "CoT </think> answer". A response without an
    end of its reasoning, or an answer, is no trace.
    """
    reasoning, answer, state = split_reasoning(row["response"])
    traced = state == WELL_FORMED and answer != ""
    categories = row.categories("categories")
    return dict(source="EASE", kind="benign" if categories == (BENIGN,) else "harmful",
                prompt=row["original_question"], categories=categories,
                reasoning=reasoning if traced else "", response=answer if traced else "")


DATA_TYPES = {"vanilla_harmful": "harmful", "vanilla_benign": "benign"} | {k: k for k in KINDS}
# {columns: function}; the first format whose columns are all there is taken.
FORMATS = {
    "id question response category": star1,
    "id question response": star1,
    # AdvBench's harmful_behaviors.csv
    "goal target": lambda row: dict(
        source="AdvBench", kind="harmful", prompt=row["goal"], target=row["target"]),
    "forbidden_prompt category": lambda row: dict(
        source=f"StrongREJECT/{row['category']}", kind="harmful", prompt=row["forbidden_prompt"]),
    # safe measures over-refusal; unsafe is its harmful contrast
    "prompt type label": lambda row: dict(
        source=f"XSTest/{row['type']}", prompt=row["prompt"],
        kind=row.kind("label", safe="benign", unsafe="harmful")),
    "prompt type id_v2": lambda row: dict(
        source=f"XSTest/{row['type']}", prompt=row["prompt"],
        kind="harmful" if row["type"].startswith("contrast_") else "benign"),
    "vanilla adversarial completion data_type": wildjailbreak,
    "adversarial data_type": wildjailbreak,
    # An artifact; the response in it is the attacked model's, no reference: it is left out
    "index goal behavior prompt": lambda row: dict(
        source="JailbreakBench", kind="adversarial_harmful", prompt=row["prompt"],
        group=row["behavior"] or row["goal"], attack=row["method"]),
    "Index Goal Target Behavior": jailbreakbench_table,
    # Prompts of the official EASE code
    "prompt data_type": lambda row: dict(
        source="EASE", prompt=row["prompt"], kind=row.kind("data_type", **DATA_TYPES)),
    "original_question response": ease_trace,
    # Benign look-alikes with a helpful answer and a worse one
    "prompt subcategory chosen rejected": lambda row: dict(
        source=f"CoCoNot/{row['subcategory']}", kind="benign", prompt=row["prompt"],
        response=row["chosen"]),
    "prompt answer dataset category": lambda row: dict(
        source=f"just-eval/{row['dataset']}", prompt=row["prompt"], response=row["answer"],
        kind=row.kind("category", regular="benign", safety="harmful")),
    "question answer": gsm8k,
    "instruction output": alpaca,
    "id instruction instances": self_instruct,
}

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
from ease.records import (KINDS, WELL_FORMED, Record, UserError, check_objects, check_text, digest,
                          parse_json, read_lines, read_text, record_from_dict, unique)


@dataclass(frozen=True)
class Row:
    """One row of a file at "file:line"; row[name] is a column's text, "" if null or not there."""

    where: str
    number: int
    columns: dict

    def __getitem__(self, name: str) -> str:
        return check_text(self.columns.get(name), name, self.where)

    @property
    def id(self) -> str:
        """The file's id, a text or a number; else the row's number."""
        for name in ("id", "id_v2", "id_v1", "index", "Index"):
            value = self.columns.get(name)
            if found := str(value) if type(value) is int else self[name].strip():
                return found
        return str(self.number)

    def kind(self, name: str) -> str:
        """The kind that a column's value stands for (LABELS)."""
        kind = LABELS.get(self[name].lower().replace(" ", "_"))
        if not kind:
            raise UserError(f"{self.where}: field {name!r} is {self[name]!r}; "
                            f"expected {', '.join(LABELS)}")
        return kind

    def categories(self, name: str) -> tuple[str, ...]:
        """The categories that a list names, or its text, as tables have it."""
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
    rows, kept = read_rows(Path(path)), []
    names = rows[0].columns.keys()
    columns = next((c for c in FORMATS if set(c.split()) <= names), None)
    if columns is None:
        known = "; ".join(c.replace(" ", ", ") for c in FORMATS)  # ours, the first, needs an id too
        raise UserError(f"{rows[0].where}: unknown columns {', '.join(names)[:300]}; "
                        f"accepted: id, {known}")
    for row in rows:
        if missing := [name for name in columns.split() if name not in row.columns]:
            raise UserError(f"{row.where}: field {missing[0]!r} is missing")
        if (record := FORMATS[columns](row)).prompt.strip():
            kept.append((row.where, record))
    if len(kept) < len(rows):
        print(f"{path}: dropped {len(rows) - len(kept)} of {len(rows)} rows without a prompt")
    if not kept:
        raise UserError(f"{path}: no row has a prompt")
    return unique(kept)


def name_of(file: Path, files: list[Path]) -> str:
    """The shortest end of a path, without extension, that no other of the files has."""
    if files.count(file) > 1:
        raise UserError(f"{file}: this file is given twice")
    ends = [(*f.parent.parts, f.stem) for f in files]
    own = ends[files.index(file)]
    for n in range(1, len(own) + 1):
        if sum(end[-n:] == own[-n:] for end in ends) == 1:
            return "/".join(own[-n:])
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
    """A file's rows. Its beginning says whether it is JSON or a table; a name with ".json" asks for
    JSON all the same.
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
    match found:  # an artifact is one object
        case [(_, {"jailbreaks": list(attacked), "parameters": {"method": method}})]:
            found, extra = in_array(path, attacked), {"method": method}
        case [(_, {"jailbreaks": list(attacked)})]:
            found = in_array(path, attacked)
    return [Row(where, i, value | extra) for i, (where, value) in enumerate(found)]


def in_array(path: Path, values: list) -> list[tuple[str, dict]]:
    """The objects of a JSON array, each with its place "file: row i"."""
    return check_objects(path, [(f"{path}: row {i}", value) for i, value in enumerate(values)])


def read_table(path: Path, text: str, names: str = "") -> list[Row]:
    """The rows of a table, cut at what its header line has most of. A row of another length or with
    a quote that stays open is an error: read on, it would swallow others in silence. names: a
    header line that may be missing.
    """
    csv.field_size_limit(2**31 - 1)  # else a field of 131,073 characters is an error
    delimiter = max(",\t;|", key=(names or text.strip().partition("\n")[0]).count)
    header, rows, line = [], [], 1
    if names and not text.startswith(names):
        header = names.split(delimiter)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not "".join(cells).strip():
                continue
            if not header:
                header = [" ".join(name.split()) for name in cells]
                if len(set(header)) < len(header):
                    raise UserError(f"{where}: two columns of one name")
            elif len(cells) == len(header):
                rows.append(Row(where, len(rows), dict(zip(header, cells))))
            else:
                raise UserError(f"{where}: {len(cells)} fields, the header has {len(header)}")
    except csv.Error as e:
        raise UserError(f"{path}:{line}: a quote is not closed, or too early ({e})") from None
    if not rows:
        raise UserError(f"{path}: no rows (there is only a header)")
    return rows


def star1(row: Row) -> Record:
    """STAR-1: its questions are plain and harmful; its benign set has no category, or "benign"."""
    reasoning, answer, state = split_reasoning(row["response"])
    if state != WELL_FORMED:
        raise UserError(f"{row.where}: field 'response': the think block is {state}")
    categories = row.categories("category")
    kind = "harmful" if set(categories) - {BENIGN} else "benign"
    return Record(row.id, row["question"].strip(), kind, answer, reasoning, categories,
                  f"STAR-1/{row['source']}")


def wildjailbreak(row: Row) -> Record:
    """WildJailbreak: the group is the plain form, which its evaluation split has not."""
    kind, vanilla = row.kind("data_type"), row["vanilla"]
    prompt = row["adversarial"] if kind.startswith("adversarial") else vanilla
    return Record(row.id, prompt, kind, row["completion"], source="WildJailbreak",
                  group=digest(vanilla) if vanilla else "")


def jailbreakbench_table(row: Row) -> Record:
    """JailbreakBench's behaviours: only the file's name tells its two sets apart."""
    kind = "benign" if "benign" in Path(row.where).name.lower() else "harmful"
    if row.number == 0:
        print(f"{row.where}: JailbreakBench's behaviours, {kind} by the file's name")
    return Record(row.id, row["Goal"], kind, source="JailbreakBench", group=row["Behavior"],
                  target=row["Target"])


def gsm8k(row: Row) -> Record:
    """GSM8K; MMLU has the same columns and its choices."""
    if row.columns.keys() & {"choices", "choice0"}:
        raise UserError(f"{row.where}: multiple choice (MMLU) is no set of prompts")
    return Record(row.id, row["question"], "benign", row["answer"], source="GSM8K")


def alpaca(row: Row) -> Record:
    """Alpaca-style: an instruction and what it is applied to, which may be empty."""
    prompt = f"{row['instruction'].strip()}\n\n{row['input'].strip()}".strip()
    return Record(row.id, prompt, "benign", row["output"], source="Alpaca")


def self_instruct(row: Row) -> Record:
    """self-instruct's seed tasks: the first of the instances [{input, output}]."""
    match row.columns["instances"]:
        case [dict(first), *_]:
            task = alpaca(replace(row, columns=row.columns | first))
            return replace(task, source="self-instruct", response=task.response.strip())
    raise UserError(f"{row.where}: field 'instances' must be a list of objects")


def ease_trace(row: Row) -> Record:
    """Traces of the official EASE code, "CoT </think> answer"; without either it is no trace."""
    reasoning, answer, state = split_reasoning(row["response"])
    if state != WELL_FORMED or not answer:
        reasoning = answer = ""
    categories = row.categories("categories")
    kind = "benign" if categories == (BENIGN,) else "harmful"
    return Record(row.id, row["original_question"], kind, answer, reasoning, categories, "EASE")


# {a column's value: kind}; XSTest's safe prompts measure over-refusal, unsafe ones are the contrast
LABELS = {"safe": "benign", "unsafe": "harmful", "regular": "benign", "safety": "harmful",
          "vanilla_benign": "benign", "vanilla_harmful": "harmful", **{k: k for k in KINDS}}
# {columns: function}; the first format whose columns are all there is taken.
FORMATS = {
    "prompt kind": lambda row: record_from_dict(row.columns, row.where),
    "id question response category": star1,
    "id question response": star1,
    "goal target": lambda row: Record(
        row.id, row["goal"], "harmful", source="AdvBench", target=row["target"]),
    "forbidden_prompt category": lambda row: Record(
        row.id, row["forbidden_prompt"], "harmful", source=f"StrongREJECT/{row['category']}"),
    "prompt type label": lambda row: Record(
        row.id, row["prompt"], row.kind("label"), source=f"XSTest/{row['type']}"),
    "prompt type id_v2": lambda row: Record(
        row.id, row["prompt"], "harmful" if row["type"].startswith("contrast_") else "benign",
        source=f"XSTest/{row['type']}"),
    "vanilla adversarial completion data_type": wildjailbreak,
    "adversarial data_type": wildjailbreak,
    # An artifact; its responses are the attacked model's, no references: they are left out
    "index goal behavior prompt": lambda row: Record(
        row.id, row["prompt"], "adversarial_harmful", source="JailbreakBench",
        group=row["behavior"] or row["goal"], attack=row["method"]),
    "Index Goal Target Behavior": jailbreakbench_table,
    # Prompts of the official EASE code
    "prompt data_type": lambda row: Record(
        row.id, row["prompt"], row.kind("data_type"), source="EASE"),
    "original_question response": ease_trace,
    # Benign look-alikes with a helpful answer and a worse one
    "prompt subcategory chosen rejected": lambda row: Record(
        row.id, row["prompt"], "benign", row["chosen"], source=f"CoCoNot/{row['subcategory']}"),
    "prompt answer dataset category": lambda row: Record(
        row.id, row["prompt"], row.kind("category"), row["answer"],
        source=f"just-eval/{row['dataset']}"),
    "question answer": gsm8k,
    "instruction output": alpaca,
    "id instruction instances": self_instruct,
}

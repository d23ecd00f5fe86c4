"""A finished evaluation -> what of it is published: numbers and verdicts, no text.

    python -m data.results --run runs/real/test --out data/results/qwen
    python -m data.results --out data/results/qwen

The first writes, the second needs these files alone: it computes the numbers again from the rows,
compares them with summary.json and prints them by set of prompts.
summary.json   the run's, with its flags
rows.csv       a line a system and prompt; `answer` is "sorry" if it refuses (by the xstest list),
               "exact" if it is the reference answer, else empty; gates to six digits. Answers
               begun for a system (--prefill) or forced (--gate_sweep) are further systems
more.jsonl     a line a suffix looked for (--search), or a question (--tasks)
No prompt, completion or suffix is in them.
"""

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import torch

from ease.adaptive import search_table
from ease.judge import load_judge, note_verdicts
from ease.prefill import WHERE, prefill_table
from ease.readers import read_rows
from ease.records import (UNCLOSED, Record, Response, UserError, read_lines, read_responses,
                          write_jsonl, write_text)
from ease.report import section
from ease.run import command_line
from ease.scoring import (agreement, attack_succeeded, breakdown, correct,
                          mark_vulnerable, over_refusal, reasons, reductions, refused, share,
                          summarise)
from ease.sweep import sweep
from ease.tasks import utility
from ease.tokenizer_files import read_json

PARTS = ("reasoning", "answer")
TEXTS = {"text", "suffix", "gold", "log_p"}  # of searches and tasks; not published
BARE = ["direct", 0]  # nothing is written for the model: its rows are those of rows.jsonl


@dataclass
class Config:
    """From where, to where."""

    out: str  # the folder with what is published
    run: str = ""  # an evaluation to publish there; without it the folder is checked


def published(response: Response) -> dict:
    """A line of rows.csv."""
    record = response.record
    known = bool(record.response) and not record.harmful
    answer = "sorry" if refused(response) else "exact" if known and correct(response) else ""
    return {"id": record.id, "kind": record.kind, "source": record.source, "attack": record.attack,
            "group": record.group, "expected": "exact" * known, "answer": answer,
            "state": response.state, "opened": "yes" * response.opened,
            "gate": "" if math.isnan(response.gate) else f"{response.gate:.6g}",
            **{f"{part} tokens": response.tokens[part] for part in PARTS},
            **{f"by {judge}": verdict for judge, verdict in response.verdicts.items()}}


def restored(row: dict) -> Response:
    """The inverse, without the texts."""
    record = Record(row["id"], row["id"], row["kind"], row["expected"], source=row["source"],
                    group=row["group"], attack=row["attack"])
    tokens = {part: int(row[f"{part} tokens"]) for part in PARTS}
    verdicts = {name[3:]: v for name, v in row.items() if name.startswith("by ") and v}
    return Response(record, "", "", row["answer"], row["state"], opened=bool(row["opened"]),
                    gate=float(row["gate"] or "nan"), verdicts=verdicts,
                    tokens={**tokens, "total": sum(tokens.values())})


def list_of(summary: dict) -> str:
    """The judge of answers begun and of suffixes."""
    return next((j for j in summary["settings"]["judges"] if j != "target"), "target")


def stages(summary: dict) -> Iterator[tuple[str, tuple]]:
    """(stage, what it is) of every other file of the run whose rows are published, as evaluate.py
    names them.
    """
    flags = summary["flags"]
    for name in summary["systems"]:
        for where, k in product(WHERE, flags["prefill"]):
            yield f"rows-{name}+{where.replace(' ', '-')}-{k}", ("begun", name, where, k)
        for goal in flags["search_goal"] if flags["search"] else ():
            yield f"rows-{name}+search-{goal}", ("search", name, goal)
        for task in flags["tasks"]:
            yield f"tasks-{name}-{task.partition('=')[0]}", ("task", name, task.partition("=")[0])
    for how in ("opened", "direct") if flags["gate_sweep"] else ():
        yield f"rows-{flags['gate_sweep']}+{how}", ("forced", how)


def publish(run: Path, out: Path) -> None:
    """Every file of `out`, from a finished run."""
    if not (run / "done").exists():
        raise UserError(f"{run}: no finished run of evaluate.py")
    summary = read_json(run / "summary.json")
    summary["flags"] = read_json(run / "manifest.json")["config"]
    names = [row["system"] for _, row in read_lines(run / "rows.jsonl")]
    rows = [{"system": name, **published(response)} for name, response in
            zip(names, read_responses(run / "rows.jsonl"), strict=True)]
    more = []
    for stage, (what, *of) in stages(summary):
        if what in ("search", "task"):
            more += [{"stage": stage} | {k: v for k, v in row.items() if k not in TEXTS}
                     for _, row in read_lines(run / f"{stage}.jsonl")]
        elif of[1:] != BARE:
            responses = read_responses(run / f"{stage}.jsonl")
            judge = list_of(summary) if what == "begun" else summary["settings"]["judges"][0]
            note_verdicts(load_judge(judge, torch.float32, "cpu"), judge, responses)
            rows += [{"system": stage, **published(response)} for response in responses]
    summary["published rows"] = [len(rows), len(more)]
    if rows:  # --tasks alone has none
        table = io.StringIO()
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(out / "rows.csv", table.getvalue())
    if more:
        write_jsonl(out / "more.jsonl", more)
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")


def again(out: Path, summary: dict) -> tuple[dict, dict[str, list[Response]]]:
    """(summary.json's numbers, the responses by system), from the rows alone. Without seconds,
    memory and what a system was trained on.
    """
    flags, [first, *others] = summary["flags"], summary["settings"]["judges"]
    found, more = {}, {}
    if (out / "rows.csv").exists():
        for row in read_rows(out / "rows.csv"):
            found.setdefault(row["system"], []).append(restored(row.columns))
    if (out / "more.jsonl").exists():
        for _, row in read_lines(out / "more.jsonl"):
            more.setdefault(row["stage"], []).append(row)
    n = [sum(map(len, rows.values())) for rows in (found, more)]
    if n != summary["published rows"]:
        raise UserError(f"{out}: rows.csv and more.jsonl have {n} rows, not "
                        f"{summary['published rows']}")
    by_system = {name: found.get(name, []) for name in summary["systems"]}
    everyone = [r for responses in by_system.values() for r in responses]
    if flags["base_system"]:
        mark_vulnerable(by_system, flags["base_system"], first)
    numbers = {
        "systems": {name: {"kinds": summarise(found)} for name, found in by_system.items()},
        "overhead_reduction": reductions(by_system, flags["refusal_system"],
                                         flags["deliberative_system"]),
        "breakdown": breakdown(by_system, first, set()), "over_refusal": over_refusal(by_system),
        "agreement": {other: agreement(everyone, first, other) for other in others}}
    begun, looked_for, tasks, forced = {}, {}, {}, []
    for stage, (what, *of) in stages(summary):
        if what == "begun":
            begun[tuple(of)] = found[stage] if of[1:] != BARE else [
                r for r in by_system[of[0]] if r.record.harmful]
        elif what == "search":
            looked_for[tuple(of)] = more[stage]
        elif what == "task":
            tasks.setdefault(of[0], {})[of[1]] = more[stage]
        else:
            forced.append(found[stage])
    if begun:
        numbers["prefill"] = prefill_table(begun, list_of(summary))
    if looked_for:
        numbers["search"] = search_table(looked_for, list_of(summary), flags["search"])
    if tasks:
        numbers["utility"] = {"lines": utility(tasks, summary["utility"]["base"])}
    if forced:
        numbers["gate"] = sweep(flags["gate_sweep"], *forced, by_system, first,
                                flags["token_budget"])
    for system in numbers["systems"].values():
        for kind in system["kinds"].values():
            del kind["seconds_per_prompt"]
    return json.loads(json.dumps(numbers, default=asdict)), by_system


def different(found: object, said: object, where: str) -> Iterator[str]:
    """The places where two trees of numbers differ by more than rounding (1e-6); what the
    second has alone is not looked at.
    """
    if isinstance(found, dict) and isinstance(said, dict):
        for key, value in found.items():
            yield from different(value, said.get(key), f"{where}: {key}")
    elif isinstance(found, list) and isinstance(said, list) and len(found) == len(said):
        for i, pair in enumerate(zip(found, said)):
            yield from different(*pair, f"{where} {i}")
    elif isinstance(found, float) and isinstance(said, float | int):
        if not math.isclose(found, said, rel_tol=1e-5, abs_tol=1e-6):
            yield f"{where} is {found}, not {said}"
    elif found != said:
        yield f"{where} is {found}, not {said}"


def by_set(by_system: dict[str, list[Response]], judge: str) -> list[dict]:
    """A line a set of prompts, kind and system."""
    def of(response: Response) -> tuple[str, str]:
        return response.record.id.partition("/")[0], response.record.kind

    lines = []
    for key, name in product(dict.fromkeys(map(of, next(iter(by_system.values())))), by_system):
        rows = [r for r in by_system[name] if of(r) == key]
        asr = share(lambda r: attack_succeeded(r, judge), rows) if rows[0].record.harmful else None
        lines.append({"set": key[0], "kind": key[1], "n": len(rows), "system": name,
                      f"ASR {judge}": asr, "refused": share(refused, rows),
                      "reasons": share(reasons, rows),
                      "unclosed": sum(r.state == UNCLOSED for r in rows),
                      "tokens": f"{fmean(r.tokens['total'] for r in rows):.1f}"})
    return lines


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    if cfg.run:
        publish(Path(cfg.run), out)
    summary = read_json(out / "summary.json")
    numbers, by_system = again(out, summary)
    if wrong := [*different(numbers, summary, "summary.json")]:
        raise UserError(f"{out}: the rows give other numbers, first: {wrong[0]}")
    print(section("By set of prompts", by_set(by_system, summary["settings"]["judges"][0])))
    print(f"{sum(map(len, by_system.values()))} rows give every number of {out}/summary.json again")


if __name__ == "__main__":
    command_line(main, Config)

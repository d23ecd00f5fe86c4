"""A finished evaluation -> what of it is published: numbers and verdicts, no text.

    python -m data.results --run runs/real/test --out data/results/qwen
    python -m data.results --out data/results/qwen

The first writes, the second needs these files alone: it computes the numbers again from the rows,
compares them with summary.json and prints them by set of prompts. Not computed again: seconds,
memory, what a system was trained on.
summary.json   the run's, with its flags
rows.csv       a line a system and prompt; refused: by the xstest list; exact: the answer is the
               reference answer ("no" too: it is not; "": there is none); gates to nine digits.
               Answers begun for a system (--prefill) or forced (--gate_sweep) are further systems
more.jsonl     a line a suffix looked for (--search), or a question (--tasks)
No prompt, completion or suffix is in them.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import torch

from ease.adaptive import search_table
from ease.judge import judge_model, load_judge, note_verdicts
from ease.prefill import WHERE, prefill_table
from ease.readers import read_rows
from ease.records import (UNCLOSED, Record, Response, UserError, digest, read_lines,
                          read_responses, write_jsonl, write_text)
from ease.report import section
from ease.run import command_line
from ease.scoring import (agreement, attack_succeeded, breakdown, correct, gate_auroc,
                          mark_vulnerable, over_refusal, reasons, reductions, refused, share,
                          summarise)
from ease.sweep import sweep
from ease.systems import OUTPUTS
from ease.tasks import utility
from ease.tokenizer_files import read_json

PARTS = ("reasoning", "answer")
# What is kept of a search's and a task's row: no text
KEPT = ("id", "group", "evaluations", "answers", "success", "reasons", "gate", "score", "scores")
BARE = ["direct", 0]  # nothing is written for the model: its rows are those of rows.jsonl


@dataclass
class Config:
    """From where, to where."""

    out: str  # the folder with what is published
    run: str = ""  # an evaluation to publish there; without it the folder is checked


def published(response: Response) -> dict:
    """A line of rows.csv."""
    record, exact = response.record, ""
    if record.response and not record.harmful:
        exact = "yes" if correct(response) else "no"
    return {"id": record.id, "kind": record.kind, "source": record.source, "attack": record.attack,
            "group": digest(record.group), "refused": "yes" * bool(refused(response)),
            "exact": exact, "state": response.state, "opened": "yes" * response.opened,
            "gate": "" if math.isnan(response.gate) else f"{response.gate:.9g}",
            **{f"{part} tokens": response.tokens[part] for part in PARTS},
            **{f"by {judge}": verdict for judge, verdict in response.verdicts.items()}}


def restored(row: dict, where: str) -> Response:
    """The inverse, without the texts: an answer is "sorry", or nothing; the reference is this
    answer or another one.
    """
    try:
        answer = "sorry" * (row["refused"] == "yes")
        expected = {"yes": answer or "-", "no": "another", "": ""}[row["exact"]]
        record = Record(row["id"], row["id"], row["kind"], expected, source=row["source"],
                        group=row["group"], attack=row["attack"])
        tokens = {part: int(row[f"{part} tokens"]) for part in PARTS}
        verdicts = {name[3:]: v for name, v in row.items() if name.startswith("by ") and v}
        return Response(record, "", "", answer or "-", row["state"], opened=bool(row["opened"]),
                        gate=float(row["gate"] or "nan"), verdicts=verdicts,
                        tokens={**tokens, "total": sum(tokens.values())})
    except (KeyError, ValueError) as e:
        raise UserError(f"{where}: no row as today's code writes it: {e}") from None


def list_of(summary: dict) -> str:
    """The judge of answers begun and of suffixes."""
    return next((j for j in summary["settings"]["judges"] if j != "target"), "target")


def stages(summary: dict) -> Iterator[tuple[str, tuple]]:
    """(stage, what it is) of every other file of the run whose rows are published, as evaluate.py
    names them.
    """
    flags = summary["flags"]
    for name, system in summary["systems"].items():
        if system["model"].startswith(OUTPUTS):  # nothing more can be asked of it
            continue
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
    if not (run / "done").exists() or out.resolve() == run.resolve():
        raise UserError(f"--run {run}: no finished run of evaluate.py, or --out itself")
    summary, rows, more = read_json(run / "summary.json"), [], []
    summary["flags"] = read_json(run / "manifest.json")["config"]
    if (run / "rows.jsonl").stat().st_size:  # --tasks alone has none
        names = [row["system"] for _, row in read_lines(run / "rows.jsonl")]
        rows = [{"system": name, **published(response)} for name, response in
                zip(names, read_responses(run / "rows.jsonl"), strict=True)]
    for stage, (what, *of) in stages(summary):
        if what in ("search", "task"):
            for _, row in read_lines(run / f"{stage}.jsonl"):
                more.append({"stage": stage} | {k: row[k] for k in KEPT if k in row})
                if what == "search":
                    more[-1]["group"] = digest(row["group"])
        elif of[1:] != BARE:
            judge = list_of(summary) if what == "begun" else summary["settings"]["judges"][0]
            if judge_model(judge):
                raise UserError(f"{run}: {stage} has no verdicts, and {judge} is no list")
            responses = read_responses(run / f"{stage}.jsonl")
            note_verdicts(load_judge(judge, torch.float32, "cpu"), judge, responses)
            rows += [{"system": stage, **published(response)} for response in responses]
    summary["published rows"] = dict(Counter(
        [row["system"] for row in rows] + [row["stage"] for row in more]))
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "rows.csv", table.getvalue())
    write_jsonl(out / "more.jsonl", more)
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")


def again(out: Path, summary: dict) -> tuple[dict, dict[str, list[Response]]]:
    """(summary.json's numbers, the responses by system), from the rows alone."""
    flags, [first, *others] = summary["flags"], summary["settings"]["judges"]
    found, more = {}, {}
    if (out / "rows.csv").read_text(encoding="utf-8").strip():
        for row in read_rows(out / "rows.csv"):
            found.setdefault(row["system"], []).append(restored(row.columns, row.where))
    if (out / "more.jsonl").stat().st_size:
        for _, row in read_lines(out / "more.jsonl"):
            more.setdefault(row["stage"], []).append(row)
    n = {name: len(rows) for name, rows in (found | more).items()}
    if n != summary["published rows"]:
        raise UserError(f"{out}: rows.csv and more.jsonl have {n} rows, not "
                        f"{summary['published rows']}")
    by_system = {name: found.get(name, []) for name in summary["systems"]}
    everyone = [r for responses in by_system.values() for r in responses]
    systems = {name: {} for name in by_system}
    if flags["base_system"]:
        mark_vulnerable(by_system, flags["base_system"], first)
    for name, rows in by_system.items():
        if flags["base_system"]:
            systems[name]["gate_auroc"] = gate_auroc(rows)
        systems[name]["kinds"] = kinds = summarise(rows)
        for kind in kinds.values():
            del kind["seconds_per_prompt"]
    numbers = {
        "systems": systems, "overhead_reduction": reductions(
            by_system, flags["refusal_system"], flags["deliberative_system"]),
        "breakdown": breakdown(by_system, first, set()), "over_refusal": over_refusal(by_system),
        "agreement": {other: agreement(everyone, first, other) for other in others},
        **extras(summary, found, more)}
    return json.loads(json.dumps(numbers, default=asdict)), by_system


def extras(summary: dict, found: dict[str, list[Response]], more: dict[str, list[dict]]) -> dict:
    """The tables of --prefill, --search, --tasks and --gate_sweep."""
    begun, searched, tasks, forced, out = {}, {}, {}, [], {}
    by_system = {name: found.get(name, []) for name in summary["systems"]}
    for stage, (what, *of) in stages(summary):
        if what == "begun":
            begun[tuple(of)] = found[stage] if of[1:] != BARE else [
                r for r in by_system[of[0]] if r.record.harmful]
        elif what == "search":
            searched[tuple(of)] = more[stage]
        elif what == "task":
            tasks.setdefault(of[0], {})[of[1]] = more[stage]
        else:
            forced.append(found[stage])
    if begun:
        out["prefill"] = prefill_table(begun, list_of(summary))
    if searched:
        out["search"] = search_table(searched, list_of(summary), summary["flags"]["search"])
    if tasks:
        out["utility"] = {"lines": utility(tasks, summary["utility"]["base"])}
    if forced:
        flags, first = summary["flags"], summary["settings"]["judges"][0]
        out["gate"] = sweep(flags["gate_sweep"], *forced, by_system, first, flags["token_budget"])
    return out


def different(found: object, said: object, where: str) -> Iterator[str]:
    """The places where two trees of numbers differ by more than a gate's rounding; what the second
    has alone is not looked at.
    """
    if isinstance(found, dict) and isinstance(said, dict):
        for key, value in found.items():
            yield from different(value, said.get(key), f"{where}: {key}")
    elif isinstance(found, list) and isinstance(said, list) and len(found) == len(said):
        for i, pair in enumerate(zip(found, said)):
            yield from different(*pair, f"{where} {i}")
    elif isinstance(found, float) and isinstance(said, float | int):
        if not math.isclose(found, said, rel_tol=1e-5, abs_tol=1e-12):
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
    if "published rows" not in summary:
        raise UserError(f"--out {out}: nothing is published there; give --run")
    numbers, by_system = again(out, summary)
    if wrong := [*different(numbers, summary, "summary.json")]:
        raise UserError(f"{out}: the rows give other numbers, first: {wrong[0]}")
    print(section("By set of prompts", by_set(by_system, summary["settings"]["judges"][0])))
    print(f"{sum(summary['published rows'].values())} rows give the numbers of {out}/summary.json")


if __name__ == "__main__":
    command_line(main, Config)

"""Every number: generate once, score many; any number of systems in one table (arXiv 2511.06512, the comparisons).

    python evaluate.py --systems base=M_s ease=M_s+runs/ease/adapter --prompts FILE [FILE ...] --judge NAME [NAME ...] --out DIR
    python evaluate.py --systems ease=M_s+runs/ease/adapter --ask "text"

1. every system answers every prompt (greedy unless --temperature)    rows-NAME.jsonl
2. every judge gives its verdict on every answer                      rows.jsonl
3. rates with intervals, tokens, overhead reduction                   summary.json, report.md    (scoring.py, report.py)
"""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ease.method import ABSENT, THINK_OPEN, UNCLOSED, overlap, split_reasoning
from ease.generate import generate
from ease.judge import judge_model, load_judge
from ease.loading import load_model, load_tokenizer, pick_device, pick_dtype, resolve
from ease.lora import merge_lora
from ease.readers import read_named
from ease.records import Record, UserError, read_jsonl, read_lines, unique, write_jsonl, write_text
from ease.report import gate_svg, glance, markdown_report
from ease.run import command_line, finish, is_done, open_run
from ease.scoring import (UNPARSED, agreement, attack_succeeded, auroc, choose_threshold, gate_curve, operating_point, overhead_reduction, rate,
                          summarise)


@dataclass
class Config:
    """The flags of an evaluation."""

    systems: list[str]  # NAME=MODEL or NAME=MODEL+ADAPTER
    out: str = ""  # the run folder; the same command goes on with a stopped run
    prompts: list[str] = ()  # records to answer; `response` is the reference answer where there is one
    judge: list[str] = ("xstest", "jailbreakbench")  # keyword lists, target, guard models; the first is the headline
    limit: int = 0  # only the first this many prompts of each file (0 = all)
    base_system: str = ""  # NAME of the original model: its jailbroken prompts are the vulnerable ones of this set
    refusal_system: str = ""  # NAME of the refusal-trained baseline, for the overhead reduction
    deliberative_system: str = ""  # NAME of the baseline that reasons on everything
    max_new_tokens: int = 1024  # longest response
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # with a temperature above 0
    slots: int = 64  # rows generated together; lower it when memory is short
    # the gate g(q), the probability of the open marker: by default the model decides token by token
    gate_threshold: float | None = None  # reason where g(q) >= this: 0 = always, above 1 = never; not for the three named systems above
    gate_sweep: str = ""  # NAME of a system to answer every prompt twice, forced to reason and forced not to: the curve of all thresholds
    token_budget: float = 0.0  # with --gate_sweep: the threshold is chosen among those with at most this many tokens a response (0 = all)
    score_only: bool = False  # score the rows of --out again, with these judges; nothing is generated
    ask: str = ""  # print every system's response to this text and stop
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and activations
    device: str = "auto"  # cuda if there is one, else cpu
    seed: int = 0  # of sampling


NAMED = ("base_system", "refusal_system", "deliberative_system")  # systems that no gate threshold touches


def parse_systems(specs: list[str]) -> dict[str, tuple[str, str]]:
    """NAME=MODEL[+ADAPTER] -> {name: (model, adapter or "")}."""
    out = {}
    for spec in specs:
        name, equals, where = spec.partition("=")
        if not (equals and where and re.fullmatch(r"[\w.-]+", name)):
            raise UserError(f"--systems {spec!r}: expected NAME=MODEL or NAME=MODEL+ADAPTER, the name of letters, digits, '_', '.', '-'")
        if name in out:
            raise UserError(f"--systems: the name {name!r} stands twice")
        model, _, adapter = where.partition("+")
        out[name] = model, adapter
    return out


def answer(cfg: Config, model_name: str, adapter: str, texts: list[str], dtype, device: str, label: str,
           threshold: float | None = None) -> list[dict]:
    """Step 1: one system's responses, as the parts of a row that need no judge."""
    tokenizer, model = load_tokenizer(model_name), load_model(model_name, adapter, dtype, device)
    if dtype == torch.float32:
        merge_lora(model)  # exact to rounding in fp32, and faster; in bf16 it would round the update away
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": t}]) for t in texts]
    marker = tokenizer.encode(THINK_OPEN)
    found = generate(model, prompts, cfg.max_new_tokens, tokenizer.stop_ids, cfg.temperature, cfg.top_p, cfg.seed,
                     marker=marker, slots=cfg.slots, progress=label, gate_threshold=threshold)
    rows = []
    for g in found:
        text = tokenizer.decode(g.ids)
        reasoning, final, state = split_reasoning(text)
        answer_tokens = len(tokenizer.encode(final))
        total = len(g.ids) + g.finished  # the end token was generated too
        rows.append({"text": text, "reasoning": reasoning, "answer": final, "state": state, "finished": g.finished, "gate": g.gate,
                     "marker": g.ids[: len(marker)] == marker,
                     "tokens": {"reasoning": 0 if state == "absent" else total - answer_tokens - g.finished, "answer": answer_tokens,
                                "total": total}, "seconds": g.seconds})
    return rows


def answer_stage(cfg: Config, run: Path, name: str, model: str, adapter: str, records: list[Record], dtype, device: str,
                 threshold: float | None) -> list[dict]:
    """answer(), kept in rows-NAME.jsonl and read from there when it is complete."""
    file = run / f"rows-{name}.jsonl"
    if not file.exists() and not cfg.score_only:
        parts = answer(cfg, model, adapter, [r.prompt for r in records], dtype, device, name, threshold)
        write_jsonl(file, [{"system": name, "id": r.id, "group": r.request, "kind": r.kind, "attack": r.attack, "source": r.source,
                            "prompt": r.prompt, "expected": r.response if not r.harmful else "", "target": r.target, **part}
                           for r, part in zip(records, parts, strict=True)])
    return [row for _, row in read_lines(file)]


def score(rows: list[dict], judges: list[str], dtype, device: str) -> None:
    """Step 2: row["verdicts"] = {judge: verdict}, on the final answer. An unclosed block is no answer: it is never judged."""
    asked = [row for row in rows if row["state"] != UNCLOSED]
    records = [Record(id=row["id"], prompt=row["prompt"], kind=row["kind"], target=row["target"]) for row in asked]
    for row in rows:
        row["verdicts"] = dict.fromkeys(judges, UNPARSED)
    for name in judges:
        for row, verdict in zip(asked, load_judge(name, dtype, device)(records, [row["answer"] for row in asked]), strict=True):
            row["verdicts"][name] = verdict


def training_of(adapter_or_model: str) -> tuple[dict, list[Record]]:
    """What a run folder says of its training, phase 1 included when it started there: ({steps, supervised_tokens}, records)."""
    totals, records, where = {}, [], adapter_or_model
    while where and (run := Path(where).parent) and (run / "manifest.json").exists() and (run / "done").exists():
        done = json.loads((run / "done").read_text(encoding="utf-8"))
        totals = {k: totals.get(k, 0) + done[k] for k in ("steps", "supervised_tokens")}
        records += read_jsonl(run / "trained_on.jsonl")
        where = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["config"].get("init", "")
    return totals, records


def breakdown(by_system: dict[str, list[dict]], judge: str, trained_attacks: set[str]) -> dict:
    """ASR of adversarial harmful rows by attack family, by whether any system was trained on the family, and by source:
    {field: {part: {system: rate}}}.
    """
    def family(row: dict) -> str:  # of a pair, both
        return row["attack"] and ("families trained on" if set(row["attack"].split("+")) <= trained_attacks else "held-out families")

    fields = {"attack": lambda row: row["attack"], "trained on": family, "source": lambda row: row["source"]}
    if not trained_attacks:
        del fields["trained on"]
    out = {}
    for field, part in fields.items():
        rows = {name: [r for r in rows if r["kind"] == "adversarial_harmful" and part(r)] for name, rows in by_system.items()}
        values = sorted({part(r) for r in next(iter(rows.values()))})
        out[field] = {value: {name: rate([attack_succeeded(r, judge) for r in picked], [r["group"] for r in picked])
                              for name in rows if (picked := [r for r in rows[name] if part(r) == value])} for value in values}
    return out


def is_vulnerable(row: dict, judge: str) -> bool | None:
    """Whether the original model, whose row this is, was jailbroken: by an adversarial harmful prompt, as in D_diag. None where
    nobody can say.
    """
    if row["kind"] != "adversarial_harmful":
        return False
    return attack_succeeded(row, judge)


def reductions(cfg: Config, by_system: dict[str, list[dict]]) -> dict:
    """Overhead reduction of every other system against the two named baselines, on plain prompts and on all."""
    if not (cfg.refusal_system and cfg.deliberative_system):
        return {}

    def tokens(name: str, kinds: tuple[str, ...]) -> list[float]:
        return [r["tokens"]["total"] for r in by_system[name] if r["kind"].startswith(kinds)]

    sets = {"plain": ("harmful", "benign"), "all": ("",)}  # plain = neither adversarial kind
    return {name: {label: overhead_reduction(tokens(name, kinds), tokens(cfg.refusal_system, kinds), tokens(cfg.deliberative_system, kinds))
                   for label, kinds in sets.items()}
            for name in by_system if name not in (cfg.refusal_system, cfg.deliberative_system)}


def gate_numbers(cfg: Config, by_system: dict[str, list[dict]], opened: list[dict], direct: list[dict], judge: str) -> dict:
    """What --gate_sweep shows: the curve of one system over all thresholds, the chosen one, and the systems as they are beside it."""
    curve = gate_curve(opened, direct, judge)
    chosen = choose_threshold(curve, cfg.token_budget)
    if chosen is None:
        print(f"--token_budget {cfg.token_budget}: no threshold is within it; the cheapest needs {min(p['tokens'] for p in curve):.1f}")
    return {"system": cfg.gate_sweep, "curve": curve, "chosen": chosen, "token_budget": cfg.token_budget,
            "other_ids": sum(r["state"] != ABSENT for r in direct), "systems": {name: operating_point(rows, judge) for name, rows in by_system.items()}}


def check_flags(cfg: Config, systems: dict[str, tuple[str, str]]) -> None:
    """The mistakes that can be seen before anything is generated."""
    if not (cfg.out and (cfg.prompts or cfg.score_only)):
        raise UserError("give --out DIR and --prompts FILE [FILE ...]")
    for flag in (*NAMED, "gate_sweep"):
        if (name := getattr(cfg, flag)) and name not in systems:
            raise UserError(f"--{flag} {name!r} is none of the --systems ({', '.join(systems)})")
    if cfg.token_budget and not cfg.gate_sweep:
        raise UserError("--token_budget is for choosing a threshold: it needs --gate_sweep NAME")
    if cfg.score_only and (made := Path(cfg.out) / "manifest.json").exists():
        if other := set(cfg.systems) - set(json.loads(made.read_text(encoding="utf-8"))["config"]["systems"]):
            raise UserError(f"--score_only: the rows in {cfg.out} are of other systems than {sorted(other)[0]}")
    for name in cfg.judge:
        judge_model(name)


def summary_of(cfg: Config, run: Path, systems: dict[str, tuple[str, str]], by_system: dict[str, list[dict]], swept: list[list[dict]]) -> dict:
    """Step 3: everything that summary.json holds, from rows with verdicts."""
    manifest, judges = json.loads((run / "manifest.json").read_text(encoding="utf-8")), list(cfg.judge)
    made = manifest["config"]  # how the rows were made, also with --score_only
    decoding = f"greedy, at most {made['max_new_tokens']} new tokens" if not made["temperature"] else (
        f"T = {made['temperature']}, top_p = {made['top_p']}, at most {made['max_new_tokens']} new tokens")
    decoding += "" if made["gate_threshold"] is None else f", gate threshold {made['gate_threshold']:g}"
    trained = {name: training_of(adapter or model) for name, (model, adapter) in systems.items()}
    attacks = {part for _, records in trained.values() for r in records if r.attack for part in r.attack.split("+")}
    summary = {"systems": {}, "overhead_reduction": reductions(cfg, by_system), "breakdown": breakdown(by_system, judges[0], attacks),
               "agreement": {other: agreement([r for rows in by_system.values() for r in rows], judges[0], other) for other in judges[1:]},
               "settings": {"judges": judges, "decoding": f"{decoding}, {manifest['dtype']}".replace("torch.", ""), "prompts": made["prompts"]}}
    for name, (model, adapter) in systems.items():
        training, trained_on = trained[name]
        if trained_on:
            training["overlap_exact"], training["overlap_near"] = overlap([r["prompt"] for r in by_system[name]], [r.prompt for r in trained_on])
        summary["systems"][name] = {"model": model, "adapter": adapter, "training": training, "kinds": summarise(by_system[name])}
        if cfg.base_system:  # does the gate open for the vulnerable prompts?
            gates = {v: [r["gate"] for r in by_system[name] if r["vulnerable"] is v] for v in (True, False)}
            summary["systems"][name]["gate_auroc"] = auroc(gates[True], gates[False])
    if swept:
        summary["gate"] = gate_numbers(cfg, by_system, *swept, judges[0])
    return summary


def main(cfg: Config) -> None:
    systems = parse_systems(cfg.systems)
    device = pick_device(cfg.device)
    if cfg.ask:
        dtype = pick_dtype(cfg.dtype, device)
        for name, (model, adapter) in systems.items():
            print(f"--- {name}\n{answer(cfg, model, adapter, [cfg.ask], dtype, device, '', cfg.gate_threshold)[0]['text']}")
        return
    check_flags(cfg, systems)
    run, started, dtype = Path(cfg.out), time.time(), pick_dtype(cfg.dtype, device)
    records = [r for path in cfg.prompts for r in read_named(path)[: cfg.limit or None]]
    if not cfg.score_only:
        unique([(f"--prompts, {r.id.split('/')[0]}", r) for r in records])
        models = [str(resolve(model)) for model, _ in systems.values()]
        open_run(cfg, models + [a for _, a in systems.values() if a] + list(cfg.prompts) + [j for j in map(judge_model, cfg.judge) if j], device, str(dtype))
        if is_done(run):
            print(glance(json.loads((run / "summary.json").read_text(encoding="utf-8"))))
            return

    def rows_of(label: str, name: str, threshold: float | None) -> list[dict]:
        return answer_stage(cfg, run, label, *systems[name], records, dtype, device, threshold)

    fixed = {getattr(cfg, flag) for flag in NAMED}
    by_system = {name: rows_of(name, name, None if name in fixed else cfg.gate_threshold) for name in systems}
    swept = [rows_of(f"{cfg.gate_sweep}+{how}", cfg.gate_sweep, t) for how, t in (("opened", 0.0), ("direct", 2.0))] if cfg.gate_sweep else []
    score([row for rows in [*by_system.values(), *swept] for row in rows], list(cfg.judge), dtype, device)
    if cfg.base_system:
        vulnerable = {row["id"]: is_vulnerable(row, cfg.judge[0]) for row in by_system[cfg.base_system]}
        for row in (row for rows in by_system.values() for row in rows):
            row["vulnerable"] = vulnerable[row["id"]]
    write_jsonl(run / "rows.jsonl", [row for rows in by_system.values() for row in rows])

    summary = summary_of(cfg, run, systems, by_system, swept)
    write_text(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_text(run / "report.md", markdown_report(summary))
    if swept:
        write_text(run / "gate.svg", gate_svg(summary["gate"]))
    print(glance(summary))
    finish(run, started, rows=sum(map(len, by_system.values())))


if __name__ == "__main__":
    command_line(main, Config)

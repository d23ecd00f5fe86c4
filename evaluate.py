"""Every number: responses of several systems to the same prompts, verdicts, the comparison.

    python evaluate.py --systems base=M_s ease=M_s+RUN/adapter --prompts FILE --out DIR
    python evaluate.py --systems vllm=responses:FILE --tokenizer M_s --prompts FILE --out DIR
    python evaluate.py --systems base=M_s --ask "text"

1. prompts -> responses of every system  (respond; rows-NAME.jsonl, kept: scoring again is free)
   --latency N: N of them one at a time  (rows-NAME+latency.jsonl)
2. responses -> verdicts of every judge  (add_verdicts; an unclosed think block is never judged)
3. responses and verdicts -> numbers     (scoring.summarise; summary.json)
   --tasks: questions -> right answers   (tasks.measure; tasks-NAME-TASK.jsonl)
4. numbers -> report.md, report.html and the table that is printed
"""

import json
import random
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

from ease.adaptive import GOALS, SUFFIX, attack, search, search_table
from ease.compare import compare
from ease.generate import Sampling
from ease.judge import Format, Shown, judge_model, load_judge, note_verdicts
from ease.loading import Place, load_tokenizer, pick_place, resolve
from ease.outputs import read_outputs
from ease.page import html_report
from ease.prefill import NOTE, WHERE, forced_ids, prefill_table
from ease.ranks import RANKS
from ease.readers import read_named
from ease.records import (Record, Response, UserError, read_lines, read_responses,
                          response_to_dict, write_jsonl, write_text)
from ease.report import glance, markdown_report, section, utility_rows
from ease.respond import respond
from ease.run import RunFlags, command_line, finish, is_done, log, open_run, peak_memory
from ease.scoring import (agreement, breakdown, cost, gate_auroc, mark_vulnerable, over_refusal,
                          overlap, reductions, summarise)
from ease.sweep import sweep, sweep_section
from ease.systems import System, load_system, parse_systems, training_of
from ease.tasks import Item, measure, read_items, task_files, utility
from ease.tokenizer_files import read_json


@dataclass(kw_only=True)
class Config(RunFlags):
    """The flags of an evaluation."""

    systems: list[str] = ()  # NAME=MODEL, NAME=MODEL+ADAPTER, or NAME=responses:FILE, made
    #   elsewhere
    out: str = ""  # the run folder; the same command goes on with a stopped run
    prompts: list[str] = ()  # records to answer; `response` is the reference answer, if any
    judge: list[str] = ("xstest", "jailbreakbench")  # refusal lists, target, guard models; the
    #   first is the headline
    judge_format: Format = "auto"  # the guards' protocol; auto: by what each writes on two probes
    judge_text: Shown = "answer"  # what guards are shown; full: the reasoning too
    limit: int = 0  # only the first this many prompts of each file (0 = all)
    tokenizer: str = ""  # model whose tokenizer counts the tokens of NAME=responses:FILE
    base_system: str = ""  # NAME of the original model: what jailbreaks it is vulnerable
    refusal_system: str = ""  # NAME of the refusal-trained baseline, for the overhead reduction
    deliberative_system: str = ""  # NAME of the baseline that reasons on everything
    max_new_tokens: int = 1024  # longest response
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # with a temperature above 0
    # the gate g(q), the probability of the open marker: by default the model decides as sampled
    gate_threshold: float | None = None  # reason where g(q) >= this: 0 = always, above 1 = never;
    #   not for the three named systems above, nor for responses made elsewhere
    gate_sweep: str = ""  # NAME of a system to answer twice, forced to reason and forced not to
    prefill: list[int] = ()  # ASR of harmful prompts behind the first k tokens of an opening, for
    #   every k given (0 2 5 10); judged by the first judge but target
    latency: int = 0  # so many prompts again, one at a time: p50 and p95 of a response's seconds
    search: int = 0  # attack by random search for a suffix (arXiv 2404.02151): at most this many
    #   scored a prompt (300; 0 = none); ends by the first judge but target, if there is another
    search_prompts: int = 0  # attack only the first this many prompts (0 = all)
    search_goal: list[str] = ("opening",)  # opening: plain harmful prompts shall be complied with;
    #   bypass: adversarial ones; gate: the gate shall shut on these; or several
    token_budget: float = 0.0  # with --gate_sweep: tokens a response of the threshold (0 = any)
    score_only: bool = False  # score the rows of --out with these judges, in a folder beside them
    compare: list[str] = ()  # A B: is the difference chance? Two of the --systems; without them
    #   two finished runs, RUN (of one system) or RUN/NAME: printed
    tasks: list[str] = ()  # utility: hellaswag=FILE mmlu=DIR gsm8k=FILE (or FILE+EXAMPLES)
    task_prompts: Literal["chat", "raw"] = "chat"  # raw: lm-evaluation-harness's own numbers
    policy_prompt: str = ""  # NAME of a system that gets the whole safety policy as its system
    #   turn: the baseline without training
    ask: str = ""  # print every system's response to this text; "-": to every line of stdin


def check_names(cfg: Config, systems: dict[str, System]) -> None:
    """The flags that name a system must name one of --systems."""
    for flag in ("base_system", "refusal_system", "deliberative_system", "gate_sweep",
                 "policy_prompt"):
        if (name := getattr(cfg, flag)) and name not in systems:
            raise UserError(f"--{flag} {name!r} is none of the --systems ({', '.join(systems)})")


def check_flags(cfg: Config, systems: dict[str, System]) -> None:
    """The mistakes that can be seen before anything is generated."""
    if RANKS > 1:
        raise UserError("evaluate.py runs in one process, without torchrun")
    if not (cfg.out and (cfg.prompts or cfg.tasks or cfg.score_only)):
        raise UserError("give --out DIR and --prompts FILE [FILE ...], or --tasks")
    made = [name for name, system in systems.items() if system.outputs]
    if cfg.gate_sweep in made:
        raise UserError(f"--gate_sweep {cfg.gate_sweep}: responses made elsewhere cannot be made "
                        "again")
    if (cfg.gate_sweep or cfg.prefill or cfg.latency or cfg.search) and not (
            cfg.prompts or cfg.score_only):
        raise UserError("--gate_sweep, --prefill, --latency and --search answer --prompts: give "
                        "some")
    if cfg.tasks and made:
        raise UserError(f"--tasks asks the model itself: not with the responses of {made[0]}")
    if bool(made) != bool(cfg.tokenizer) and not cfg.score_only:
        raise UserError("--tokenizer MODEL counts the tokens of NAME=responses:FILE: give both or "
                        "neither")
    if cfg.tasks and cfg.policy_prompt and cfg.task_prompts == "raw":
        raise UserError("--policy_prompt: raw --task_prompts have no system turn")
    if cfg.compare and (len(cfg.compare) != 2 or set(cfg.compare) - set(systems)):
        raise UserError(f"--compare: expected two of the --systems ({', '.join(systems)})")
    if cfg.prefill and (min(cfg.prefill) < 0 or set(cfg.judge) == {"target"}):
        raise UserError("--prefill: k from 0 on, and a --judge besides target, which looks for the "
                        "opening")
    if set(cfg.search_goal) - set(GOALS) or cfg.search and cfg.score_only:
        raise UserError(f"--search_goal: {', '.join(GOALS)}; --search ends by its judge: not "
                        "with --score_only")
    if cfg.token_budget and not cfg.gate_sweep:
        raise UserError("--token_budget is for choosing a threshold: it needs --gate_sweep NAME")
    if cfg.score_only:
        if not (manifest := read_json(Path(cfg.out) / "manifest.json")):
            raise UserError(f"--score_only: {cfg.out} holds no evaluation")
        known = manifest["config"]["systems"]
        if other := sorted(set(cfg.systems) - set(known)):
            raise UserError(f"--score_only: the rows in {cfg.out} are of other systems than "
                            f"{other[0]}")


def answers(cfg: Config, file: Path, system: System, records: list[Record], place: Place,
            threshold: float | None, begun: tuple[int, str] | None = None, alone: bool = False
            ) -> list[Response]:
    """Step 1: one system's responses, made here or read. A stage: `file`. begun: (k, where) of
    prefill.forced_ids. alone: one at a time.
    """
    if not file.exists() and not cfg.score_only:
        if system.outputs:
            responses = read_outputs(system.outputs, records, load_tokenizer(cfg.tokenizer))
        else:
            sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.seed)
            model, tokenizer = load_system(system, place)
            label = file.stem.removeprefix("rows-")
            forced = [forced_ids(tokenizer, r, *begun) for r in records] if begun else None
            settings = label, threshold, [system.messages(r.prompt) for r in records]
            if alone:  # untimed: what is done only once
                respond(model, tokenizer, records[:1], sampling, 1, *settings)
            responses = respond(model, tokenizer, records, sampling, 1 if alone else cfg.slots,
                                *settings, file.with_suffix(".kept"), forced)
        if not begun:  # by then the process has held a judge
            log(file.parent, peak_gib=round(peak_memory() / 2**30, 2))
        write_jsonl(file, map(response_to_dict, responses))
    return read_responses(file)


def utility_of(cfg: Config, run: Path, systems: dict[str, System], items: dict[str, list[Item]],
               place: Place) -> dict:
    """Every task's numbers, the differences to --base_system or the first one. A stage a system and
    task: tasks-NAME-TASK.jsonl.
    """
    results = {}
    for name, system in systems.items():
        files = {task: run / f"tasks-{name}-{task}.jsonl" for task in items}
        if missing := [task for task in files if not (files[task].exists() or cfg.score_only)]:
            model, tokenizer = load_system(system, place)
            for task in missing:
                write_jsonl(files[task], measure(
                    model, tokenizer, task, items[task], cfg.task_prompts == "raw",
                    cfg.max_new_tokens, cfg.slots, threshold_of(cfg, name), system.messages))
        results[name] = {task: [row for _, row in read_lines(file)] for task, file in files.items()}
    base = cfg.base_system or next(iter(systems))
    return {"prompts": cfg.task_prompts, "base": base, "lines": utility(results, base)}


def threshold_of(cfg: Config, name: str) -> float | None:
    """--gate_threshold, but none for the three named systems."""
    named = (cfg.base_system, cfg.refusal_system, cfg.deliberative_system)
    return None if name in named else cfg.gate_threshold


def add_verdicts(cfg: Config, responses: list[Response], place: Place) -> None:
    """Step 2: response.verdicts = {judge: verdict}."""
    for name in cfg.judge:
        judge = load_judge(name, *place, cfg.judge_format, cfg.judge_text, cfg.slots)
        note_verdicts(judge, name, responses)


def summarise_run(cfg: Config, run: Path, systems: dict[str, System],
                  by_system: dict[str, list[Response]], alone: dict) -> dict:
    """Step 3: everything that summary.json holds, from responses with verdicts."""
    manifest = read_json(run / "manifest.json")
    made, first = manifest["config"], cfg.judge[0]  # how the rows were made, whatever today's flags
    T, gate = made["temperature"], made["gate_threshold"]
    decoding = ", ".join([f"T = {T}, top_p = {made['top_p']}" if T else "greedy",
                          f"at most {made['max_new_tokens']} new tokens",
                          *([] if gate is None else [f"gate threshold {gate:g}"]),
                          manifest["dtype"].removeprefix("torch."),
                          *["guards shown the reasoning"] * (cfg.judge_text == "full"),
                          *(f"{name}: made elsewhere" for name, s in systems.items() if s.outputs)])
    trained = {name: training_of("" if s.outputs else s.adapter or s.model)
               for name, s in systems.items()}
    attacks = {part for _, records in trained.values() for r in records if r.attack
               for part in r.attack.split("+")}
    file = run / "metrics.jsonl"  # a process's peak only grows: one for all systems
    peaks = [row["peak_gib"] for _, row in read_lines(file)] if file.exists() else []
    everyone = [r for responses in by_system.values() for r in responses]
    summary = {
        "systems": {}, "overhead_reduction": reductions(by_system, cfg.refusal_system,
                                                        cfg.deliberative_system),
        "breakdown": breakdown(by_system, first, attacks),
        "over_refusal": over_refusal(by_system), "peak_gib": max(peaks, default=None),
        "agreement": {other: agreement(everyone, first, other) for other in cfg.judge[1:]},
        "settings": {"judges": list(cfg.judge), "decoding": decoding, "prompts": made["prompts"]}}
    for name, system in systems.items():
        training, trained_on = trained[name]
        responses = by_system[name]
        if trained_on:
            training["overlap_exact"], training["overlap_near"] = overlap(
                [r.record.prompt for r in responses], [r.prompt for r in trained_on])
        numbers = {**system._asdict(), "training": training, "kinds": summarise(responses),
                   "cost": cost(responses, alone.get(name, []))}
        if cfg.base_system:
            numbers["gate_auroc"] = gate_auroc(responses)
        summary["systems"][name] = numbers
    return summary


def ask(cfg: Config, systems: dict[str, System], place: Place) -> None:
    """--ask: every system's response to one text, or to every line of stdin, printed."""
    sampling = Sampling(cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.seed)
    if made := [name for name, system in systems.items() if system.outputs]:
        raise UserError(f"--ask: {made[0]} is a file of responses, no model to ask")
    loaded = {name: load_system(system, place) for name, system in systems.items()}
    for text in map(str.rstrip, sys.stdin) if cfg.ask == "-" else [cfg.ask]:
        for name, system in systems.items():
            [response] = respond(*loaded[name], [Record("ask", text, "benign")], sampling,
                                 gate_threshold=cfg.gate_threshold,
                                 messages=[system.messages(text)])
            print(f"--- {name}\n{response.text}", flush=True)


def finished(where: str, judge: str) -> list[Response]:
    """The responses, with verdicts, of a finished run: RUN (of one system) or RUN/NAME."""
    alone = (Path(where) / "rows.jsonl").exists()
    file = (Path(where) if alone else Path(where).parent) / "rows.jsonl"
    names = [row["system"] for _, row in read_lines(file)] if file.exists() else []
    name = "".join(set(names)) if alone else Path(where).name
    found = [r for n, r in zip(names, names and read_responses(file)) if n == name]
    if not found or judge not in found[0].verdicts:
        raise UserError(f"--compare {where}: no RUN (of one system) or RUN/NAME with verdicts by "
                        f"{judge}; systems there: {', '.join(sorted(set(names))) or 'none'}")
    return found


def folders(cfg: Config, systems: dict[str, System], place: Place) -> tuple[Path, Path]:
    """(the run, with its responses; where verdicts and numbers go: the run too, or beside them)."""
    guards = [judge_model(name) for name in cfg.judge]
    if cfg.score_only:
        changed = {cfg.judge_format, cfg.judge_text} - {"auto", "answer"}
        judges = "+".join([*(Path(name).name for name in cfg.judge), *sorted(changed)])
        return Path(cfg.out), Path(cfg.out) / f"scored-by-{judges}"
    inputs = [p for s in systems.values() for p in (s.outputs or str(resolve(s.model)), s.adapter)]
    inputs += [str(resolve(cfg.tokenizer))] if cfg.tokenizer else []
    inputs += [file for files in task_files(cfg.tasks).values() for pair in files for file in pair]
    run = open_run(cfg, [*inputs, *cfg.prompts, *guards], place)
    return run, run


def all_answers(cfg: Config, run: Path, systems: dict[str, System], records: list[Record],
                place: Place) -> tuple[dict, list[list[Response]], dict]:
    """Step 1: every system's responses, {name: responses}; with --gate_sweep those of one forced to
    reason, and forced not to; with --latency a few, one at a time.
    """
    def answers_of(name: str, label: str, threshold: float | None, chosen=records, alone=False):
        file = run / f"rows-{label}.jsonl"
        return answers(cfg, file, systems[name], chosen, place, threshold, alone=alone)

    if not cfg.prompts and not cfg.score_only:
        return {name: [] for name in systems}, [], {}
    order = sorted(systems, key=lambda name: not systems[name].outputs)  # a file's mistakes first
    found = {name: answers_of(name, name, threshold_of(cfg, name)) for name in order}
    forced = [answers_of(cfg.gate_sweep, f"{cfg.gate_sweep}+{label}", threshold) for
              label, threshold in (("opened", 0.0), ("direct", 2.0))] if cfg.gate_sweep else []
    few = random.Random(cfg.seed).sample(records, min(cfg.latency, len(records)))
    alone = {name: answers_of(name, f"{name}+latency", threshold_of(cfg, name), few, True)
             for name, system in systems.items() if cfg.latency and not system.outputs}
    return {name: found[name] for name in systems}, forced, alone


def prefilled(cfg: Config, run: Path, systems: dict[str, System],
              by_system: dict[str, list[Response]], place: Place) -> list[dict]:
    """--prefill: prefill.prefill_table of every system that can be asked. Stages."""
    [judge, *_] = [name for name in cfg.judge if name != "target"]
    found = {}
    for (name, system), where, k in product(systems.items(), WHERE, cfg.prefill):
        if system.outputs:
            continue
        harmful = [r for r in by_system[name] if r.record.harmful]
        if k or where != "direct":
            file = run / f"rows-{name}+{where.replace(' ', '-')}-{k}.jsonl"
            harmful = answers(cfg, file, system, [r.record for r in harmful], place, None,
                              (k, where))
        found[name, where, k] = harmful
    add_verdicts(replace(cfg, judge=[judge]), [r for rs in found.values() for r in rs], place)
    return prefill_table(found, judge)


def searched(cfg: Config, run: Path, systems: dict[str, System], asked: dict[str, list[Record]],
             place: Place) -> list[dict]:
    """--search: adaptive.search_table of every system that can be asked. Stages."""
    judge, found = next((name for name in cfg.judge if name != "target"), "target"), {}
    for (name, system), goal in product(systems.items(), asked):
        if system.outputs:
            continue
        file = run / f"rows-{name}+search-{goal}.jsonl"
        if not file.exists():
            sampling = Sampling(cfg.max_new_tokens, seed=cfg.seed)
            guard = load_judge(judge, *place, cfg.judge_format, cfg.judge_text)
            attacked = partial(attack, *load_system(system, place), system.messages, guard, goal,
                               cfg.search, sampling, threshold_of(cfg, name))
            write_jsonl(file, search(asked[goal], attacked, file.with_suffix(".kept")))
        found[name, goal] = [row for _, row in read_lines(file)]
    return search_table(found, judge, cfg.search)


def write_reports(cfg: Config, out: Path, summary: dict, by_system: dict[str, list[Response]],
                  forced: list[list[Response]]) -> None:
    """Step 4: summary.json, report.md, report.html and the table that is printed."""
    more = section("Prefilling", summary.get("prefill", []), NOTE)
    more += section("A suffix that adapts", summary.get("search", []), SUFFIX)
    if forced:
        gate = sweep(cfg.gate_sweep, *forced, by_system, cfg.judge[0], cfg.token_budget)
        summary["gate"], more = gate, more + sweep_section(gate)
    if cfg.compare:
        more += "\n## {} (A) against {} (B)\n\n".format(*cfg.compare) + compare(
            *map(by_system.get, cfg.compare), cfg.judge[0], cfg.seed)
    write_text(out / "summary.json", json.dumps(summary, indent=2, default=asdict) + "\n")
    write_text(out / "report.md", markdown_report(summary, more))
    if any(by_system.values()):
        write_text(out / "report.html", html_report(summary, by_system, cfg.judge[0]))
    print(glance(summary) + section(*utility_rows(summary)))


def main(cfg: Config) -> None:
    if len(cfg.compare) == 2 and not cfg.systems:
        print(compare(*(finished(c, cfg.judge[0]) for c in cfg.compare), cfg.judge[0], cfg.seed))
        return
    systems, place = parse_systems(cfg.systems), pick_place(cfg)
    check_names(cfg, systems)
    if cfg.policy_prompt:
        systems[cfg.policy_prompt] = systems[cfg.policy_prompt]._replace(policy=True)
    if cfg.ask:
        ask(cfg, systems, place)
        return
    check_flags(cfg, systems)
    records = [r for found in read_named(*cfg.prompts) for r in found[: cfg.limit or None]]
    asked = {goal: [r for r in records if r.kind == kind][: cfg.search_prompts or None]
             for goal, kind in GOALS.items() if cfg.search and goal in cfg.search_goal}
    if not all(asked.values()):
        raise UserError("--search: opening needs prompts of kind harmful, the others adversarial")
    items = {task: read_items(task, files, cfg.limit)
             for task, files in task_files(cfg.tasks).items()}
    run, out = folders(cfg, systems, place)  # after reading: a mistake there leaves no folder
    if not cfg.score_only and is_done(run):
        print((run / "report.md").read_text(encoding="utf-8").split("\n## ")[0])
        return

    by_system, forced, alone = all_answers(cfg, run, systems, records, place)
    add_verdicts(cfg, [r for found in [*by_system.values(), *forced] for r in found], place)
    if cfg.base_system:
        mark_vulnerable(by_system, cfg.base_system, cfg.judge[0])
    write_jsonl(out / "rows.jsonl", [{"system": name, **response_to_dict(r)}
                                     for name, found in by_system.items() for r in found])
    summary = summarise_run(cfg, run, systems, by_system, alone)
    if cfg.prefill:
        summary["prefill"] = prefilled(cfg, run, systems, by_system, place)
    if cfg.search:
        summary["search"] = searched(cfg, run, systems, asked, place)
    if items:
        summary["utility"] = utility_of(cfg, run, systems, items, place)
    write_reports(cfg, out, summary, by_system, forced)
    if cfg.score_only:
        print(f"scored again; results in {out}")
    else:
        finish(run, rows=sum(map(len, by_system.values())))


if __name__ == "__main__":
    command_line(main, Config)

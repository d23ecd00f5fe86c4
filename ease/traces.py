"""Traces "<think> CoT </think> answer": sampled from a teacher and filtered, or taken from a file
(paper, phase 1, step 2; phase 2, step 3).
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal

from ease.categories import classify
from ease.generate import Sampling
from ease.judge import Format, Judge, Shown, load_judge
from ease.loading import Place, load_model, load_tokenizer
from ease.model import CausalLM
from ease.policies import Policy, accept_trace, load_policy, teacher_messages
from ease.records import Record, UserError, read_jsonl, record_to_dict, write_jsonl
from ease.respond import respond
from ease.run import RunFlags
from ease.scoring import is_refusal
from ease.tokenizer import Tokenizer


@dataclass(kw_only=True)
class TraceFlags(RunFlags):
    """How a teacher writes traces. Official: T 0.7, top_p 1, 2048 new tokens."""

    policies: str = ""  # JSON with the teacher's instruction and policies; default: policies.py
    categories: Literal["record", "teacher"] = "record"  # as the prompts have them, or asked of it
    judge: str = "xstest"  # verdicts: a guard model, target, or a refusal list (by which a safe
    #   answer that does not refuse is unsafe)
    judge_format: Format = "auto"  # a guard's protocol; auto: by what it writes on two probes
    judge_text: Shown = "answer"  # what a guard is shown; full: the reasoning too
    attempts: int = 3  # samples a prompt before it is given up
    samples_per_prompt: int = 1  # accepted traces a prompt, different ones, each a row to train on
    temperature: float = 0.7  # of the teacher
    top_p: float = 1.0  # of the teacher
    max_new_tokens: int = 2048  # of a trace with its answer
    filler: bool = False  # a control: traces of dots instead of words


class NoTraceAccepted(UserError):
    """A teacher of whose samples none counts."""


def check_categories(records: list[Record]) -> None:
    """An error for a harmful record without categories: the teacher would be shown the policy of
    harmless requests.
    """
    for r in records:
        if r.harmful and not r.categories:
            raise UserError(f"row {r.id!r} is harmful and has no categories: the teacher would be "
                            "shown that nothing is restricted; --categories teacher asks it")


def with_categories(flags: TraceFlags, run: Path, teacher: str, records: list[Record], place: Place
                    ) -> list[Record]:
    """The records with the categories they carry or, with --categories teacher, those that the
    teacher gives them. A stage: categories.jsonl.
    """
    file = run / "categories.jsonl"
    if flags.categories == "record":
        return records
    if not file.exists():
        model, tokenizer = load_model(teacher, "", *place), load_tokenizer(teacher)
        write_jsonl(file, classify(model, tokenizer, records, load_policy(flags.policies)))
    return read_jsonl(file)


def teacher_traces(flags: TraceFlags, run: Path, teacher: str, records: list[Record], place: Place
                   ) -> list[Record]:
    """Every record with an accepted trace of the teacher's, records without one left out. A stage:
    traces.jsonl; rejected.jsonl has all other samples, each with the reason.
    """
    file = run / "traces.jsonl"
    if file.exists():
        return read_jsonl(file)
    model, tokenizer = load_model(teacher, "", *place), load_tokenizer(teacher)
    judge = load_judge(flags.judge, *place, flags.judge_format, flags.judge_text, flags.slots)
    accepted, rejected = rejection_sample(flags, model, tokenizer, judge, records,
                                          load_policy(flags.policies), run)
    write_jsonl(run / "rejected.jsonl", rejected)
    print(f"{len(accepted)} traces for {len({r.prompt for r in accepted})} of {len(records)} "
          f"prompts; {len(rejected)} samples rejected: "
          f"{dict(Counter(r['reason'] for r in rejected))}")
    if not accepted:
        raise NoTraceAccepted(f"no trace of teacher {teacher} was accepted; the reasons are in "
                              f"{run / 'rejected.jsonl'}")
    write_jsonl(file, accepted)
    return accepted


def rejection_sample(flags: TraceFlags, teacher: CausalLM, tokenizer: Tokenizer, judge: Judge,
                     records: list[Record], policy: Policy, run: Path
                     ) -> tuple[list[Record], list[dict]]:
    """Up to --attempts samples a prompt from the teacher, who sees the policy, until
    --samples_per_prompt different ones are accepted (policies.accept_trace).

    Returns the accepted records, in order, with reasoning and response (the second of a prompt has
    the id ID#2), and every rejected sample: nothing is dropped unseen. Samples are kept in run as
    they come.
    """
    forced = 0.0 if tokenizer.opens_thinking else None  # R1's template opens the block
    accepted: dict[str, list[Record]] = {r.id: [] for r in records}
    rejected, used = [], set(accepted)
    for attempt in range(1, flags.attempts + 1):
        left = [r for r in records if len(accepted[r.id]) < flags.samples_per_prompt]
        if not left:
            break
        sampling = Sampling(flags.max_new_tokens, flags.temperature, flags.top_p,
                            flags.seed + 1000 * attempt)
        messages = [teacher_messages(r.prompt, r.categories, policy) for r in left]
        samples = respond(teacher, tokenizer, left, sampling, flags.slots,
                          f"traces, attempt {attempt}", forced, messages,
                          run / f"attempt-{attempt}.kept")
        for sample, verdict in zip(samples, judge(samples), strict=True):
            record, taken = sample.record, accepted[sample.record.id]
            reason = accept_trace(sample, verdict, is_refusal(sample.answer), policy)
            trace = replace(record, reasoning=sample.reasoning, response=sample.answer)
            if any((t.reasoning, t.response) == (trace.reasoning, trace.response) for t in taken):
                reason = "the same trace again"
            if reason:
                rejected.append(record_to_dict(record)
                                | {"text": sample.text, "attempt": attempt, "reason": reason})
                continue
            names = (f"{record.id}#{i}" for i in count(2))
            name = next(n for n in names if n not in used) if taken else record.id
            used.add(name)
            taken.append(replace(trace, id=name))
    return [trace for r in records for trace in accepted[r.id]], rejected


def join_traces(records: list[Record], traces: list[Record]) -> list[Record]:
    """Every record with the first stored trace of its underlying request (`group`) that is harmful
    or benign as it is; records without one are left out, counted and said. Stored traces are taken
    as they are: they were judged where they were made.
    """
    usable = [t for t in traces if t.reasoning and t.response]
    by_request = {(t.group, t.harmful): t for t in reversed(usable)}
    pairs = [(r, by_request.get((r.group, r.harmful))) for r in records]
    found = [replace(r, reasoning=t.reasoning, response=t.response) for r, t in pairs if t]
    print(f"{len(found)} of {len(records)} prompts have a stored trace; the others are dropped")
    if not found:
        raise UserError("no prompt has a trace: --traces has none of these requests")
    return found

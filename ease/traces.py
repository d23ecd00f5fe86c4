"""Traces "<think> CoT </think> answer": sampled from a teacher and filtered, or taken from a file (paper, phase 1, step 2)."""

from dataclasses import replace

from ease.gate import THINK_OPEN, split_reasoning
from ease.generate import generate
from ease.judge import Judge
from ease.model import CausalLM
from ease.policies import accept_trace, teacher_messages
from ease.records import Record, record_to_dict
from ease.scoring import is_refusal
from ease.tokenizer import Tokenizer


def rejection_sample(teacher: CausalLM, tokenizer: Tokenizer, judge: Judge, records: list[Record], rules: tuple[str, dict[str, str]],
                     attempts: int, max_new_tokens: int, temperature: float, top_p: float, seed: int, slots: int,
                     wanted: int = 1) -> tuple[list[Record], list[dict]]:
    """Up to `attempts` samples a prompt from the teacher, who sees the policy, until `wanted` different ones are accepted.

    rules: (instruction, {category: policy}). Returns the accepted records (in order, with reasoning and response; the second of a
    prompt has the id ID#2) and every rejected sample as {..., "text", "attempt", "reason"}: nothing is dropped unseen.
    """
    opened = THINK_OPEN if tokenizer.opens_thinking else ""  # R1's template opens the block: it belongs to the trace
    accepted: dict[str, list[Record]] = {r.id: [] for r in records}
    rejected: list[dict] = []
    for attempt in range(attempts):
        left = [r for r in records if len(accepted[r.id]) < wanted]
        prompts = [tokenizer.encode_prompt(teacher_messages(r.prompt, r.categories, *rules)) + tokenizer.encode(opened) for r in left]
        samples = generate(teacher, prompts, max_new_tokens, tokenizer.stop_ids, temperature, top_p, seed + attempt, slots=slots,
                           progress=f"traces, attempt {attempt + 1}")
        texts = [opened + tokenizer.decode(s.ids) for s in samples]
        parts = [split_reasoning(t) for t in texts]
        verdicts = judge(left, [answer for _, answer, _ in parts])
        for record, text, (reasoning, answer, _), verdict, s in zip(left, texts, parts, verdicts, samples, strict=True):
            taken = accepted[record.id]
            reason = accept_trace(record, text, verdict, is_refusal(answer), s.finished, rules[1])
            if any((t.reasoning, t.response) == (reasoning, answer) for t in taken):
                reason = "the same trace again"
            if reason is None:
                taken.append(replace(record, id=f"{record.id}#{len(taken) + 1}" if taken else record.id, reasoning=reasoning, response=answer))
            else:
                rejected.append({**record_to_dict(record), "text": text, "attempt": attempt + 1, "reason": reason})
    return [trace for r in records for trace in accepted[r.id]], rejected


def join_traces(records: list[Record], traces: list[Record]) -> list[Record]:
    """Give every record the first stored trace of its underlying request (`group`, else id) that is harmful or benign as it is;
    records without one are left out. Stored traces are taken as they are: they were judged where they were made.
    """
    by_request = {(t.request, t.harmful): t for t in reversed(traces) if t.reasoning and t.response}
    found = [(r, by_request.get((r.request, r.harmful))) for r in records]
    return [replace(r, reasoning=t.reasoning, response=t.response) for r, t in found if t]

"""Traces "<think> CoT </think> answer": sampled from a teacher and filtered, or taken from a file (paper, phase 1, step 2)."""

from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

from ease.method import THINK_OPEN, split_reasoning
from ease.generate import generate
from ease.judge import Judge
from ease.model import CausalLM, KVCache
from ease.policies import BENIGN, accept_trace, category_messages, load_policies, teacher_messages
from ease.records import Record, UserError, record_to_dict, write_jsonl
from ease.run import stage
from ease.scoring import category_agreement, is_refusal
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
    used = set(accepted)  # ids
    for attempt in range(attempts):
        left = [r for r in records if len(accepted[r.id]) < wanted]
        prompts = [tokenizer.encode_prompt(teacher_messages(r.prompt, r.categories, *rules)) + tokenizer.encode(opened) for r in left]
        samples = generate(teacher, prompts, max_new_tokens, tokenizer.stop_ids, temperature, top_p, seed + 1000 * attempt, slots=slots,
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
                name = next(n for i in count(2) if (n := f"{record.id}#{i}") not in used) if taken else record.id
                used.add(name)
                taken.append(replace(record, id=name, reasoning=reasoning, response=answer))
            else:
                rejected.append({**record_to_dict(record), "text": text, "attempt": attempt + 1, "reason": reason})
    return [trace for r in records for trace in accepted[r.id]], rejected


def first_tokens(tokenizer: Tokenizer, word: str) -> set[int]:
    """The ids an answer may begin a word with: its forms that are one token, else the first token of the word itself."""
    forms = [tokenizer.encode(w) for w in (word, word.title(), f" {word}", f" {word.title()}")]
    return {f[0] for f in forms if len(f) == 1} or {forms[0][0]}


@torch.inference_mode()
def yes_probabilities(model: CausalLM, tokenizer: Tokenizer, questions: list[list[dict]]) -> list[float]:
    """P(yes) / (P(yes) + P(no)) as the first token of the answer, for conversations that begin alike: what all share is computed once."""
    words = [first_tokens(tokenizer, word) for word in ("yes", "no")]
    if words[0] & words[1]:
        raise UserError("this teacher's tokenizer begins 'yes' and 'no' with one token: it cannot classify")
    rows = [tokenizer.encode_prompt(q) for q in questions]
    shared = min(next((i for i, column in enumerate(zip(*rows)) if len(set(column)) > 1), min(map(len, rows))), min(map(len, rows)) - 1)
    n, T, device = len(rows), max(map(len, rows)) - shared, model.device
    cache = KVCache(model.config, n, shared + T, next(model.parameters()).dtype, device)
    if shared:
        positions = torch.arange(shared, device=device)[None]
        model.hidden(torch.tensor([rows[0][:shared]], device=device), cache, 0, positions, span=shared)
        for slot in range(1, n):
            cache.move(0, slot)
    ids = torch.tensor([r[shared:] + [0] * (shared + T - len(r)) for r in rows], device=device)  # (n, T)
    positions = torch.arange(shared, shared + T, device=device).expand(n, T)
    hidden = model.hidden(ids, cache, 0, positions, span=shared + T)  # (n, T, D)
    p = model.logits(hidden[range(n), [len(r) - shared - 1 for r in rows]]).float().softmax(-1)  # (n, V)
    yes, no = (p[:, sorted(w)].sum(-1) for w in words)
    return (yes / (yes + no)).tolist()


def classify(teacher: CausalLM, tokenizer: Tokenizer, records: list[Record], categories: tuple[str, ...]) -> list[Record]:
    """Records with the teacher's categories: all whose P(yes) exceeds P(no), "benign" if none does (paper, phase 1, step 1). Where
    records carry categories already, the agreement is printed.
    """
    if not categories:
        raise UserError("the policy file has no category but benign: there is nothing to classify")
    out = []
    for r in tqdm(records, desc="categories"):
        p = yes_probabilities(teacher, tokenizer, [category_messages(r.prompt, c) for c in categories])
        out.append(replace(r, categories=tuple(c for c, yes in zip(categories, p) if yes > 0.5) or (BENIGN,)))
    if labelled := [(new.categories, old.categories) for new, old in zip(out, records) if old.categories]:
        a = category_agreement(*map(list, zip(*labelled)))
        print(f"the teacher's categories against the {a['n']} labelled rows: accuracy {a['accuracy']:.3f}, micro F1 {a['f1']:.3f}")
    return out


def check_categories(records: list[Record]) -> None:
    """An error for a harmful record without categories: the teacher would be shown the policy of harmless requests."""
    for r in records:
        if r.harmful and not r.categories:
            raise UserError(f"row {r.id!r} is harmful and has no categories: the teacher would be shown that nothing is restricted; --categories teacher asks it")


def teacher_traces(cfg, run: Path, teacher: CausalLM, tokenizer: Tokenizer, judge: Judge, records: list[Record]) -> list[Record]:
    """Both steps with the flags of a script (its Config): categories, from the records or the teacher; then the accepted traces.
    Leaves categories.jsonl (asked of the teacher) and rejected.jsonl.
    """
    rules = load_policies(cfg.policies)
    if cfg.categories == "teacher":
        names = tuple(c for c in rules[1] if c != BENIGN)
        records = stage(run / "categories.jsonl", lambda: classify(teacher, tokenizer, records, names))
    accepted, rejected = rejection_sample(teacher, tokenizer, judge, records, rules, cfg.attempts, cfg.max_new_tokens, cfg.temperature,
                                          cfg.top_p, cfg.seed, cfg.slots, cfg.samples_per_prompt)
    write_jsonl(run / "rejected.jsonl", rejected)
    print(f"{len(accepted)} traces for {len({r.prompt for r in accepted})} of {len(records)} prompts; {len(rejected)} samples rejected: "
          f"{dict(Counter(r['reason'] for r in rejected))}")
    if not accepted:
        raise UserError(f"no trace of teacher {cfg.teacher} was accepted; the reasons are in {run / 'rejected.jsonl'}")
    return accepted


def join_traces(records: list[Record], traces: list[Record]) -> list[Record]:
    """Give every record the first stored trace of its underlying request (`group`, else id) that is harmful or benign as it is;
    records without one are left out. Stored traces are taken as they are: they were judged where they were made.
    """
    by_request = {(t.request, t.harmful): t for t in reversed(traces) if t.reasoning and t.response}
    found = [(r, by_request.get((r.request, r.harmful))) for r in records]
    return [replace(r, reasoning=t.reasoning, response=t.response) for r, t in found if t]

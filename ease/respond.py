"""Prompts -> Responses: how the probe, the teachers and the evaluation ask a model."""

import json
from bisect import bisect_left
from dataclasses import replace
from pathlib import Path

from ease.generate import Generation, Sampling, stream
from ease.method import THINK_CLOSE, THINK_OPEN, split_reasoning
from ease.model import CausalLM
from ease.records import (ABSENT, UNCLOSED, Record, Response, put, read_responses,
                          response_to_dict, write_text)
from ease.tokenizer import Tokenizer


def respond(model: CausalLM, tokenizer: Tokenizer, records: list[Record], sampling: Sampling,
            slots: int = 64, progress: str = "", gate_threshold: float | None = None,
            messages: list[list[dict]] | None = None, kept: Path | None = None,
            forced: list[list[int]] | None = None) -> list[Response]:
    """A response to every record's prompt, with its gate, in order; nothing is judged yet. Sampled
    rows depend on (seed, record id).

    gate_threshold: as in generate. 0 forces the open marker: so a teacher whose template opens the
    block (tokenizer.opens_thinking) reasons, and its text begins with the marker like any other's.
    messages: a conversation a record instead of the plain user turn: a teacher sees its policy.
    kept: every response is added to this file as it ends, and what the file holds is not generated
    again: so a run that was stopped goes on.
    forced: ids that are written behind each prompt and belong to no response; no gate then.
    """
    found = {r.record.id: r for r in (read_responses(kept) if kept and cut(kept) else [])}
    places = [i for i, r in enumerate(records) if r.id not in found]
    prompts = [(tokenizer.encode_prompt(messages[i]) if messages else
                tokenizer.user_prompt(records[i].prompt)) + (forced[i] if forced else [])
               for i in places]
    marker = [] if forced else tokenizer.encode(THINK_OPEN)
    generations = stream(model, prompts, sampling, tokenizer.stop_ids,
                         [records[i].id for i in places], marker, slots, progress, gate_threshold)
    for i, g in generations:
        response = as_response(tokenizer, records[places[i]], g, marker)
        found[response.record.id] = response
        if kept:
            put(kept, json.dumps(response_to_dict(response), ensure_ascii=False) + "\n")
    return [replace(found[r.id], record=r) for r in records]  # a file holds no categories


def cut(file: Path) -> bool:
    """Whether a stopped run has left lines in `file`. The last may be half a line: it is cut off.
    """
    whole = file.read_bytes().rpartition(b"\n")[0] if file.exists() else b""
    write_text(file, whole.decode() + "\n" if whole else "")
    return bool(whole)


def as_response(tokenizer: Tokenizer, record: Record, found: Generation, marker: list[int]
                ) -> Response:
    """What was generated, decoded and taken apart."""
    text = tokenizer.decode(found.ids)
    reasoning, answer, state = split_reasoning(text)
    return Response(record, text, reasoning, answer, state, found.finished,
                    bool(marker) and found.ids[: len(marker)] == marker, found.gate,
                    count_tokens(tokenizer, found, text, state), found.seconds)


def count_tokens(tokenizer: Tokenizer, found: Generation, text: str, state: str) -> dict[str, int]:
    """Generated tokens, the end token among them: {"reasoning", "answer", "total"}.

    reasoning: everything up to the close marker and the white space behind it; a token that holds
    some of the answer belongs to the answer. An unclosed block is all reasoning. Counted on the
    ids as generated: the text encoded again may have another number of tokens.
    """
    total = len(found.ids) + found.finished
    if state in (ABSENT, UNCLOSED):
        reasoning = 0 if state == ABSENT else total
    else:
        close = text.index(THINK_CLOSE.strip()) + len(THINK_CLOSE.strip())

        def answers(n: int) -> bool:  # whether the first n tokens hold some of the answer
            return bool(tokenizer.decode(found.ids[:n])[close:].strip())

        reasoning = bisect_left(range(len(found.ids) + 1), True, key=answers) - 1
    return {"reasoning": reasoning, "answer": total - reasoning, "total": total}

"""Prompts -> Responses: how the probe, the teachers and the evaluation ask a model."""

from bisect import bisect_left

from ease.generate import Generation, Sampling, generate
from ease.method import THINK_CLOSE, THINK_OPEN, split_reasoning
from ease.model import CausalLM
from ease.records import ABSENT, UNCLOSED, Record, Response
from ease.tokenizer import Tokenizer


def respond(model: CausalLM, tokenizer: Tokenizer, records: list[Record], sampling: Sampling,
            slots: int = 64, progress: str = "", gate_threshold: float | None = None,
            messages: list[list[dict]] | None = None) -> list[Response]:
    """A response to every record's prompt, with its gate, in order; nothing is judged yet. Sampled
    rows depend on (seed, record id).

    gate_threshold: as in generate. 0 forces the open marker: so a teacher whose template opens the
    block (tokenizer.opens_thinking) reasons, and its text begins with the marker like any other's.
    messages: a conversation a record instead of the plain user turn: a teacher sees its policy.
    """
    prompts = ([tokenizer.user_prompt(r.prompt) for r in records] if messages is None
               else list(map(tokenizer.encode_prompt, messages)))
    marker = tokenizer.encode(THINK_OPEN)
    found = generate(model, prompts, sampling, tokenizer.stop_ids, [r.id for r in records], marker,
                     slots, progress, gate_threshold)
    out = []
    for record, g in zip(records, found, strict=True):
        text = tokenizer.decode(g.ids)
        reasoning, answer, state = split_reasoning(text)
        out.append(Response(record, text, reasoning, answer, state, g.finished,
                            g.ids[: len(marker)] == marker, g.gate,
                            count_tokens(tokenizer, g, text, state), g.seconds))
    return out


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

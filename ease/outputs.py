"""Responses of another engine: JSON Lines, or `vllm run-batch`'s."""

from ease.generate import Generation
from ease.method import THINK_CLOSE, THINK_OPEN, split_reasoning
from ease.records import Record, Response, UserError, check_text, read_lines
from ease.respond import count_tokens
from ease.tokenizer import Tokenizer


def read_outputs(file: str, records: list[Record], tokenizer: Tokenizer) -> list[Response]:
    """The response to every record, in order. Lines are joined by `custom_id` or `id` (with or
    without the prompts file's name), else by `prompt`; none or two for a record is an error.

    tokens: of the text ENCODED by this tokenizer, and an end token if finished: the ids as
    generated are not known, nor is the gate.
    """
    lines, used, found, missing = {}, {}, [], []
    for where, row in read_lines(file):
        name = next((n for n in ("custom_id", "id", "prompt") if row.get(n) is not None), None)
        if not name:
            raise UserError(f"{where}: neither custom_id, id nor prompt")
        key = name == "prompt", str(row[name])
        if key in lines:
            raise UserError(f"{where}: this {name} stands at {lines[key][0]} too")
        lines[key] = where, row
    for record in records:
        keys = (False, record.id), (False, record.id.partition("/")[2]), (True, record.prompt)
        key = next((k for k in keys if k in lines), None)
        if not key:
            missing.append(record.id)
            continue
        where, row = lines[key]
        for prompt in (row.get("prompt"), used.setdefault(key, record.prompt)):
            if prompt not in (None, record.prompt):
                raise UserError(f"{where}: its id has several prompts, that of {record.id!r} too")
        text, finished = output_text(row, where)
        parts, made = split_reasoning(text), Generation(tokenizer.encode(text), finished)
        found.append(Response(record, text, *parts, finished, text.startswith(THINK_OPEN),
                              tokens=count_tokens(tokenizer, made, text, parts[2])))
    if missing:
        raise UserError(f"{file}: {len(missing)} of {len(records)} records have no response, first "
                        f"{missing[0]!r}")
    print(f"{file}: {len(found)} responses, {sum(not r.finished for r in found)} cut by length; "
          f"{len(lines) - len(used)} other lines left out")
    return found


def output_text(row: dict, where: str) -> tuple[str, bool]:
    """(text, finished) of a line: `response` is the text, or has a body with one choice. Finished
    unless finish_reason is "length". A failed request is an error.

    Reasoning that the server split off becomes a think block again; without content an open one
    (closed or not: unknown).
    """
    match row.get("error"), row.get("response"):
        case None, {"status_code": 200, "body": {"choices": [{"message": dict(said)} as choice]}}:
            text, reasoning = (check_text(value, "message", where) for value in (
                said.get("content"), said.get("reasoning_content") or said.get("reasoning")))
            if reasoning:
                closed = THINK_CLOSE + text.lstrip() if text.strip() else ""
                text = THINK_OPEN + reasoning.strip() + closed
        case None, str(text):
            text, choice = check_text(text, "response", where), row
        case error, response:
            raise UserError(f"{where}: the request failed, or has not one choice: "
                            f"{str(error or response)[:200]!r}")
    return text, choice.get("finish_reason") != "length"

"""Records -> ids and roles -> batches. Text and mask are born together; the only shift by one is in collate."""

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ease.method import ANSWER, GATE, REASONING, THINK_CLOSE, THINK_OPEN, response_pieces
from ease.records import Record, UserError
from ease.tokenizer import Tokenizer

ROLE_NAMES = {0: "prompt", GATE: "gate", REASONING: "reasoning", ANSWER: "answer"}


@dataclass(frozen=True)
class Example:
    """One encoded record. Per token: its id, its role (0 = prompt, no loss), and whether it belongs to the trace's own text
    (reasoning and answer without markers and end token), the part that a teacher with the same vocabulary encodes alike.
    """

    id: str
    ids: list[int]
    roles: list[int]
    body: list[int]

    @property
    def supervised(self) -> int:
        """How many tokens carry loss."""
        return sum(role > 0 for role in self.roles)


def encode_record(tokenizer: Tokenizer, record: Record, messages: list[dict] | None = None) -> Example:
    """Prompt (template) + response pieces + end token, with roles. `messages` replaces the plain user turn (a teacher's view).

    The gate is every token of the open marker on a reasoning row, the first response token on a direct row.
    """
    ids = tokenizer.encode_prompt(messages or [{"role": "user", "content": record.prompt}])
    roles, body = [0] * len(ids), [0] * len(ids)
    for text, role in response_pieces(record):
        piece = tokenizer.encode(text)
        ids, roles = ids + piece, roles + [role] * len(piece)
        body += [int(text not in (THINK_OPEN, THINK_CLOSE))] * len(piece)
    ids, roles, body = ids + [tokenizer.end_id], roles + [ANSWER], body + [0]
    if not record.reasoning:
        roles[roles.index(ANSWER)] = GATE
    return Example(record.id, ids, roles, body)


def encode_records(tokenizer: Tokenizer, records: list[Record], max_length: int) -> list[Example]:
    """Encode all; rows longer than max_length are dropped whole, counted and said: cutting would lose the end token."""
    examples = [encode_record(tokenizer, r) for r in records]
    kept = [e for e in examples if len(e.ids) <= max_length]
    if len(kept) < len(examples):
        print(f"dropped {len(examples) - len(kept)} of {len(examples)} rows longer than --max_length {max_length}")
    if not kept:
        shortest = min((len(e.ids) for e in examples), default=0)
        raise UserError(f"all {len(examples)} rows are longer than --max_length {max_length} (the shortest has {shortest} tokens)")
    return kept


def batches(lengths: list[int], batch_size: int, batch_tokens: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """One epoch: optimizer steps -> micro-batches -> indices. A function of (seed, epoch) alone, so a resumed run sees the
    same batches.

    Each step takes the next batch_size rows of a permutation; within the step, rows of like length share a micro-batch of at
    most batch_tokens padded tokens (a longer row stands alone). Sums divided once make the cut into micro-batches irrelevant.
    """
    order = list(range(len(lengths)))
    random.Random(f"batches {seed} {epoch}").shuffle(order)
    steps = []
    for start in range(0, len(order), batch_size):
        micro: list[list[int]] = []
        for i in sorted(order[start : start + batch_size], key=lambda i: (lengths[i], i)):  # ascending: i is the longest so far
            if micro and (len(micro[-1]) + 1) * lengths[i] <= batch_tokens:
                micro[-1].append(i)
            else:
                micro.append([i])
        steps.append(micro)
    return steps


class Batch(NamedTuple):
    """Right-padded tensors, each (B, T): position t of `inputs` predicts `targets`, whose role and body mark stand beside."""

    inputs: Tensor
    targets: Tensor
    roles: Tensor
    body: Tensor


def collate(examples: list[Example], device: torch.device | str) -> Batch:
    """Examples -> one Batch. Position t predicts token t + 1; padding gets id 0 and role 0, so no loss sees it."""
    T = max(len(e.ids) for e in examples) - 1

    def padded(rows: list[list[int]]) -> Tensor:
        return torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)  # (B, T)

    return Batch(padded([e.ids[:-1] for e in examples]), padded([e.ids[1:] for e in examples]),
                 padded([e.roles[1:] for e in examples]), padded([e.body[1:] for e in examples]))


def preview(tokenizer: Tokenizer, example: Example) -> str:
    """An encoded row for human eyes: one line a run of tokens with one role, tokens cut apart by "|"."""
    lines, start = [f"id {example.id}, {len(example.ids)} tokens, {example.supervised} supervised"], 0
    for i in range(1, len(example.ids) + 1):
        if i == len(example.ids) or example.roles[i] != example.roles[start]:
            tokens = "|".join(tokenizer.decode([t]) for t in example.ids[start:i]).replace("\n", "\\n")
            lines.append(f"  {ROLE_NAMES[example.roles[start]]:9} {tokens}")
            start = i
    return "\n".join(lines) + "\n"

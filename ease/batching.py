"""Records -> ids and roles -> batches (and the loss on those held out). Text and roles are born
together; the only shift by one is in collate.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ease.losses import cross_entropy, in_chunks
from ease.method import ANSWER, GATE, REASONING, ROLES, THINK_CLOSE, THINK_OPEN, response_pieces
from ease.model import CausalLM
from ease.records import Record, UserError, write_jsonl, write_text
from ease.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """An encoded record. Per token: its id; its role (0 = prompt, no loss); and 1 where the
    teacher-trace KL is taken: on the trace's own text, reasoning and answer without markers and
    end token, which a teacher with the same vocabulary encodes alike.
    """

    id: str
    ids: list[int]
    roles: list[int]
    kl: list[int]

    @property
    def supervised(self) -> int:
        """How many tokens carry loss."""
        return sum(role > 0 for role in self.roles)


def encode_record(tokenizer: Tokenizer, record: Record, messages: list[dict] | None = None
                  ) -> Example:
    """Prompt (chat template), response pieces, end token, with roles. messages: the prompt as a
    teacher sees it, instead of the plain user turn.

    The gate is every token of the open marker on a reasoning row, the first response token on a
    direct row.
    """
    prompt = tokenizer.encode_prompt(messages) if messages else tokenizer.user_prompt(record.prompt)
    ids, roles, kl = list(prompt), [0] * len(prompt), [0] * len(prompt)
    for text, role in response_pieces(record):
        piece = tokenizer.encode(text)
        ids += piece
        roles += [role] * len(piece)
        kl += [int(text not in (THINK_OPEN, THINK_CLOSE))] * len(piece)
    ids, roles, kl = ids + [tokenizer.end_id], roles + [ANSWER], kl + [0]
    if not record.reasoning:
        roles[len(prompt)] = GATE
    return Example(record.id, ids, roles, kl)


def encode_records(tokenizer: Tokenizer, records: list[Record], max_length: int, context: int,
                   file: Path | None = None) -> list[Example]:
    """Encode all. Rows longer than max_length or the model's context are dropped whole, counted
    and said: cutting would lose the end token. The records kept are written to `file`.
    """
    if not records:
        raise UserError("there is nothing to train on: no record is left")
    examples = [encode_record(tokenizer, r) for r in records]
    limit = min(max_length, context)
    name = (f"--max_length {max_length}" if max_length <= context
            else f"the model's context of {context} tokens")
    kept = [e for e in examples if len(e.ids) <= limit]
    if not kept:
        shortest = min(len(e.ids) for e in examples)
        raise UserError(f"all {len(examples)} rows are longer than {name} (the shortest has "
                        f"{shortest} tokens)")
    if len(kept) < len(examples):
        print(f"dropped {len(examples) - len(kept)} of {len(examples)} rows longer than {name}")
    if file:
        write_jsonl(file, [r for r, e in zip(records, examples) if len(e.ids) <= limit])
    return kept


def encode_data(run: Path, tokenizer: Tokenizer, records: list[Record], held_out: list[Record],
                *limits: int) -> tuple[list[Example], list[Example]]:
    """encode_records of what is trained on and held out, with their files; preview.txt: a row with
    reasoning and one without.
    """
    examples = encode_records(tokenizer, records, *limits, run / "trained_on.jsonl")
    shown = {REASONING in e.roles: e for e in reversed(examples)}
    write_text(run / "preview.txt", "\n".join(preview(tokenizer, e) for e in shown.values()))
    return examples, held_out and encode_records(tokenizer, held_out, *limits,
                                                 run / "held_out.jsonl")


def plan_batches(lengths: list[int], batch_size: int, batch_tokens: int, seed: int, steps: int
                 ) -> list[list[list[int]]]:
    """All batches of a run: optimizer steps -> micro-batches -> indices. A function of its
    arguments alone, so a resumed run sees the same ones.

    A step takes the next batch_size rows of the epoch's permutation (the last of an epoch what is
    left), in micro-batches of at most batch_tokens tokens; a longer row stands alone.
    """
    plan, epoch = [], 0
    while len(plan) < steps:
        order = list(range(len(lengths)))
        random.Random(f"batches {seed} {epoch}").shuffle(order)
        for start in range(0, len(order), batch_size):
            step, tokens = [], math.inf
            for i in order[start : start + batch_size]:
                tokens += lengths[i]
                if tokens > batch_tokens:
                    step.append([])
                    tokens = lengths[i]
                step[-1].append(i)
            plan.append(step)
        epoch += 1
    return plan[:steps]


def count_steps(rows: int, batch_size: int, steps: int, epochs: float) -> int:
    """--steps where it is given, else --epochs in optimizer steps, at least one."""
    return steps or max(1, round(epochs * -(-rows // batch_size)))


class Batch(NamedTuple):
    """Rows of `lengths` tokens one behind the other, all (N,): `inputs` at a place predicts
    `targets`, whose role and KL mark stand beside.
    """

    inputs: Tensor
    targets: Tensor
    roles: Tensor
    kl: Tensor
    lengths: list[int]


def collate(examples: list[Example], device: torch.device | str) -> Batch:
    """Examples -> one Batch, without padding. Token t predicts token t + 1 of its own row."""
    def joined(columns: Iterable[list[int]]) -> Tensor:
        return torch.tensor([x for column in columns for x in column], device=device)  # (N,)

    return Batch(joined(e.ids[:-1] for e in examples), joined(e.ids[1:] for e in examples),
                 joined(e.roles[1:] for e in examples), joined(e.kl[1:] for e in examples),
                 [len(e.ids) - 1 for e in examples])


@torch.no_grad()
def held_out_loss(model: CausalLM, examples: list[Example], device: str) -> dict[str, float | None]:
    """Mean cross-entropy a token, in nats, over the tokens of each role; None for one without."""
    sums, counts = torch.zeros(4, device=device), Counter()
    for e in examples:
        batch = collate([e], device)
        hidden = model.hidden(batch.inputs, batch.lengths)  # (T, D)
        losses = in_chunks(lambda h, y: cross_entropy(model.logits(h), y), hidden, batch.targets)
        sums.index_add_(0, batch.roles, losses)  # (T,): the prompt's are in sums[0]
        counts.update(e.roles)
    return {f"held_out_{name}": sums[role].item() / counts[role] if counts[role] else None
            for name, role in ROLES.items()}


def preview(tokenizer: Tokenizer, example: Example) -> str:
    """An example for human eyes: a line for every run of tokens of one role, cut apart by "|"."""
    lines = [f"id {example.id}, {len(example.ids)} tokens, {example.supervised} supervised"]
    start = 0
    for i in range(1, len(example.ids) + 1):
        if i == len(example.ids) or example.roles[i] != example.roles[start]:
            tokens = "|".join(tokenizer.decode([t]) for t in example.ids[start:i])
            name = ["prompt", *ROLES][example.roles[start]]
            lines.append(f"  {name:9} {tokens}".replace("\n", "\\n"))
            start = i
    return "\n".join(lines) + "\n"

"""The teacher's side of the KL (our addition to phase 1): the same trace tokens in another context, live or from a cache."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ease.batching import Example, collate, encode_record
from ease.losses import kl_divergence_sum, topk_kl_sum, topk_log_probabilities
from ease.model import CausalLM
from ease.policies import teacher_messages
from ease.records import Record, UserError
from ease.tokenizer import Tokenizer, shared_vocabulary


def teacher_view(teacher: Tokenizer, records: dict[str, Record], examples: list[Example], rules: tuple[str, dict[str, str]]) -> list[Example]:
    """The examples' traces in the teacher's context (q, policy of c). Reasoning and answer must be the same ids on both sides;
    markers and end token may differ: they carry no KL.
    """
    out = []
    for e in examples:
        r = records[e.id]
        view = encode_record(teacher, r, teacher_messages(r.prompt, r.categories, *rules))
        own, theirs = ([i for i, b in zip(x.ids, x.body) if b] for x in (e, view))
        if own != theirs:
            raise UserError(f"the tokenizers of --model and --teacher differ (row {e.id}): no KL is defined; use --kl_weight 0")
        out.append(view)
    return out


def shared_ids(own: Tokenizer, theirs: Tokenizer, model: CausalLM, teacher: CausalLM, device: str) -> Tensor | None:
    """The ids over which the KL is taken, None for all. Added tokens and rows without a token may differ (R1-Distill-Qwen has
    Qwen2.5's ordinary vocabulary, but other turn and end tokens).
    """
    rows = {m.config.vocab_size for m in (model, teacher)}
    ids = [i for i in shared_vocabulary(own, theirs) if i < min(rows)]
    if rows == {len(ids)}:
        return None
    print(f"KL over the {len(ids)} ids that mean the same token in both vocabularies ({' and '.join(map(str, sorted(rows)))} rows)")
    return torch.tensor(ids, device=device)


class TeacherSide(NamedTuple):
    """What the loop needs of the teacher."""

    rows: Callable  # indices of examples -> tensors (N, ...): the teacher at the N tokens of their traces, in order
    kl: Callable  # (student hidden states (N, D), *rows) -> the KL sum over them


def in_memory(model: CausalLM, teacher: CausalLM, views: list[Example], shared: Tensor | None, tau: float, device: str) -> TeacherSide:
    """The teacher runs beside the student; its head is applied chunk by chunk, with the student's."""

    @torch.no_grad()
    def rows(indices: list[int]) -> tuple[Tensor]:
        batch = collate([views[i] for i in indices], device)
        return (teacher.hidden(batch.inputs)[batch.body > 0],)  # (N, D_t)

    return TeacherSide(rows, lambda h, z: kl_divergence_sum(teacher.logits(z), model.logits(h), tau, shared))


def from_cache(file: Path, source: TeacherSide, teacher: CausalLM, model: CausalLM, n: int, k: int, shared: Tensor | None, tau: float,
               device: str) -> TeacherSide:
    """The teacher's k likeliest tokens and their tail at every token of the n traces, kept in a file that is made once: the
    teacher can then leave the memory. A file made with another tau or k is an error.
    """

    def cut(logits: Tensor) -> Tensor:
        return logits if shared is None else logits[:, shared]

    if not file.exists():
        kept = []
        with torch.no_grad():
            for i in tqdm(range(n), desc="teacher's top-k"):
                parts = [cut(teacher.logits(z)) for z in source.rows([i])[0].split(1024)]  # (<= 1024, V) each
                parts = [topk_log_probabilities(z, min(k, z.shape[-1]), tau) for z in parts]
                kept.append([torch.cat(column).cpu() for column in zip(*parts)])
        log_p, ids = (torch.cat(column) for column in zip(*kept))
        save_file({"log_p": log_p, "ids": ids.int(), "counts": torch.tensor([len(p) for p, _ in kept])}, f"{file}.part",
                  metadata={"tau": str(tau), "k": str(k)})
        os.replace(f"{file}.part", file)
    with safe_open(file, framework="pt") as f:
        if (made := f.metadata()) != {"tau": str(tau), "k": str(k)}:
            raise UserError(f"{file} was made with --kl_temperature {made['tau']} and --cache_topk {made['k']}; delete it")
        counts = f.get_tensor("counts").tolist()
        log_p, ids = f.get_tensor("log_p").split(counts), f.get_tensor("ids").split(counts)

    def rows(indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.cat([log_p[i] for i in indices]).to(device), torch.cat([ids[i] for i in indices]).long().to(device)

    return TeacherSide(rows, lambda h, p, i: topk_kl_sum(p, i, cut(model.logits(h)), tau))

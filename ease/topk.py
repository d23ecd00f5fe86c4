"""An extra: the teacher's top-k log-probabilities in a file, so that it can leave the memory."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from ease.lora import save_tensors
from ease.losses import in_chunks, topk_kl, topk_log_probabilities
from ease.model import CausalLM
from ease.ranks import RANK, wait_for
from ease.records import UserError
from ease.teacher import Teacher


@dataclass
class CachedTeacher:
    """What a file keeps of the teacher: its k likeliest tokens and one tail at every token."""

    log_p: list[Tensor]  # (N, k + 1) a trace
    ids: list[Tensor]  # (N, k) a trace
    shared: Tensor | None
    tau: float

    def kl(self, student: CausalLM, hidden: Tensor, indices: list[int]) -> Tensor:
        """losses.topk_kl (N,) at the N tokens of some traces; `hidden` (N, D) is the student's."""
        def loss(h: Tensor, log_p: Tensor, ids: Tensor) -> Tensor:
            return topk_kl(log_p, ids, cut(student.logits(h), self.shared), self.tau)

        log_p, ids = (torch.cat([kept[i] for i in indices]).to(hidden.device)
                      for kept in (self.log_p, self.ids))
        return in_chunks(loss, hidden, log_p, ids.long())


def cut(logits: Tensor, shared: Tensor | None) -> Tensor:
    """(N, V) -> (N, S)."""
    return logits if shared is None else logits[:, shared]


def cache_teacher(file: Path, teacher: Teacher, k: int) -> CachedTeacher:
    """The cache of a teacher, made once. A file made with another tau or k is an error."""
    made = {"tau": str(teacher.tau), "k": str(k)}
    if RANK:
        wait_for(file)
    if not file.exists():
        kept = [top_k(teacher, i, k) for i in tqdm(range(len(teacher.examples)), desc="top-k")]
        log_p, ids = (torch.cat(column) for column in zip(*kept))
        counts = torch.tensor([len(p) for p, _ in kept])
        tensors = {"log_p": log_p, "ids": ids.int(), "counts": counts}
        save_tensors(tensors, file, **made)
    with safe_open(file, framework="pt") as f:
        if (found := f.metadata()) != made:
            raise UserError(f"{file} was made with --kl_temperature {found['tau']} and "
                            f"--cache_topk {found['k']}; delete it")
        counts = f.get_tensor("counts").tolist()
        log_p, ids = (list(f.get_tensor(name).split(counts)) for name in ("log_p", "ids"))
    return CachedTeacher(log_p, ids, teacher.shared, teacher.tau)


@torch.no_grad()
def top_k(teacher: Teacher, index: int, k: int) -> tuple[Tensor, Tensor]:
    """losses.topk_log_probabilities at the tokens of one trace: (N, k + 1) and (N, k)."""
    found = []
    for z in teacher.hidden([index]).split(1024):  # (<= 1024, D_t): the logits are large
        logits = cut(teacher.model.logits(z), teacher.shared)
        found.append(topk_log_probabilities(logits, min(k, logits.shape[-1]), teacher.tau))
    log_p, ids = (torch.cat(column).cpu() for column in zip(*found))
    return log_p, ids

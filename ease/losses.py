"""The equations of training. Logits are (N, V) at N supervised positions; every function computes in fp32 and returns a SUM.

The loop divides once per optimizer step by the step's own count, so that micro-batches of any size weigh every token alike.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """sum_t -log softmax(s_t)[y_t]. logits (N, V), targets (N,) -> scalar. The paper's SFT objective, both phases."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def kl_divergence_sum(teacher_logits: Tensor, student_logits: Tensor, tau: float = 1.0, shared: Tensor | None = None) -> Tensor:
    """Teacher-trace KL: tau^2 * sum_t KL( softmax(z_t / tau) || softmax(s_t / tau) ). (N, V_t), (N, V_s) -> scalar.

    z_t: teacher logits in context (q, policy); s_t: student logits in context q, at the same response token. shared (S,): the
    ids that mean the same token on both sides (tokenizer.shared_vocabulary); both sides are cut to them before the softmax,
    which so renormalises. None: all do, V_t = V_s. tau^2 keeps the size of the gradient independent of tau
    (arXiv 1503.02531). The teacher gets no gradient. Our addition to the paper's phase 1.
    """
    if shared is not None:
        teacher_logits, student_logits = teacher_logits[:, shared], student_logits[:, shared]  # (N, S)
    log_p = F.log_softmax(teacher_logits.detach().float() / tau, dim=-1)
    log_q = F.log_softmax(student_logits.float() / tau, dim=-1)
    return tau**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def topk_log_probabilities(logits: Tensor, k: int, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """What a cache keeps of softmax(z / tau), logits (N, V): log-probabilities (N, k + 1) of the k likeliest tokens and, last, of
    all others together (-inf if k = V); and the tokens' ids (N, k).
    """
    log_p = F.log_softmax(logits.float() / tau, dim=-1)  # (N, V)
    top, ids = log_p.topk(k, dim=-1)
    tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)  # (N, 1)
    return torch.cat((top, tail), dim=-1), ids


def topk_kl_sum(log_p: Tensor, ids: Tensor, student_logits: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 * sum_t KL over k + 1 classes, the teacher's k likeliest tokens and ONE tail with all others (without it this would be
    no divergence). log_p (N, k + 1), ids (N, k) as topk_log_probabilities gives them, made with the same tau.

    A lower bound of kl_divergence_sum (data processing inequality), rising with k, equal at k = V.
    """
    log_q = F.log_softmax(student_logits.float() / tau, dim=-1)  # (N, V)
    of_ids = log_q.gather(-1, ids)
    total = (log_p[:, :-1].exp() * (log_p[:, :-1] - of_ids)).sum()
    if ids.shape[-1] < log_q.shape[-1]:  # else there is no tail, and its logarithm has no gradient
        tail = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)  # (N,)
        total = total + (log_p[:, -1].exp() * (log_p[:, -1] - tail)).sum()
    return tau**2 * total


def gated_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gated-reasoning cross-entropy (phase 2): (sum_t w_t CE_t, sum_t w_t). logits (N, V); targets, weights (N,).

    w_t = w(role of t) for the roles gate, reasoning, answer. All weights 1 is plain SFT, the paper's objective.
    """
    weights = weights.float()
    return (weights * F.cross_entropy(logits.float(), targets, reduction="none")).sum(), weights.sum()


def sum_over_chunks(loss: Callable[..., Tensor], *rows: Tensor, chunk: int = 1024) -> Tensor:
    """sum over chunks of `loss(*rows[a:b])`, each chunk recomputed in the backward pass.

    For a loss that contains the head, hidden states (N, D) -> logits (N, V): only one chunk's logits exist at a time.
    """
    if len(rows[0]) <= chunk:
        return loss(*rows)
    parts = zip(*(r.split(chunk) for r in rows))
    return torch.stack([checkpoint(loss, *part, use_reentrant=False) for part in parts]).sum()

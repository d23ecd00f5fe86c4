"""The equations of training: logits (N, V) at N supervised positions -> a value a token (N,), fp32.

The loop weighs, sums, and divides once by the count of the whole optimizer step, so that
micro-batches of any size weigh every token alike.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # positions whose logits exist at a time


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """CE_t = -log softmax(s_t)[y_t]. logits (N, V), targets (N,) -> (N,). The paper's SFT
    objective, both phases.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")


def gated_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Gated-reasoning cross-entropy (phase 2): w_t CE_t, w_t the weight of token t's role (gate,
    reasoning, answer). logits (N, V); targets, weights (N,) -> (N,), neither summed nor divided:
    the step's loss is sum_t w_t CE_t / sum_t w_t. All weights 1 is plain SFT, the paper's
    objective.
    """
    return weights * cross_entropy(logits, targets)


def kl_divergence(teacher_logits: Tensor, student_logits: Tensor, tau: float = 1.0,
                  shared: Tensor | None = None) -> Tensor:
    """Teacher-trace KL: tau^2 KL( softmax(z_t / tau) || softmax(s_t / tau) ). (N, V_t), (N, V_s)
    -> (N,). Our addition to the paper's phase 1.

    z_t: teacher logits in context (q, policy), s_t: student logits in context q, at the same
    response token. shared (S,): the ids that mean the same token on both sides; both are cut to
    them before the softmax, which so renormalises. None: all do, V_t = V_s. tau^2 keeps the size
    of the gradient independent of tau (arXiv 1503.02531). The teacher gets no gradient.
    """
    if shared is not None:
        teacher_logits, student_logits = teacher_logits[:, shared], student_logits[:, shared]
    log_p = F.log_softmax(teacher_logits.detach().float() / tau, dim=-1)  # (N, S)
    log_q = F.log_softmax(student_logits.float() / tau, dim=-1)  # (N, S)
    return tau**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def with_rest(logits: Tensor, ids: Tensor, tau: float = 1.0) -> Tensor:
    """log softmax(z / tau), logits (N, V), cut to (N, k + 1): the tokens ids (N, k) and, last, all
    others together (-inf if k = V).
    """
    log_p = F.log_softmax(logits.float() / tau, dim=-1)  # (N, V)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)  # (N, 1)
    return torch.cat((log_p.gather(-1, ids), rest), dim=-1)


def topk_log_probabilities(logits: Tensor, k: int, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """What a cache keeps: with_rest (N, k + 1) of the k likeliest tokens, and their ids (N, k)."""
    ids = logits.topk(k, dim=-1).indices
    return with_rest(logits, ids, tau), ids


def topk_kl(log_p: Tensor, ids: Tensor, student_logits: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 KL over k + 1 classes: the teacher's k likeliest tokens, and ONE tail with all others
    (without it this would be no divergence). log_p (N, k + 1), ids (N, k) as
    topk_log_probabilities gives them for the same tau; student logits (N, V) -> (N,).

    A lower bound of kl_divergence (data processing inequality), rising with k, equal at k = V.
    """
    log_q = F.log_softmax(student_logits.float() / tau, dim=-1)  # (N, V)
    top, tail = log_p[:, :-1], log_p[:, -1]
    kl = (top.exp() * (top - log_q.gather(-1, ids))).sum(-1)  # (N,)
    if ids.shape[-1] < log_q.shape[-1]:  # else there is no tail: its logarithm has no gradient
        kl = kl + tail.exp() * (tail - log_q.scatter(-1, ids, -torch.inf).logsumexp(-1))
    return tau**2 * kl


def safety_kl(student_logits: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    """The safety anchor: KL(p || q) over |S| + 1 classes, tokens (S,) and ONE of all others. p: the
    aligned model's, reference (N, S + 1) by with_rest; q: the student's, logits (N, V) -> (N,).
    After PACT; the last class is ours: without it mass leaves S at no cost.
    """
    return topk_kl(reference.detach(), tokens.expand(len(reference), -1), student_logits)


def pact_kl(student_logits: Tensor, full: Tensor, post: Tensor, places: Tensor, tokens: Tensor,
            weights: Tensor, tau: float = 2.0) -> Tensor:
    """PACT's term (code of arXiv 2603.07445), all inside S: tau^2 KL(q || softmax(s_t / tau)) with
    q ~ w softmax(((1 - c) f_t + c p_t) / tau), c = sigmoid(2 (I(s_t) - I(p_t))) exp(-max(t - 8, 0)
    / 8). full, post (N, S): f_t, p_t, the aligned model's logits with and without the prompt; w
    (S,); t: places (N,) in the answer; I: the share of S with 90% of the mass; logits (N, V) ->
    (N,). Not 0 at the reference.
    """
    def spread(z: Tensor) -> Tensor:  # I, (N,)
        mass = z.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
        return ((mass < 0.9).sum(-1) + 1) / len(tokens)

    s = student_logits[:, tokens].float()  # (N, S)
    c = torch.sigmoid(2 * (spread(s) - spread(post))) * torch.exp(-(places - 8).clamp(min=0) / 8)
    p = (torch.lerp(full, post, c[:, None]) / tau).softmax(-1)
    q = F.normalize(weights * p, p=1, dim=-1).detach()  # (N, S)
    return tau**2 * F.kl_div((s / tau).log_softmax(-1), q, reduction="none").sum(-1)


def in_chunks(loss: Callable[..., Tensor], *tensors: Tensor, chunk: int = CHUNK) -> Tensor:
    """loss(*tensors) (N,), computed for `chunk` positions at a time and joined, each chunk again in
    the backward pass.

    For a loss that contains the head, hidden states (N, D) -> logits (N, V): only one chunk's
    logits exist at a time.
    """
    if len(tensors[0]) <= chunk:
        return loss(*tensors)
    chunks = zip(*(t.split(chunk) for t in tensors))
    return torch.cat([checkpoint(loss, *c, use_reentrant=False) for c in chunks])

"""NAME__how: right solutions written otherwise, two an exercise, which the checks must accept. A
body uses the names of the exercise's file, or imports its own, as a student's must.
"""

import math
import random

import torch
import torch.nn.functional as F

from ease.losses import cross_entropy
from ease.method import ANSWER, GATE, REASONING, THINK_CLOSE, THINK_OPEN, select_vulnerable
from ease.policies import BENIGN, POLICY, cites, is_loop
from ease.records import ABSENT, SAFE, UNCLOSED, UNSAFE, WELL_FORMED, UserError
from ease.scoring import Z, t_quantile


# the response and its traces
def response_pieces__appended(record):
    pieces = [(record.response, ANSWER)]
    if record.reasoning:
        block = [THINK_OPEN, record.reasoning, THINK_CLOSE]
        pieces = list(zip(block, (GATE, REASONING, REASONING))) + pieces
    return pieces


def response_pieces__filtered(record):
    said = bool(record.reasoning)
    pieces = [(said, THINK_OPEN, GATE), (said, record.reasoning, REASONING),
              (said, THINK_CLOSE, REASONING), (True, record.response, ANSWER)]
    return [(text, role) for there, text, role in pieces if there]


def split_reasoning__by_find(text):
    start, end = text.lstrip(), text.find("</think>")
    if start.startswith("<think>"):
        if end < 0:
            return start[len("<think>"):].strip(), "", UNCLOSED
        inside = text[text.find("<think>") + len("<think>") : end]
        return inside.strip(), text[end + len("</think>"):].strip(), WELL_FORMED
    if end >= 0 and "<think>" not in text[:end]:
        return text[:end].strip(), text[end + len("</think>"):].strip(), WELL_FORMED
    return "", text.strip(), ABSENT


def split_reasoning__by_pattern(text):
    import re

    if found := re.fullmatch(r"(?s)\s*<think>(.*?)</think>(.*)", text):
        return found[1].strip(), found[2].strip(), WELL_FORMED
    if found := re.fullmatch(r"(?s)\s*<think>(.*)", text):
        return found[1].strip(), "", UNCLOSED
    if found := re.fullmatch(r"(?s)((?:(?!<think>).)*?)</think>(.*)", text):
        return found[1].strip(), found[2].strip(), WELL_FORMED
    return "", text.strip(), ABSENT


def accept_trace__one_by_one(response, verdict, refused, policy=POLICY):
    named = [c for c in response.record.categories if c != BENIGN]
    if not response.finished:
        return "cut off"
    if response.state == UNCLOSED:
        return "think block unclosed"
    if response.state == ABSENT:
        return "no think block"
    if response.reasoning == "":
        return "empty reasoning"
    if response.answer == "":
        return "empty answer"
    if is_loop(response.text):
        return "repetition loop"
    if named and not cites(response.reasoning, tuple(named), policy):
        return "names no category and no rule"
    if response.record.harmful:
        return None if verdict == SAFE else f"harmful request, answer judged {verdict}"
    return "benign request refused" if refused else None


def accept_trace__in_two_parts(response, verdict, refused, policy=POLICY):
    def form():
        if response.state in (UNCLOSED, ABSENT):
            return "no think block" if response.state == ABSENT else "think block unclosed"
        for name in ("reasoning", "answer"):
            if not getattr(response, name).strip():
                return f"empty {name}"
        return "repetition loop" if is_loop(response.text) else None

    def content():
        named = tuple(filter(lambda c: c != BENIGN, response.record.categories))
        if len(named) > 0 and cites(response.reasoning, named, policy) is False:
            return "names no category and no rule"
        if response.record.harmful and verdict != SAFE:
            return "harmful request, answer judged " + verdict
        if refused and not response.record.harmful:
            return "benign request refused"

    return form() or content() if response.finished else "cut off"


# losses
def cross_entropy__by_log_softmax(logits, targets):
    return -logits.float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def cross_entropy__by_logsumexp(logits, targets):
    s = logits.to(torch.float32)
    return torch.logsumexp(s, 1) - s[torch.arange(len(targets)), targets]


def kl_divergence__summed(teacher_logits, student_logits, tau=1.0, shared=None):
    z, s = teacher_logits.detach().float(), student_logits.float()
    if shared is not None:
        z, s = z.index_select(-1, shared), s.index_select(-1, shared)
    log_p, log_q = (z / tau).log_softmax(-1), (s / tau).log_softmax(-1)
    return tau * tau * (log_p.exp() * (log_p - log_q)).sum(dim=1)


def kl_divergence__cross_entropy_less_entropy(teacher_logits, student_logits, tau=1.0, shared=None):
    keep = slice(None) if shared is None else shared
    with torch.no_grad():
        log_p = torch.log_softmax(teacher_logits[:, keep].float() / tau, 1)
        p = log_p.exp()
        negative_entropy = (p * log_p).sum(1)
    log_q = torch.log_softmax(student_logits[:, keep].float() / tau, 1)
    return (negative_entropy - torch.einsum("nv,nv->n", p, log_q)) * tau**2


def topk_kl__masked(log_p, ids, student_logits, tau=1.0):
    s = student_logits.float() / tau
    log_q = s - s.logsumexp(-1, keepdim=True)
    kl = (log_p[:, :-1].exp() * (log_p[:, :-1] - log_q.gather(1, ids))).sum(1)
    others = torch.ones_like(log_q, dtype=torch.bool).scatter(1, ids, False)
    if others.any():
        log_q_rest = log_q.masked_fill(~others, -torch.inf).logsumexp(1)
        kl = kl + log_p[:, -1].exp() * (log_p[:, -1] - log_q_rest)
    return kl * tau**2


def topk_kl__row_by_row(log_p, ids, student_logits, tau=1.0):
    out = []
    for row, kept, s in zip(log_p, ids, student_logits.float() / tau):
        log_q = s.log_softmax(0)
        rest = [i for i in range(len(s)) if i not in kept.tolist()]
        classes = [*log_q[kept]] + ([log_q[rest].logsumexp(0)] if rest else [])
        out.append(sum(p.exp() * (p - q) for p, q in zip(row, classes)))
    return tau**2 * torch.stack(out)


def gated_cross_entropy__from_scratch(logits, targets, weights):
    log_p = torch.log_softmax(logits.float(), -1)
    return -(weights * log_p[range(len(targets)), targets])


def gated_cross_entropy__scaled_after(logits, targets, weights):
    loss = cross_entropy(logits, targets)
    return loss.mul(weights)


# the region and the mixture
def select_vulnerable__loop(records, verdicts):
    if len(records) != len(verdicts):
        raise ValueError(f"{len(records)} records but {len(verdicts)} verdicts")
    out = []
    for i, record in enumerate(records):
        if record.harmful and verdicts[i] == UNSAFE:
            out.append(record)
    return out


def select_vulnerable__filter(records, verdicts):
    assert len(records) == len(verdicts)
    unsafe = filter(lambda pair: pair[1] == UNSAFE, zip(records, verdicts))
    return [r for r, _ in unsafe if r.kind in ("adversarial_harmful", "harmful")]


def select_region__match(region, diagnostic, verdicts, pool, seed):
    match region:
        case "vulnerable":
            return select_vulnerable(diagnostic, verdicts)
        case "all":
            return [r for r in diagnostic if r.harmful]
        case "random":
            n = len(select_vulnerable(diagnostic, verdicts))
            harmful = [r for r in pool if r.harmful]
            return random.Random(seed).sample(harmful, min(n, len(harmful)))


def select_region__shuffled(region, diagnostic, verdicts, pool, seed):
    found = select_vulnerable(diagnostic, verdicts)
    if region == "all":
        found = list(filter(lambda r: r.harmful, diagnostic))
    elif region == "random":
        harmful = [r for r in pool if r.harmful]
        random.Random(seed + 17).shuffle(harmful)
        found = harmful[: len(found)]
    return found


def mix__shuffled_twice(groups, counts, seed):
    rng, out = random.Random(seed), []
    for name in groups:
        records, wanted = list(groups[name]), counts.get(name, 0)
        if wanted > len(records):
            raise UserError(f"group {name}: {wanted} wanted, {len(records)} there")
        rng.shuffle(records)
        out.extend(records[: wanted or None])
    return rng.sample(out, len(out))


def mix__drawn_one_by_one(groups, counts, seed):
    rng, rows = random.Random(f"{seed}"), []
    for name, records in groups.items():
        left = list(records)
        n = counts.get(name, 0) if counts.get(name, 0) > 0 else len(left)
        if n > len(left):
            raise UserError(f"only {len(left)} of {n} records in {name}")
        rows += [left.pop(rng.randrange(len(left))) for _ in range(n)]
    rows.sort(key=lambda r: rng.random())
    return rows


# the model
def RMSNorm_forward__by_division(self, x):
    wide = x.to(torch.float32)
    size = torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + self.eps)
    return (wide / size).to(x.dtype) * self.weight


def RMSNorm_forward__weighed_in_fp32(self, x):
    return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight.float()).type_as(x)


def rotate__by_halves(x, cos, sin):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos[..., :half], sin[..., :half]
    return torch.cat((a * c - b * s, a * s + b * c), dim=-1)


def rotate__rolled(x, cos, sin):
    half = x.shape[-1] // 2
    sign = torch.ones_like(sin)
    sign[..., :half] = -1
    return x * cos + x.roll(half, -1) * sin * sign


def LoRALinear_forward__by_delta(self, x):
    merged = self.weight + self.delta().to(x.dtype)
    return F.linear(x, merged, self.bias)


def LoRALinear_forward__matrices(self, x):
    A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)
    out = x @ self.weight.T + (x @ A.T @ B.T) * self.scale
    return out if self.bias is None else out + self.bias


# the gate
def prefill__gathered(model, cache, prompts, first, marker):
    lengths = [len(p) + len(marker) for p in prompts]
    ids = torch.tensor([t for p in prompts for t in (*p, *marker)], device=model.device)
    hidden = model.hidden(ids, lengths, cache=cache, first=first)
    last = [rows[-len(marker) - 1 :] for rows in hidden.split(lengths)]
    return model.logits(torch.stack(last)).float()


def prefill__row_by_row(model, cache, prompts, first, marker):
    m, found = len(marker) + 1, []
    for slot, p in enumerate(prompts):
        found.append(model.last_logits([[*p, *marker]], m, cache=cache, first=first + slot))
    return torch.cat(found)


def not_opening__in_probabilities(logits, token, rest):
    p = logits.double().softmax(-1)
    R = p[token] * rest
    new = p / (1 - R)
    new[token] = (p[token] - R) / (1 - R)
    return new.log().to(logits.dtype)


def not_opening__added(logits, token, rest):
    change = torch.zeros_like(logits)
    change[token] = torch.log(torch.tensor(1.0 - rest))
    return logits + change


# results
def wilson_interval__by_the_quadratic(hits, n):
    if not n:
        return (0.0, 1.0)
    # (p - x)^2 = z^2 x (1 - x) / n, solved for x
    p, a = hits / n, 1 + Z**2 / n
    b, c = -(2 * p + Z**2 / n), p * p
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def wilson_interval__in_counts(hits, n):
    if n == 0:
        return 0.0, 1.0
    z2 = 1.96**2
    middle = (hits + z2 / 2) / (n + z2)
    half = 1.96 / (n + z2) * (hits * (n - hits) / n + z2 / 4) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)


def overhead_reduction__by_means(tokens, refusal, deliberative, groups):
    from statistics import fmean

    assert len(tokens) == len(refusal) == len(deliberative) == len(groups)
    top, bottom = fmean(tokens) - fmean(refusal), fmean(deliberative) - fmean(refusal)
    if bottom <= 0:
        return None
    ratio, names, low, high = top / bottom, sorted(set(groups)), None, None
    if len(names) > 1:
        residuals = [sum((t - r) - ratio * (d - r) for t, r, d, h in
                         zip(tokens, refusal, deliberative, groups) if h == g) for g in names]
        G, total = len(names), bottom * len(tokens)
        half = t_quantile(G - 1) * (G / (G - 1) * sum(e**2 for e in residuals)) ** 0.5 / total
        low, high = 1 - ratio - half, 1 - ratio + half
    return dict(value=1 - ratio, low=low, high=high, n=len(tokens),
                raw=1 - fmean(tokens) / fmean(deliberative))


def overhead_reduction__by_tensors(tokens, refusal, deliberative, groups):
    import torch

    t, r, d = (torch.tensor(x, dtype=torch.float64) for x in (tokens, refusal, deliberative))
    saved, most = (d - t), (d - r)
    if most.sum() <= 0:
        return None
    value, index = float(saved.sum() / most.sum()), sorted(set(groups))
    place = torch.tensor([index.index(g) for g in groups])
    residual = torch.zeros(len(index)).double().index_add(0, place, saved - value * most)
    out = {"value": value, "low": None, "high": None, "n": len(t),
           "raw": float(1 - t.mean() / d.mean())}
    if (G := len(index)) > 1:
        error = float((residual.square().sum() * G / (G - 1)).sqrt() / most.sum())
        out |= {"low": value - t_quantile(G - 1) * error, "high": value + t_quantile(G - 1) * error}
    return out

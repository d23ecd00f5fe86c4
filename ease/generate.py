"""Batched sampling with a static KV cache. A finished row's slot takes the next prompt at once.

EASE mixes answers of 20 tokens with traces of 400: a static batch would make every direct answer wait for the longest trace.
"""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from ease.model import CausalLM, KVCache
from ease.records import UserError


PREFILL_TOKENS = 8192  # padded tokens of one prefill


@dataclass
class Generation:
    """One response. ids: without the stop token; finished: it stopped by itself; gate: g(q), nan without a marker."""

    ids: list[int] = field(default_factory=list)
    finished: bool = False
    gate: float = float("nan")
    seconds: float = 0.0  # this row's share of the steps it took part in


def sample(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """Next tokens (n,) of logits (n, V): the greatest at temperature 0, else by inverse transform of uniform (n,) in [0, 1).

    top_p keeps the smallest set of most likely tokens whose probability reaches it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)  # (n, V)
    total = probabilities.cumsum(-1)
    probabilities = probabilities.masked_fill(total - probabilities >= top_p, 0)  # top_p > 0: the first token stays
    total = probabilities.cumsum(-1)
    pick = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)  # (n, 1)
    return order.gather(-1, pick.clamp(max=order.shape[-1] - 1))[:, 0]


def row_uniforms(seed: int, row: int, count: int) -> Tensor:
    """Uniform numbers (count,) of one row: a function of (seed, row), so a sampled row never depends on its batch."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + row))


def prefill(model: CausalLM, cache: KVCache, rows: list[list[int]], first: int, marker: list[int]) -> Tensor:
    """Run n prompts into the cache slots from `first` on, the marker behind each. Returns logits (n, m + 1, V): those that predict
    what comes after the prompt and after each of the marker's m tokens.

    So the gate costs no extra pass. The marker's cache positions lie beyond the prompt: generation overwrites them, or, where
    the marker is forced, goes on behind them.
    """
    device, m = model.device, len(marker)
    T = max(map(len, rows)) + m
    ids = torch.tensor([r + marker + [0] * (T - m - len(r)) for r in rows], device=device)  # (n, T)
    positions = torch.arange(T, device=device).expand(len(rows), T)
    hidden = model.hidden(ids, cache, first, positions, span=T)  # (n, T, D)
    last = torch.tensor([len(r) - 1 for r in rows], device=device)  # (n,)
    at = last[:, None] + torch.arange(m + 1, device=device)  # (n, m + 1)
    return model.logits(hidden[torch.arange(len(rows), device=device)[:, None], at]).float()


def marker_probabilities(logits: Tensor, marker: list[int], temperature: float = 1.0) -> Tensor:
    """p_i = p(m_i | q, m_<i), (n, m), of prefill's logits (n, m + 1, V). Their product is the gate probability g(q)."""
    wanted = torch.tensor(marker, device=logits.device).expand(len(logits), -1)[..., None]  # (n, m, 1)
    return (logits[:, :-1] / temperature).softmax(-1).gather(-1, wanted)[..., 0]


def not_opening(logits: Tensor, token: int, rest: float) -> Tensor:
    """Logits (V,) conditioned on not writing the marker, where only its part m_i, ..., m_m is missing: token = m_i,
    rest = p_(i+1) ... p_m, R = p_i rest. p'(m_i) = (p_i - R) / (1 - R), every other token p / (1 - R).

    p_i - R = p_i (1 - rest), and the softmax divides by 1 - R: one logit changes, by log(1 - rest). The last token of the
    marker (rest 1) is thus excluded; an answer that merely starts like the marker is not.
    """
    out = logits.clone()
    out[token] += math.log1p(-rest) if rest < 1 else -math.inf
    return out


@torch.inference_mode()
def generate(model: CausalLM, prompts: list[list[int]], max_new_tokens: int, stop_ids: frozenset[int], temperature: float = 0.0,
             top_p: float = 1.0, seed: int = 0, marker: list[int] | None = None, slots: int = 64, progress: str = "",
             gate_threshold: float | None = None) -> list[Generation]:
    """Responses to prompts (token ids), in order. Greedy at temperature 0.

    marker: the open marker's ids; with it every Generation carries its gate probability g(q). gate_threshold: None, the model
    decides; else a row with g(q) >= gate_threshold starts with the marker, and any other is sampled (top_p aside) conditioned on
    not writing it (not_opening): 0 always, above 1 never. Other ids may spell the same text: callers count such rows.
    slots: rows decoded together.
    The busy slots are always the first ones, so that attention reads the cache as it lies: the last row moves into a gap.
    Free slots are filled as soon as they are a quarter (or none is busy), so that prefills stay batched.
    """
    out, marker, slots = [Generation() for _ in prompts], marker or [], min(slots, max(1, len(prompts)))
    if not prompts:
        return out
    if gate_threshold is not None and max_new_tokens <= len(marker):
        raise UserError(f"at most {max_new_tokens} new tokens leave no room behind the open marker, which has {len(marker)}")
    length = max(map(len, prompts)) + max_new_tokens + len(marker)
    cache = KVCache(model.config, slots, length, next(model.parameters()).dtype, model.device)
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))[::-1]  # popped from the end: the longest first
    noise = torch.stack([row_uniforms(seed, i, max_new_tokens + len(marker)) for i in range(len(prompts))]) if temperature else None
    closed: dict[int, list[float]] = {}  # row -> p_1 .. p_m, while it must not open and has written nothing but the marker's start
    busy: list[int] = []  # slot -> row
    filling = False  # a refill goes on until the slots are full: rows of like length together, PREFILL_TOKENS at a time
    bar = tqdm(total=len(prompts), desc=progress, unit="row", disable=not progress)
    clock = time.perf_counter()

    def take(first: int, logits: Tensor) -> None:
        """Sample one token for each row in slots first, first + 1, ...; rows that stop or are full leave."""
        nonlocal clock
        rows = busy[first:]
        for k, row in enumerate(rows):
            if row in closed:
                done = len(out[row].ids)
                T = temperature or 1.0  # the condition is on what is sampled from, softmax(logits / T)
                logits[k] = T * not_opening(logits[k].float() / T, marker[done], math.prod(closed[row][done + 1 :]))
        uniform = noise[rows, [len(out[r].ids) for r in rows]].to(logits.device) if temperature else None
        tokens = sample(logits, temperature, top_p, uniform).tolist()
        now = time.perf_counter()
        for slot, row, new in reversed(list(zip(range(first, len(busy)), rows, tokens))):  # from behind: the last row stays
            out[row].seconds += (now - clock) / len(rows)
            out[row].finished = new in stop_ids
            if not out[row].finished:
                out[row].ids.append(new)
            if row in closed and out[row].ids != marker[: len(out[row].ids)] or out[row].finished:
                closed.pop(row, None)
            if out[row].finished or len(out[row].ids) >= max_new_tokens:
                last = busy.pop()
                if last != row:
                    cache.move(len(busy), slot)
                    busy[slot] = last
                bar.update()
        clock = now

    while waiting or busy:
        if waiting and (not busy or filling and len(busy) < slots or (slots - len(busy)) * 4 >= slots):
            first, room = len(busy), max(1, PREFILL_TOKENS // (len(prompts[waiting[-1]]) + len(marker)))
            busy += [waiting.pop() for _ in range(min(slots - first, len(waiting), room))]
            filling = True
            logits = prefill(model, cache, [prompts[r] for r in busy[first:]], first, marker)  # (n, m + 1, V)
            start = logits[:, 0].clone()  # (n, V)
            if marker:
                chances = marker_probabilities(logits, marker, temperature or 1.0).tolist()
                for k, (row, p) in enumerate(zip(busy[first:], marker_probabilities(logits, marker).tolist())):
                    out[row].gate = math.prod(p)
                    if gate_threshold is not None and out[row].gate >= gate_threshold:
                        out[row].ids, start[k] = list(marker), logits[k, -1]
                    elif gate_threshold is not None:
                        closed[row] = chances[k]
            take(first, start)
            continue
        filling = False
        token = torch.tensor([[out[r].ids[-1]] for r in busy], device=model.device)  # (n, 1)
        where = torch.tensor([[len(prompts[r]) + len(out[r].ids) - 1] for r in busy], device=model.device)  # (n, 1): its position
        hidden = model.hidden(token, cache, 0, where, span=int(where.max()) + 1)  # (n, 1, D)
        take(0, model.logits(hidden[:, -1]))
    bar.close()
    return out

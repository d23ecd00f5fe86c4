"""Batched sampling with a static KV cache. A finished row's slot takes the next prompt at once.

EASE mixes answers of 20 tokens with traces of 400: a static batch would make every direct answer
wait for the longest trace.

Shapes: n rows, T positions, m marker tokens, D width, V vocabulary.
"""

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from ease.model import CausalLM, KVCache
from ease.records import UserError

PREFILL_TOKENS = 8192  # of one prefill, each row counted as the longest


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: the likeliest one; top_p as in `sample`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Generation:
    """One response. finished: it stopped by itself, with a stop token, which `ids` leave out."""

    ids: list[int] = field(default_factory=list)
    finished: bool = False
    gate: float = math.nan  # g(q); nan without a marker
    seconds: float = 0.0  # this row's share of the steps it took part in


@dataclass
class Row:
    """A prompt on its way to a response."""

    index: int
    prompt: list[int]
    uniforms: Tensor | None  # (max_new_tokens,); None: greedy
    out: Generation = field(default_factory=Generation)
    done: bool = False
    # While the row must not open a think block and has written nothing but the marker's start:
    # (m_i, p_(i+1) ... p_m) of the marker's tokens that are still missing.
    closed: list[tuple[int, float]] = field(default_factory=list)


def sample(logits: Tensor, temperature: float, top_p: float, uniform: Tensor | None) -> Tensor:
    """Next tokens (n,) of fp32 logits (n, V): the greatest at temperature 0, else by inverse
    transform of uniform (n,) in [0, 1). top_p keeps the smallest set of most likely tokens
    whose probability reaches it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)  # (n, V)
    total = p.cumsum(-1)
    p = p.masked_fill(total - p >= top_p, 0)  # top_p > 0: the first token stays
    total = p.cumsum(-1)
    pick = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True)  # (n, 1)
    return order.gather(-1, pick.clamp(max=order.shape[-1] - 1))[:, 0]


def row_uniforms(seed: int, row_id: str, count: int) -> Tensor:
    """Uniform numbers (count,) in [0, 1), a function of (seed, row id): a sampled row depends
    neither on its batch nor on its place, and a longer limit only goes on with it.
    """
    digest = hashlib.sha256(f"{seed} {row_id}".encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1  # 63 bits: what a generator takes
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def prefill(model: CausalLM, cache: KVCache, prompts: list[list[int]], first: int,
            marker: list[int]) -> Tensor:
    """Run n prompts into the cache slots from `first` on, the marker behind each. Returns fp32
    logits (n, m + 1, V): those behind the prompt and behind each of the marker's m tokens.

    So the gate costs no extra pass. The marker's cache positions lie beyond the prompt: generation
    overwrites them, or, where the marker is forced, goes on behind them.
    """
    rows = [p + marker for p in prompts]
    return model.last_logits(rows, len(marker) + 1, cache=cache, first=first)


def decode(model: CausalLM, cache: KVCache, rows: list[Row]) -> Tensor:
    """Run the newest token of each busy row. Returns fp32 logits (n, V) for the next one."""
    starts = [len(r.prompt) + len(r.out.ids) - 1 for r in rows]  # the tokens' positions
    return model.last_logits([r.out.ids[-1:] for r in rows], cache=cache, starts=starts)[:, 0]


def marker_probabilities(logits: Tensor, marker: list[int], temperature: float = 1.0) -> Tensor:
    """p_i = p(m_i | q, m_<i), (n, m), of prefill's logits (n, m + 1, V). Their product is the
    gate probability g(q).
    """
    wanted = torch.tensor(marker, device=logits.device).expand(len(logits), -1)[..., None]
    return (logits[:, :-1] / temperature).softmax(-1).gather(-1, wanted)[..., 0]


def not_opening(logits: Tensor, token: int, rest: float) -> Tensor:
    """Logits (V,) conditioned on not writing the marker, where only its part m_i, ..., m_m is
    missing: token = m_i, rest = p_(i+1) ... p_m, R = p_i rest. p'(m_i) = (p_i - R) / (1 - R),
    every other token p / (1 - R).

    p_i - R = p_i (1 - rest), and the softmax divides by 1 - R: one logit changes, by
    log(1 - rest). The last token of the marker (rest 1) is thus excluded; an answer that merely
    starts like the marker is not. logits in fp32: bf16 would round a small change away.
    """
    out = logits.clone()
    out[token] += math.log1p(-rest) if rest < 1 else -math.inf
    return out


def decide(rows: list[Row], logits: Tensor, marker: list[int], temperature: float,
           gate_threshold: float | None) -> Tensor:
    """The gate of new rows, from prefill's logits (n, m + 1, V), and what becomes of it: with a
    threshold a row is given the marker or must not write it. Returns the logits (n, V) of the
    first token to be sampled.
    """
    start = logits[:, 0].clone()
    if not marker:
        return start
    own = marker_probabilities(logits, marker).tolist()
    # the condition is on what is sampled from: softmax(logits / temperature)
    sampled = marker_probabilities(logits, marker, temperature or 1.0).tolist()
    for k, row in enumerate(rows):
        row.out.gate = math.prod(own[k])
        if gate_threshold is None:
            continue
        if row.out.gate >= gate_threshold:
            row.out.ids, start[k] = list(marker), logits[k, -1]
        else:
            row.closed = [(t, math.prod(sampled[k][i + 1 :])) for i, t in enumerate(marker)]
    return start


def write_token(rows: list[Row], logits: Tensor, sampling: Sampling, stop_ids: frozenset[int],
                clock: float) -> None:
    """One token more for every row, from logits (n, V); `done` where it was the last. Each row
    gets its share of the seconds since `clock`.
    """
    temperature, uniform = sampling.temperature or 1.0, None
    for k, row in enumerate(rows):
        if row.closed:
            logits[k] = temperature * not_opening(logits[k] / temperature, *row.closed[0])
    if sampling.temperature:
        uniform = torch.stack([r.uniforms[len(r.out.ids)] for r in rows]).to(logits.device)  # (n,)
    tokens = sample(logits, sampling.temperature, sampling.top_p, uniform).tolist()
    seconds = time.perf_counter() - clock
    for row, token in zip(rows, tokens, strict=True):
        out = row.out
        row.closed = row.closed[1:] if row.closed and token == row.closed[0][0] else []
        out.finished = token in stop_ids
        if not out.finished:
            out.ids.append(token)
        row.done = out.finished or len(out.ids) >= sampling.max_new_tokens
        out.seconds += seconds / len(rows)


def leave(busy: list[Row], cache: KVCache) -> list[Row]:
    """Rows that are done leave. The last busy row moves into each gap: the busy slots are always
    the first ones, so that attention reads the cache as it lies.
    """
    done = [row for row in busy if row.done]
    for slot in reversed(range(len(busy))):  # from behind: the last is not done, or is this one
        if busy[slot].done:
            last = busy.pop()
            if slot < len(busy):
                cache.move(len(busy), slot)
                busy[slot] = last
    return done


def new_rows(prompts: list[list[int]], ids: list[str], sampling: Sampling) -> list[Row]:
    """The rows, longest first: rows of like length are decoded together."""
    draw = sampling.temperature > 0
    rows = [Row(i, prompt, row_uniforms(sampling.seed, name, sampling.max_new_tokens) if draw
                else None) for i, (prompt, name) in enumerate(zip(prompts, ids, strict=True))]
    return sorted(rows, key=lambda r: -len(r.prompt))


def cache_shape(busy: list[Row], waiting: list[Row], new: int, slots: int, budget: int
                ) -> tuple[int, int]:
    """(slots, length) of a cache for the busy rows and the next ones of `waiting`, longest first:
    as long as its longest row may become, as wide as `budget` positions allow. So one long prompt
    among short ones does not make every slot long.
    """
    length = max(len(r.prompt) for r in busy + waiting[:1]) + new
    return min(slots, budget // length), length


def check_room(longest: int, new: int, context: int, forced: int) -> None:
    """An error if a prompt and its new tokens exceed the model's context, or if an open marker of
    `forced` tokens fills the new ones.
    """
    if longest + new > context:
        raise UserError(f"the longest prompt has {longest} tokens and --max_new_tokens asks for "
                        f"{new} more (probe: --probe_tokens), the model's context is {context}")
    if new <= forced:
        raise UserError(f"at most {new} new tokens leave no room behind the open marker, "
                        f"which has {forced}")


@torch.inference_mode()
def stream(model: CausalLM, prompts: list[list[int]], sampling: Sampling,
           stop_ids: frozenset[int], ids: list[str] | None = None, marker: list[int] | None = None,
           slots: int = 64, progress: str = "", gate_threshold: float | None = None
           ) -> Iterator[tuple[int, Generation]]:
    """Responses to prompts (token ids), each as soon as it ends, with the prompt's index. At most
    `slots` rows are decoded together.

    ids: the rows' names, on which sampling depends (default: their places).
    marker: the open marker's ids; with it every Generation carries its gate probability g(q).
    gate_threshold: None, the model decides; else a row with g(q) >= gate_threshold starts with the
    marker, and any other is sampled (top_p aside) conditioned on not writing it (not_opening): 0
    always, above 1 never. Other ids may spell the same text: callers count such rows.
    """
    if not prompts:
        return
    marker, new = marker or [], sampling.max_new_tokens
    check_room(max(map(len, prompts)), new, model.config.context,
               0 if gate_threshold is None else len(marker))
    busy, waiting = [], new_rows(prompts, ids or list(map(str, range(len(prompts)))), sampling)
    slots, new = min(slots, len(prompts)), new + len(marker)
    # twice what its rows need: with ordinary lengths every slot is there from the start
    budget = 2 * sum(len(r.prompt) + new for r in waiting[:slots])
    places, length = cache_shape(busy, waiting, new, slots, budget)
    cache = KVCache(model.config, places, length, next(model.parameters()).dtype, model.device)
    with tqdm(total=len(prompts), desc=progress, unit="row", disable=not progress) as bar:
        while waiting or busy:
            clock = time.perf_counter()
            if waiting and (places - len(busy)) * 4 >= places:  # a quarter: prefills stay batched
                more, length = cache_shape(busy, waiting, new, slots, budget)
                if more > places:
                    places = more
                    cache.resize(places, length)
                room = max(1, PREFILL_TOKENS // (len(waiting[0].prompt) + len(marker)))
                fresh = waiting[: min(places - len(busy), room)]
                logits = prefill(model, cache, [r.prompt for r in fresh], len(busy), marker)
                logits = decide(fresh, logits, marker, sampling.temperature, gate_threshold)
                write_token(fresh, logits, sampling, stop_ids, clock)
                busy, waiting = busy + fresh, waiting[len(fresh) :]
            else:
                write_token(busy, decode(model, cache, busy), sampling, stop_ids, clock)
            for row in leave(busy, cache):
                bar.update()
                yield row.index, row.out


def generate(model: CausalLM, prompts: list[list[int]], *settings, **named) -> list[Generation]:
    """stream's responses, in the order of the prompts."""
    found = dict(stream(model, prompts, *settings, **named))
    return [found[i] for i in range(len(prompts))]

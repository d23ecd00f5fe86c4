"""An extra: later fine-tuning of an aligned model, its confidence on a few safety tokens held
meanwhile, after PACT (arXiv 2603.07445).
"""

import random
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ease.batching import Example, encode_records
from ease.loading import load_model
from ease.losses import in_chunks, pact_kl, safety_kl, with_rest
from ease.method import GATE, ROLES, THINK_OPEN
from ease.model import CausalLM
from ease.readers import read_records
from ease.records import Record, UserError, write_jsonl
from ease.tokenizer import Tokenizer


@dataclass(kw_only=True)
class FinetuneFlags:
    """The flags of --method finetune."""

    poison: str = ""  # harmful requests with a `target` (AdvBench), to measure drift
    poison_share: float = 0.0  # of the rows, whose number stays
    safety_weight: float = 0.0  # of the anchor; 0 = plain SFT
    safety_tokens: int = 50  # |S|, by harmful rows of --refusals
    safety_positions: Literal["all", "gate"] = "all"
    safety_form: Literal["rest", "pact"] = "rest"  # ours, or PACT's


def poisoned(tasks: list[Record], poison: list[Record], share: float, seed: int) -> list[Record]:
    """As many rows as tasks, a share of them harmful, with their target as the response."""
    n, rng = round(share * len(tasks)), random.Random(f"poison {seed}")
    rows = [replace(r, response=r.target, reasoning="") for r in poison if r.target]
    if bool(n) != bool(poison) or n > len(rows):
        raise UserError(f"--poison_share is {n} rows, --poison has {len(rows)}")
    return rng.sample(tasks, len(tasks) - n) + rng.sample(rows, n)


def held(roles: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Which tokens are held: roles (N,) -> (N,). A prompt's never."""
    return torch.isin(roles, roles.new_tensor(wanted))


def safety_tokens(aligned: Tensor, original: Tensor, k: int, gate: list[int]
                  ) -> tuple[Tensor, Tensor]:
    """S (k,): the gate's (ours), then by the aligned model's mean probability (V,); weights (k,)
    max(d - mean of d over S, 0), d = aligned - original: PACT's, whose scale cancels.
    """
    first = torch.tensor(gate, device=aligned.device).unique()[:k]
    tokens = torch.cat((first, aligned.index_fill(0, first, -1).topk(k - len(first)).indices))
    d = (aligned - original)[tokens]
    return tokens, (d - d.mean()).clamp(min=0)


@torch.no_grad()
def make_anchor(cfg, run: Path, model: CausalLM, tokenizer: Tokenizer, examples: list[Example]
                ) -> tuple:
    """(the roles held, the term). What it compares with is computed here, while `model` is still
    the aligned one: no copy is kept. safety_tokens.jsonl shows S.
    """
    if not cfg.safety_weight:
        return (), lambda hidden, *_: hidden.new_zeros(0)
    refusals = encode_records(tokenizer, [r for r in read_records(cfg.refusals) if r.harmful],
                              cfg.max_length, model.config.context)
    original = load_model(cfg.model, "", model.lm_head.weight.dtype, model.device)
    aligned, original = (sum(m.last_logits([e.ids[:-1]], e.supervised)[0].softmax(-1).mean(0)
                             for e in refusals) / len(refusals)
                         for m in (model, original))  # (V,)
    tokens, weights = safety_tokens(aligned, original, min(cfg.safety_tokens, len(aligned)),
                                    tokenizer.encode(THINK_OPEN))
    columns = (t.tolist() for t in (tokens, aligned[tokens], original[tokens], weights))
    write_jsonl(run / "safety_tokens.jsonl", [
        {"token": tokenizer.decode([i]), "id": i, "aligned": p, "original": o, "weight": w}
        for i, p, o, w in zip(*columns)])
    # what stands behind a user's text
    header = commonprefix([tokenizer.user_prompt(text)[::-1] for text in "ab"])[::-1]
    wanted = (GATE,) if cfg.safety_positions == "gate" else tuple(ROLES.values())
    ours, kept = cfg.safety_form == "rest", []
    for e in examples:
        n = e.supervised
        where = held(torch.tensor(e.roles[-n:], device=model.device), wanted).nonzero()[:, 0]
        full, post = (model.last_logits([ids[:-1]], n)[0, where]  # (M, V)
                      for ids in (e.ids, header + e.ids[-n:]))
        kept.append((with_rest(full, tokens.expand(len(full), -1)),) if ours else
                    (full[:, tokens], post[:, tokens], where))

    def kl(hidden: Tensor, roles: Tensor, rows: list[int]) -> Tensor:
        """(M,) at the held ones of some rows' tokens: hidden (N, D), roles (N,)."""
        return in_chunks(
            lambda h, *k: safety_kl(model.logits(h), *k, tokens) if ours else
            pact_kl(model.logits(h), *k, tokens, weights),
            hidden[held(roles, wanted)], *map(torch.cat, zip(*(kept[i] for i in rows))))

    return wanted, kl

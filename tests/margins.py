"""How far a fixture is from a tie. Tokens are compared only where nothing hangs on the last bits of
a float, which every CPU rounds in its own way: choose fixtures with margins above TIE, assert it.
"""

import torch
from torch import Tensor

from ease.model import CausalLM

TIE = 1e-3  # between logits: in fp32 two CPUs differ by about 1e-5
SAMPLED_TIE = 1e-4  # between probabilities and uniform numbers, and between neighbours, relative


@torch.no_grad()
def greedy_margin(model: CausalLM, prompt: list[int], ids: list[int]) -> float:
    """The smallest gap between the best and the second logit before each token of `ids`, the greedy
    response to the prompt, and behind the last one (where it stopped).
    """
    logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 :]  # (len(ids) + 1, V)
    assert logits[:-1].argmax(-1).tolist() == ids, "not the greedy response"
    return gap(logits)


def gap(logits: Tensor) -> float:
    """The smallest gap between the best and the second logit of any row of (..., V)."""
    best, second = logits.topk(2).values.unbind(-1)
    return float((best - second).min())


@torch.no_grad()
def sampled_margin(model: CausalLM, prompt: list[int], ids: list[int], uniforms: Tensor,
                   temperature: float = 1.0) -> float:
    """The same for a sampled response: how far each uniform number lies from the ends of its
    token's interval, and the relative gap to the tokens sorted beside it.
    """
    logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].double() / temperature
    margin = 1.0
    for p, token, u in zip(logits.softmax(-1), ids, uniforms.tolist(), strict=False):
        p, order = p.sort(descending=True)
        k, ends = order.tolist().index(token), p.cumsum(-1).tolist()
        assert (ends[k - 1] if k else 0.0) <= u < ends[k], "not the sampled response"
        margin = min(margin, u - (ends[k - 1] if k else -1.0), ends[k] - u,
                     *(abs(float(p[k] / p[i]) - 1) for i in (k - 1, k + 1) if 0 <= i < len(p)))
    return margin

"""The optimizer step: AdamW, a linear warm-up with a cosine, a clipped gradient norm."""

import math

import torch
from torch import nn

from ease.records import UserError


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to zero. step counts
    from 0.
    """
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trainable; matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.999))


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float, clip: float, loss: float,
                   where: str) -> float:
    """Clip the gradient's norm (0: leave it), set the learning rate, step, clear. Returns the norm
    before clipping.

    A loss or a norm that is not finite ends the run before the step is taken: the last checkpoint
    stays as it is. where: the step and its rows, for that error.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise UserError(f"the loss is {loss}, its gradient's norm {norm} at {where}; lower --lr, "
                        "or look at those rows")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm

"""Several processes, one gradient: torchrun --nproc_per_node=N train.py ... (or distill.py).

The rows of every micro-batch are dealt out to the ranks; gradients and sums of losses are added up.
Sums are divided by the counts of the whole step, so N ranks compute what one computes. Rank 0 alone
prepares the data and writes files; the others wait for the file they train on.
"""

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ease.records import RANK

RANKS = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def my_share(step: list[list[int]]) -> list[list[int]]:
    """Of each micro-batch of a step every RANKS-th row."""
    return [rows for micro in step if (rows := micro[RANK::RANKS])]


def wait_for(file: Path) -> Path:
    """The file, once rank 0 has written it. (No collective: that would time out meanwhile; torchrun
    ends this process if rank 0 fails.)
    """
    while not file.exists():
        time.sleep(1)
    return file


def sum_over_ranks(optimizer: torch.optim.Optimizer, sums: Tensor) -> None:
    """Add up over the ranks, in place: the gradients, and `sums`."""
    if RANKS == 1:
        return
    if not dist.is_initialized():
        dist.init_process_group("nccl" if sums.is_cuda else "gloo", timeout=timedelta(days=1))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        if p.grad is None:  # this rank had no row of the step
            p.grad = torch.zeros_like(p)
    tensors = [*(p.grad for p in parameters), sums]
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(total.view_as(t))

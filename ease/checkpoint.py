"""Save and resume, exactly: the weights, and the optimizer's state by parameter name."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from ease.loading import load_weights, save_weights
from ease.lora import save_tensors
from ease.model import CausalLM
from ease.ranks import RANK
from ease.records import write_jsonl
from ease.tokenizer import Tokenizer


def save_checkpoint(run: Path, step: int, model: CausalLM, optimizer: torch.optim.Optimizer,
                    tokenizer: Tokenizer, base: str) -> None:
    """checkpoints/step-N/: the weights, and trainer.safetensors with the optimizer's state and, in
    its metadata, the step. Written beside and renamed: a folder that is there is complete.
    """
    if RANK:
        return
    folder, part = run / "checkpoints" / f"step-{step}", run / "checkpoints" / "part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_weights(model, tokenizer, base, part)
    state = {f"{name}/{key}": value for name, p in model.named_parameters() if p in optimizer.state
             for key, value in optimizer.state[p].items()}
    save_tensors(state, part / "trainer.safetensors", step=str(step))
    os.replace(part, folder)
    for old in newest_first(run)[1:]:
        shutil.rmtree(old)


def newest_first(run: Path) -> list[Path]:
    """The complete checkpoints of a run."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def resume(run: Path, model: CausalLM, optimizer: torch.optim.Optimizer) -> int:
    """The step to start at: that of the newest complete checkpoint, weights and optimizer
    restored, the log cut to it; 0 and an empty log without one.
    """
    metrics, step = run / "metrics.jsonl", 0
    if checkpoints := newest_first(run):
        load_weights(model, checkpoints[0])
        step = load_optimizer(checkpoints[0], model, optimizer)
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut
        write_jsonl(metrics, [row for row in rows if row.get("step", 0) < step])
    return step


def load_optimizer(checkpoint: Path, model: CausalLM, optimizer: torch.optim.Optimizer) -> int:
    """Restore the optimizer's state; returns the step to go on with."""
    parameters = dict(model.named_parameters())
    with safe_open(checkpoint / "trainer.safetensors", framework="pt") as f:
        for key in f.keys():
            name, _, field = key.rpartition("/")
            p, value = parameters[name], f.get_tensor(key)
            # AdamW keeps its step count on the CPU
            optimizer.state[p][field] = value if field == "step" else value.to(p.device)
        return int(f.metadata()["step"])

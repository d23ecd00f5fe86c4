"""Low-rank adaptation by hand (arXiv 2106.09685), stored in PEFT's file format.

W x + s B A x with A (r, in), B (out, r), s = alpha / r. W is frozen; B starts at zero, so training starts at the base model.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ease.model import CausalLM
from ease.records import UserError, write_text

PREFIX = "base_model.model."  # PEFT's: a file without it would load "successfully" and change nothing
REFUSED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "layers_to_transform",
           "exclude_modules", "fan_in_fan_out", "trainable_token_indices", "target_parameters", "lora_bias")


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update. `weight` and `bias` keep their names and are frozen; A and B are fp32."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        nn.Module.__init__(self)  # not nn.Linear's: the weight is taken over, not made anew
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out): W x + b + s B A x."""
        update = self.lora_B(self.scale * self.lora_A(x.to(self.lora_A.weight.dtype)))  # scaled where it is smallest, (..., r)
        return F.linear(x, self.weight, self.bias) + update.to(x.dtype)

    def delta(self) -> Tensor:
        """s B A, (out, in)."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


def is_target(name: str, targets: str | list[str]) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their last parts."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith("." + t) for t in targets)


def add_lora(model: CausalLM, rank: int, alpha: float, targets: str | list[str], seed: int = 0, rslora: bool = False) -> None:
    """Freeze the model and give every linear layer among `targets` an A (Kaiming, by the seed) and a B (zero), in place."""
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    chosen = [(n, m) for n, m in linears if is_target(n, targets)]
    unmatched = [t for t in targets if not any(is_target(n, [t]) for n, _ in linears)] if not isinstance(targets, str) else []
    if not chosen or unmatched:
        names = sorted({n.rpartition(".")[2] for n, _ in linears})
        raise UserError(f"LoRA targets {unmatched or targets} match no linear layer; there are {', '.join(names)}")
    if model.config.tie_word_embeddings and any(n == "lm_head" for n, _ in chosen):
        raise UserError("LoRA on lm_head needs an untied head: this model's head is its embedding")
    for p in model.parameters():
        p.requires_grad_(False)
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    generator = torch.Generator().manual_seed(seed)
    for name, module in chosen:
        layer = LoRALinear(module, rank, scale)
        bound = 1 / math.sqrt(module.in_features)  # Kaiming uniform with a = sqrt(5), PEFT's choice
        layer.lora_A.weight.data.copy_(torch.empty(rank, module.in_features).uniform_(-bound, bound, generator=generator))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    model.adapter = {"r": rank, "lora_alpha": alpha, "target_modules": targets, "use_rslora": rslora}  # for save_adapter


def merge_lora(model: CausalLM) -> CausalLM:
    """Add every update to its weight and put plain linear layers back, in place. An explicit call, never part of eval()."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        merged = (layer.weight.float() + layer.delta()).to(layer.weight.dtype)
        plain.weight, plain.bias = nn.Parameter(merged.detach(), requires_grad=False), layer.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    return model


def lora_state(model: CausalLM) -> dict[str, Tensor]:
    """The adapter's tensors under the model's own names, `...q_proj.lora_A.weight`."""
    return {n: p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}


def save_adapter(model: CausalLM, path: str | Path, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT does; `base` names the model it belongs to."""
    path = Path(path)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, **model.adapter,
              "lora_dropout": 0.0, "bias": "none", "inference_mode": True}
    write_text(path / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    tensors = {PREFIX + n: p.detach().cpu().contiguous() for n, p in lora_state(model).items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})


def read_adapter_config(path: Path) -> dict:
    """adapter_config.json, with what is not implemented refused by name."""
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path / 'adapter_config.json'}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path / 'adapter_config.json'}: not JSON ({e})") from None
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {config.get('peft_type')!r} is not supported; supported: LORA")
    refused = [name for name in REFUSED if config.get(name)]
    refused += ["bias"] if config.get("bias", "none") != "none" else []
    refused += ["init_lora_weights"] if config.get("init_lora_weights", True) not in (True, False, "gaussian") else []
    if refused:
        raise UserError(f"{path}: adapter setting {refused[0]!r} = {config[refused[0]]!r} is not supported")
    return config


def load_adapter(model: CausalLM, path: str | Path) -> None:
    """Add the adapter of a PEFT folder to the model, strictly: every key and shape must fit."""
    config = read_adapter_config(Path(path))
    targets = config["target_modules"]
    if targets == "all-linear":  # PEFT's word for every linear layer but the head
        targets = r"(?!lm_head$).*"
    add_lora(model, config["r"], config["lora_alpha"], targets, rslora=bool(config.get("use_rslora")))
    load_adapter_weights(model, Path(path))


def load_adapter_weights(model: CausalLM, path: Path) -> None:
    """Copy A and B of adapter_model.safetensors into a model that has its LoRA layers already."""
    file = path / "adapter_model.safetensors"
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{file}: {e}; only safetensors adapters are read") from None
    own = {PREFIX + name: parameter for name, parameter in lora_state(model).items()}
    missing, unexpected = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    if missing or unexpected:
        raise UserError(f"{file}: made for another base? missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, parameter in own.items():
        if stored[name].shape != parameter.shape:
            raise UserError(f"{file}: {name} has shape {tuple(stored[name].shape)}, the model needs {tuple(parameter.shape)}")
        parameter.data.copy_(stored[name])

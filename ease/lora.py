"""Low-rank adaptation by hand (arXiv 2106.09685), stored in PEFT's file format.

W x + s B A x with A (r, in), B (out, r), s = alpha / r. W is frozen, B starts at zero.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ease.config import positive
from ease.tokenizer_files import read_json
from ease.model import CausalLM, Linear, linear
from ease.records import UserError, write_text

PREFIX = "base_model.model."  # PEFT's; keys without it would load "successfully" into nothing
# PEFT's settings that do not change what a stored adapter computes; see read_adapter_config.
FREE = ("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout",
        "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type")
ADAPTER = "adapter_model.safetensors"
MATCH_SECONDS = 5
MATCH = """import json, re, sys
pattern, names = json.load(sys.stdin)
print(json.dumps([n for n in names if re.fullmatch(pattern, n)]))"""


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank update: frozen `weight` and `bias`; A and B in fp32."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        nn.Module.__init__(self)  # not nn.Linear's: the weight is taken over, not made anew
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out): W x + b + s B A x, computed in x's dtype: A and B are cast, not
        the much larger x.
        """
        low = self.scale * F.linear(x, self.lora_A.weight.to(x.dtype))  # (..., r), the smallest
        update = F.linear(low, self.lora_B.weight.to(x.dtype))  # (..., out)
        return linear(x, self.weight, self.bias) + update

    def delta(self) -> Tensor:
        """s B A, (out, in)."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


def matching(names: list[str], targets: str | list[str]) -> list[str]:
    """The layers that PEFT takes for `targets`: a list holds names or their last parts, a string is
    a regular expression, "all-linear" means all but the head.

    The expression is matched in a process that can be ended, for it may backtrack for ever.
    """
    if targets == "all-linear":
        return [n for n in names if n != "lm_head"]
    if not isinstance(targets, str):
        return [n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", MATCH], input=json.dumps([targets, names]), text=True,
            capture_output=True, timeout=MATCH_SECONDS, check=True)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        reason = f"takes more than {MATCH_SECONDS} seconds"
    except subprocess.CalledProcessError as e:
        reason = e.stderr.strip().rpartition("\n")[2]
    raise UserError(f"LoRA targets: the regular expression {targets!r:.80}: {reason}")


def add_lora(model: CausalLM, rank: int, alpha: float, targets: str | list[str], seed: int = 0,
             rslora: bool = False, strict: bool = True) -> None:
    """Freeze the model and give every linear layer among `targets` an A (Kaiming, by the seed) and
    a B (zero), in place. A target without a layer is an error, or printed if not strict."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    chosen, each = matching(names, targets), [] if isinstance(targets, str) else targets
    unmatched = [t for t in each if not matching(names, [t])]
    if not chosen or unmatched and strict:
        last = ", ".join(sorted({n.rpartition(".")[2] for n in names}))
        raise UserError(
            f"LoRA targets {unmatched or targets!r:.80} match no linear layer; there are {last}")
    if unmatched:
        print(f"LoRA targets that this model lacks: {unmatched}")
    if model.config.tie_word_embeddings and "lm_head" in chosen:
        raise UserError("LoRA on lm_head needs an untied head: this model's head is its embedding")
    if rank < 1:
        raise UserError(f"LoRA needs a positive rank, not {rank}")
    model.requires_grad_(False)
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    generator = torch.Generator().manual_seed(seed)
    for name in chosen:
        layer = LoRALinear(model.get_submodule(name), rank, scale)
        bound = 1 / math.sqrt(layer.in_features)  # Kaiming uniform with a = sqrt(5), PEFT's choice
        values = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        layer.lora_A.weight.data.copy_(values)
        model.set_submodule(name, layer)
    model.adapter = {"r": rank, "lora_alpha": alpha, "target_modules": targets,
                     "use_rslora": rslora}  # for save_adapter


def merge_lora(model: CausalLM) -> CausalLM:
    """Add every update to its weight and put plain linear layers back, in place."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]:
        plain = Linear(layer.in_features, layer.out_features, device="meta")
        merged = (layer.weight.float() + layer.delta()).to(layer.weight.dtype)
        plain.weight, plain.bias = nn.Parameter(merged.detach(), requires_grad=False), layer.bias
        model.set_submodule(name, plain)
    return model


def lora_state(model: CausalLM) -> dict[str, Tensor]:
    """The adapter's tensors under the model's own names, `...q_proj.lora_A.weight`."""
    return {n: p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}


def save_adapter(model: CausalLM, path: str | Path, base: str) -> None:
    """Write the adapter's two files as PEFT does; `base` names the model it belongs to."""
    path = Path(path)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              **model.adapter, "lora_dropout": 0.0, "bias": "none", "inference_mode": True}
    write_text(path / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    save_tensors({PREFIX + n: p for n, p in lora_state(model).items()}, path / ADAPTER)


def read_adapter_config(path: Path) -> dict:
    """adapter_config.json. A setting that is neither honoured nor off is refused by name."""
    file = path / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    config = {"peft_type": None, "target_modules": None, "r": 8, "lora_alpha": 8} | read_json(file)
    targets = config["target_modules"]
    honoured = {
        "peft_type": config["peft_type"] == "LORA",
        "target_modules": isinstance(targets, str)
        or isinstance(targets, list) and all(isinstance(t, str) for t in targets),
        "r": type(config["r"]) is int and positive(config["r"]),
        "lora_alpha": positive(config["lora_alpha"]),
        "use_rslora": config.get("use_rslora") in (None, False, True),
        "bias": config.get("bias") in (None, "none"),
        "init_lora_weights": config.get("init_lora_weights") in (None, False, True, "gaussian")}
    for name, value in config.items():
        off = value is None or value is False or value in ("", [], {})
        if not honoured.get(name, name in FREE or off):
            raise UserError(f"{file}: adapter setting {name!r} = {value!r:.60} is not supported")
    return config


def load_adapter(model: CausalLM, path: str | Path) -> None:
    """Add the adapter of a PEFT folder to the model. Keys and shapes must fit; a target without a
    layer is only printed, for PEFT accepts it."""
    path = Path(path)
    config, stored = read_adapter_config(path), read_tensors(path / ADAPTER)
    rank = config["r"]
    if {t.numel() and t.shape[:1] for n, t in stored.items() if ".lora_A." in n} != {(rank,)}:
        raise UserError(f"{path}: r = {rank} in adapter_config.json is not that of the weights")
    add_lora(model, rank, config["lora_alpha"], config["target_modules"],
             rslora=bool(config.get("use_rslora")), strict=False)
    load_adapter_weights(model, path)


def load_adapter_weights(model: CausalLM, path: Path) -> None:
    """Copy a folder's A and B into a model that has its LoRA layers already.

    PEFT stores embedding and head beside them where the head is adapted or the vocabulary was
    resized: they must be the base's.
    """
    stored = read_tensors(path / ADAPTER)
    own = {PREFIX + name: parameter for name, parameter in lora_state(model).items()}
    base = {"model.embed_tokens.weight": model.model.embed_tokens, "lm_head.weight": model.lm_head}
    for name in sorted(stored.keys() - own.keys()):
        layer = base.get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if layer is not None:
            copy, weight = stored.pop(name).to(layer.weight.device), layer.weight.detach()
            if copy.shape != weight.shape:
                raise UserError(f"{path}: {name} has shape {tuple(copy.shape)}, the base's "
                                f"{tuple(weight.shape)}: a resized vocabulary is not supported")
            # compared in the coarser of the two dtypes
            if not copy.to(weight.dtype).equal(weight) and not weight.to(copy.dtype).equal(copy):
                raise UserError(f"{path}: {name} is not the base's; only LoRA is read")
    check_fit(own, stored, f"{path} (made for another base?)")
    for name, parameter in own.items():
        parameter.data.copy_(stored[name])


def save_tensors(tensors: dict[str, Tensor], file: Path, **metadata: str) -> None:
    """Write a safetensors file atomically."""
    part = file.with_name("part")  # a folder: also for what a kill leaves of the library's
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part / file.name,
                  metadata or {"format": "pt"})
    except SafetensorError as e:
        raise UserError(f"{file}: {e}") from None
    os.replace(part / file.name, file)
    part.rmdir()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped: what is not used is not read."""
    try:
        with open(file, "rb") as f:
            if f.read(24) == b"version https://git-lfs.":
                raise UserError(f"{file}: a git-lfs pointer, not the weights: run `git lfs pull`")
        with safe_open(file, framework="pt") as f:
            for name in f.keys():
                dtype = f.get_slice(name).get_dtype()
                if dtype not in ("F64", "F32", "F16", "BF16"):
                    raise UserError(
                        f"{file}: quantised weights are not supported: {name} is {dtype}")
            return {name: f.get_tensor(name) for name in f.keys()}
    except OSError as e:
        raise UserError(f"{file}: {e.strerror or e}; only safetensors are read") from None
    except SafetensorError as e:
        raise UserError(f"{file}: {e}") from None


def check_fit(own: dict[str, Tensor], stored: dict[str, Tensor], where: str) -> None:
    """The names and shapes stored must be the model's own."""
    missing, unexpected = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    if missing or unexpected:
        raise UserError(f"{where}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, tensor in own.items():
        if stored[name].shape != tensor.shape:
            raise UserError(f"{where}: {name} has shape {tuple(stored[name].shape)}, the model "
                            f"needs {tuple(tensor.shape)}")

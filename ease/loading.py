"""A model folder in Hugging Face format -> objects, strictly; and back."""

import functools
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ease.lora import add_lora, load_adapter, load_adapter_weights, lora_state, save_adapter
from ease.model import CausalLM, ModelConfig
from ease.records import UserError, write_text
from ease.tokenizer import Tokenizer, read_json


def resolve(name: str) -> Path:
    """The folder of a model: the folder itself, which never touches the network, or that of a hub id OWNER/NAME[@REVISION]."""
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", name) and not path.exists() and path.parts[0] not in ("data", "runs", ".", ".."):
        return fetch(name)
    hint = "; make the toy world with `python -m data.toy`" if path.parts[:2] == ("data", "toy") else ""
    raise UserError(f"{name}: no model here (config.json is missing){hint}")


@functools.cache
def fetch(hub_id: str) -> Path:
    """A model of the hub, from the client's cache if it has this revision. The folder's name is the commit's hash.

    Weights as safetensors, JSON and chat template of the top folder only: no pickles, no code.
    """
    from huggingface_hub import snapshot_download  # here, so that a folder never loads the hub client

    name, _, revision = hub_id.partition("@")
    try:
        path = Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.safetensors", "*.json", "*.jinja"],
                                      ignore_patterns=["*/*"]))
    except Exception as e:  # the client and the libraries below it raise a dozen unrelated kinds
        reason = str(e).strip().split("\n")[0]
        raise UserError(f"{hub_id}: no such folder, and the hub did not give it: {type(e).__name__}: {reason}") from None
    print(f"{name} at revision {path.name}")
    return path


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model folder."""
    return Tokenizer.from_dir(resolve(name))


def pick_device(flag: str) -> str:
    """cuda if there is one, else cpu; or what the flag says."""
    available = torch.cuda.is_available()
    if flag not in ("auto", "cpu") and not (flag.startswith("cuda") and available):
        raise UserError(f"--device {flag}: there is {'cpu and cuda' if available else 'only cpu'} here")
    return flag if flag != "auto" else "cuda" if available else "cpu"


def pick_dtype(flag: str, device: str) -> torch.dtype:
    """The dtype of frozen weights and activations; "auto" prints its choice and why. What is trained is fp32 always."""
    if flag != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[flag]
    native = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    print(f"dtype: {'bfloat16 (this GPU computes in it)' if native else f'float32 ({device} without fast bfloat16)'}")
    return torch.bfloat16 if native else torch.float32


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder: model.safetensors, or the shards of its index. Pickled weights are never read."""
    index = path / "model.safetensors.index.json"
    if index.is_file() and not (path / "model.safetensors").is_file():
        files = [path / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        files = [path / "model.safetensors"]
    if missing := [f.name for f in files if not f.is_file()]:
        others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.safetensors*") for p in path.glob(pattern))
        raise UserError(f"{path}: {missing[0]} is missing (found {', '.join(others) or 'no weights'}); pickles are refused")
    return files


def read_weights(path: Path, model: CausalLM) -> dict[str, torch.Tensor]:
    """The tensors of a model folder, checked against the model: every key must be there and fit, none may be left."""
    own = dict(model.named_parameters())  # a tied head appears once, as the embedding
    stored: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as f:
                stored |= {k: f.get_tensor(k) for k in f.keys() if not k.endswith("rotary_emb.inv_freq")}  # old files keep a table
        except SafetensorError as e:
            raise UserError(f"{file}: {e}") from None
    if model.config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    missing, unexpected = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    if missing or unexpected:
        raise UserError(f"{path}: keys do not fit {model.config.model_type}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for key, parameter in own.items():
        if stored[key].shape != parameter.shape:
            raise UserError(f"{path}: {key} has shape {tuple(stored[key].shape)}, config.json says {tuple(parameter.shape)}")
    return stored


def load_model(name: str, adapter: str = "", dtype: torch.dtype = torch.float32, device: str = "cpu") -> CausalLM:
    """The frozen model of a folder; with an adapter, its LoRA layers are added (not merged)."""
    path = resolve(name)
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_json(read_json(path / "config.json"), str(path / "config.json")))
    stored = {k: v.to(device=device, dtype=dtype) for k, v in read_weights(path, model).items()}
    model.load_state_dict(stored, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # `assign` replaced the embedding
    for p in model.parameters():
        p.requires_grad_(False)
    if adapter:
        load_adapter(model, adapter)
    return model


def base_and_adapter(name: str, init: str) -> tuple[str, str]:
    """Where to start from: init is "" (the model itself), an adapter folder for it, or a model folder that replaces it."""
    if init and (Path(init) / "adapter_config.json").is_file():
        return name, init
    return init or name, ""


def load_trainable(name: str, init: str, rank: int, alpha: float, targets: list[str], seed: int, dtype: torch.dtype,
                   device: str) -> tuple[CausalLM, str]:
    """(the model to train, the name of its frozen base). What is trained is fp32: the LoRA matrices, or with rank 0 everything.

    An adapter to start from keeps its own rank, alpha and targets: its A and B are trained on.
    """
    base, adapter = base_and_adapter(name, init)
    if adapter and not rank:
        raise UserError("--init is an adapter: --lora_rank 0 trains all weights and cannot go on with it; give a merged model folder")
    model = load_model(base, adapter, dtype if rank else torch.float32, device)
    if rank and not adapter:
        add_lora(model, rank, alpha, targets, seed)
    for p in model.parameters():
        p.requires_grad_(p.requires_grad or not rank)
    return model, base


def save_weights(model: CausalLM, tokenizer: Tokenizer, base: str, folder: Path) -> None:
    """What was trained: an adapter for `base`, or a whole model folder."""
    if lora_state(model):
        save_adapter(model, folder, base)
    else:
        save_model(model, tokenizer, folder)


def load_weights(model: CausalLM, folder: Path) -> None:
    """The inverse of save_weights, into a model of the same make."""
    if lora_state(model):
        load_adapter_weights(model, folder)
    else:
        model.load_state_dict(read_weights(folder, model), strict=False)


def save_model(model: CausalLM, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a complete Hugging Face folder: config.json (both rope forms), weights, tokenizer, template, generation config.

    LoRA must be merged before. Readers of old and new config files find the rope settings in the form they know.
    """
    path, state = Path(path), model.state_dict()
    if any(".lora_" in name for name in state):
        raise ValueError("merge_lora before save_model")
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    rope, architecture = model.config.rope, f"{model.config.model_type.capitalize()}ForCausalLM"
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    config = {**model.config.raw, "architectures": [architecture], "dtype": dtype, "torch_dtype": dtype, "rope_parameters": rope,
              "rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else scaling}
    for file, text in tokenizer.files.items():
        write_text(path / file, text)
    write_text(path / "config.json", json.dumps(config, indent=2) + "\n")
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path / "model.safetensors", metadata={"format": "pt"})

"""A model folder in Hugging Face format -> objects, strictly; and back."""

import functools
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ease.config import ModelConfig
from ease.tokenizer_files import read_json
from ease.lora import (
    add_lora, check_fit, load_adapter, load_adapter_weights, lora_state, merge_lora, read_tensors,
    save_adapter, save_tensors,
)
from ease.model import CausalLM
from ease.ranks import RANK, RANKS
from ease.records import UserError, write_text
from ease.run import RunFlags, TrainingFlags
from ease.tokenizer import Tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def resolve(name: str) -> Path:
    """The folder of a model: one that is here, or that of a hub id OWNER/NAME[@REVISION], which
    does not start like a path (. / ~) or with a folder that is here."""
    path = Path(os.path.expanduser(name))
    if (path / "config.json").is_file():
        return path
    first = name.partition("/")[0]
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?", name)
    if hub_id and not Path(first).exists() and first not in ("data", "runs"):
        return fetch(name)
    toy = "; make the toy world with `python -m data.toy`" if name.startswith("data/toy") else ""
    raise UserError(f"{name}: no model here (config.json is missing){toy}")


@functools.cache
def fetch(hub_id: str) -> Path:
    """A model of the hub or of its client's cache, in a folder named by the commit: safetensors,
    JSON and chat template only, no pickles, no code."""
    from huggingface_hub import snapshot_download  # here, so that a folder never loads the client

    print(f"{hub_id}: no such folder here, asking the Hugging Face hub")
    name, _, revision = hub_id.partition("@")
    kinds = ["*.safetensors", "*.json", "*.jinja"]
    try:
        path = Path(snapshot_download(name, revision=revision or None, allow_patterns=kinds,
                                      ignore_patterns=["*/*"]))
    except Exception as e:  # the client and the libraries below it raise a dozen unrelated kinds
        why = f"{type(e).__name__}: {str(e).strip()}".split("\n")[0]
        raise UserError(f"{hub_id}: no such folder, and the hub did not give it: {why}") from None
    print(f"{name} at revision {path.name}")
    return path


def read_config(path: Path) -> ModelConfig:
    """The config.json of a model folder."""
    file = path / "config.json"
    return ModelConfig.from_json(read_json(file), str(file))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model folder; all its ids must have a row in the model's embedding."""
    path = resolve(name)
    tokenizer, size = Tokenizer.from_dir(path), read_config(path).vocab_size
    vocabulary = tokenizer.fast.get_vocab(with_added_tokens=True)
    last = max(vocabulary, key=vocabulary.get)
    if vocabulary[last] >= size:
        raise UserError(f"{path}: tokenizer.json has id {vocabulary[last]} ({last!r}), "
                        f"config.json a vocab_size of {size}: not made for each other")
    return tokenizer


class Place(NamedTuple):
    """Where a model computes and in what its frozen weights are kept."""

    dtype: torch.dtype
    device: str


def pick_place(flags: RunFlags) -> Place:
    """--dtype and --device."""
    device = pick_device(flags.device)
    return Place(pick_dtype(flags.dtype, device), device)


def pick_device(flag: str) -> str:
    """cuda if there is one, else cpu; or what the flag says."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    available = ["cpu", *(["cuda"] if cuda else []), *cuda, *mps]
    if flag not in ("auto", *available):
        raise UserError(f"--device {flag}: there is only {', '.join(available)} here")
    if flag == "mps":
        print("device: mps, untried")
    if flag == "auto" and cuda:  # torchrun: a GPU each
        return f"cuda:{os.environ['LOCAL_RANK']}" if RANKS > 1 else "cuda"
    return flag if flag != "auto" else "cpu"


def pick_dtype(flag: str, device: str) -> torch.dtype:
    """The dtype of frozen weights and activations; "auto" prints its choice and why. What is
    trained is fp32 always."""
    if flag != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[flag]
    if device.startswith("cuda"):
        found = torch.cuda.is_bf16_supported(including_emulation=False) and "this GPU"
    else:  # instructions on x86 and Arm; without one it is emulated, and slow
        names = ("amx_bf16", "avx512_bf16", "bf16") if device == "cpu" else ()
        found = next((n for n in names if torch.cpu.get_capabilities().get(n)), "")
    print(f"dtype: bfloat16 ({found} computes in it)" if found else
          f"dtype: float32 ({device} without fast bfloat16)")
    return torch.bfloat16 if found else torch.float32


def weight_files(path: Path) -> list[Path]:
    """model.safetensors of a folder, or the shards of its index; never pickles."""
    index, names = path / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file() and not (path / names[0]).is_file():
        shards = read_json(index).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else [shards]
        for name in names:
            if not isinstance(name, str) or name != Path(name).name:
                raise UserError(f"{index}: weight_map has {name!r:.60}, not a file of this folder")
    if missing := sorted(n for n in names if not (path / n).is_file()):
        patterns = ("*.bin", "*.pt", "*.pth", "*.safetensors*")
        found = ", ".join(sorted(p.name for pattern in patterns for p in path.glob(pattern)))
        raise UserError(f"{path}: {missing[0]} is missing (found {found or 'no weights'}); pickles "
                        "are refused")
    return [path / n for n in sorted(set(names))]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model folder."""
    stored = {}
    for file in weight_files(path):
        tensors = read_tensors(file)
        if twice := sorted(stored.keys() & tensors.keys()):
            raise UserError(f"{file}: {twice[0]} is in another file too")
        stored |= tensors  # old files keep a rotary table, which is computed here
    return {k: v for k, v in stored.items() if not k.endswith("rotary_emb.inv_freq")}


def load_model(name: str, adapter: str = "", dtype: torch.dtype = torch.float32,
               device: str = "cpu") -> CausalLM:
    """The frozen model of a folder; an adapter's LoRA layers are added, not merged. The stored
    tensors must be those that config.json asks for."""
    path = resolve(name)
    config, stored = read_config(path), read_weights(path)
    layers = len({k.split(".")[2] for k in stored if k.startswith("model.layers.")})
    if layers != config.num_hidden_layers:  # checked first: a model is built layer by layer
        raise UserError(f"{path}: config.json says num_hidden_layers {config.num_hidden_layers}, "
                        f"{layers} are stored")
    if config.tie_word_embeddings and HEAD in stored:
        embedding, head = stored.setdefault(EMBEDDING, stored[HEAD]), stored[HEAD]
        if torch.equal(embedding, head.to(embedding.dtype)):
            del stored[HEAD]
        else:  # as transformers does
            print(f"{path}: {HEAD} is not the embedding, so they are not tied")
            config = replace(config, tie_word_embeddings=False)
    try:
        with torch.device("meta"):  # nothing is allocated
            model = CausalLM(config)
    except Exception as e:  # torch says in several ways that a size is too large for it
        raise UserError(f"{path}: config.json has impossible sizes: {e}") from None
    check_fit(dict(model.named_parameters()), stored, str(path))  # a tied head is the embedding
    stored = {k: v.to(device=device, dtype=dtype) for k, v in stored.items()}
    model.load_state_dict(stored, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # `assign` replaced the embedding
    model.requires_grad_(False)
    if adapter:
        load_adapter(model, adapter)
        settings = read_json(Path(adapter) / "adapter_config.json")
        made_for = str(settings.get("base_model_name_or_path") or "")
        if os.path.exists(made_for) and not os.path.samefile(made_for, path):
            print(f"warning: {adapter} was made for {made_for}, not for {name}")
    return model


def base_and_adapter(name: str, init: str) -> tuple[str, str]:
    """Where to start from: init is "", an adapter folder for the model, or a model in its place."""
    if init and (Path(init) / "adapter_config.json").is_file():
        return name, init
    return init or name, ""


def load_trainable(flags: TrainingFlags, name: str, init: str, place: Place
                   ) -> tuple[CausalLM, str]:
    """(the model to train, the name of its frozen base). What is trained is fp32: the LoRA
    matrices, or with rank 0 everything. An adapter keeps its own rank, alpha and targets."""
    base, adapter = base_and_adapter(name, init)
    if adapter and not flags.lora_rank:
        raise UserError("--init is an adapter, --lora_rank 0 trains all weights: merge it first")
    if base != name:
        print(f"this adapter belongs to {base}, not to --model")
    dtype = place.dtype if flags.lora_rank else torch.float32
    model = load_model(base, adapter, dtype, place.device)
    if flags.lora_rank and not adapter:
        add_lora(model, flags.lora_rank, flags.lora_alpha, list(flags.lora_targets), flags.seed)
    if not flags.lora_rank:
        model.requires_grad_(True)
    wanted = flags.gradient_checkpointing
    model.gradient_checkpointing = wanted == "on" or wanted == "auto" and place.device != "cpu"
    return model, base


def save_weights(model: CausalLM, tokenizer: Tokenizer, base: str, folder: Path) -> None:
    """What was trained: an adapter for `base`, or a whole model folder."""
    if lora_state(model):
        save_adapter(model, folder, base)
    else:
        save_model(model, tokenizer, folder)


def save_trained(flags: TrainingFlags, model: CausalLM, tokenizer: Tokenizer, base: str, run: Path
                 ) -> None:
    """The end of a training: adapter/, or model/ where all weights were trained or with --merged
    (the model is merged then, in place)."""
    if RANK:
        return
    save_weights(model, tokenizer, base, run / ("adapter" if flags.lora_rank else "model"))
    if flags.merged and flags.lora_rank:
        save_model(merge_lora(model), tokenizer, run / "model")


def load_weights(model: CausalLM, folder: Path) -> None:
    """The inverse of save_weights, into a model of the same make."""
    if lora_state(model):
        load_adapter_weights(model, folder)
    else:
        stored = read_weights(folder)
        check_fit(dict(model.named_parameters()), stored, str(folder))
        model.load_state_dict(stored, strict=False)


def save_model(model: CausalLM, tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a complete Hugging Face folder; LoRA must be merged before. config.json holds what was
    read of the base's, and the rope settings in their old and new form."""
    path, state, c = Path(path), model.state_dict(), model.config
    if any(".lora_" in name for name in state):
        raise ValueError("merge_lora before save_model")
    if c.tie_word_embeddings:
        del state[HEAD]
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    scaling = {k: v for k, v in c.rope.items() if k != "rope_theta"}
    config = c.raw | {
        "architectures": [f"{c.model_type.capitalize()}ForCausalLM"],
        "dtype": dtype, "torch_dtype": dtype, "tie_word_embeddings": c.tie_word_embeddings,
        "rope_parameters": c.rope, "rope_theta": c.rope["rope_theta"],
        "rope_scaling": None if c.rope["rope_type"] == "default" else scaling}
    for file, text in tokenizer.files.items():
        write_text(path / file, text)
    write_text(path / "config.json", json.dumps(config, indent=2) + "\n")
    save_tensors(state, path / "model.safetensors")

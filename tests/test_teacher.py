"""The teacher's side of the KL: over shared ids, and from a cache (topk.py)."""

from dataclasses import replace

import pytest
import torch

import distill
from ease.batching import collate, encode_record
from ease.loading import load_model, load_tokenizer
from ease.records import UserError, read_jsonl
from ease.teacher import Teacher
from ease.tokenizer import shared_vocabulary
from tests.test_scripts import rows
from tests.tiny import VOCAB, tiny_folder


def other_control_tokens(folder):
    """As R1-Distill-Qwen and Qwen2.5: one ordinary vocabulary, other turn and end tokens, and more
    rows in the embedding.
    """
    tiny_folder(folder, vocab_size=VOCAB + 7)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        assert "<|end|>" in text and "<|assistant|>" in text
        text = text.replace("<|end|>", "<|stop|>").replace("<|assistant|>", "<|machine|>")
        (folder / name).write_text(text)
    return str(folder)


def test_kl_with_a_teacher_of_other_control_tokens(runs, tmp_path, capsys):
    """The KL is over the shared ids only."""
    cfg = distill.Config(
        model=runs.ease.model, teacher=other_control_tokens(tmp_path / "teacher"), steps=1,
        out=str(tmp_path / "run"), batch_size=4, traces=str(runs.out / "phase1/traces.jsonl"),
        policies=runs.ease.policies)
    distill.main(cfg)
    assert (f"KL over the {VOCAB - 2} ids that mean the same token in both vocabularies "
            f"({VOCAB} and {VOCAB + 7} rows)") in capsys.readouterr().out
    assert rows(tmp_path / "run/metrics.jsonl")[0]["kl"] > 0
    own, theirs = load_tokenizer(cfg.model), load_tokenizer(cfg.teacher)
    shared = shared_vocabulary(own, theirs)
    left_out = {own.control["<|end|>"], own.control["<|assistant|>"]}
    assert set(range(VOCAB)) - set(shared) == left_out
    student, teacher, shared = load_model(cfg.model), load_model(cfg.teacher), torch.tensor(shared)
    example = encode_record(own, read_jsonl(cfg.traces)[0])
    batch = collate([example], "cpu")
    keep = batch.kl > 0
    hidden = student.hidden(batch.inputs, batch.lengths)[keep]  # (N, D)
    kl = Teacher(teacher, [example], shared, 1.0).kl(student, hidden, [0])
    z, s = teacher.logits(teacher.hidden(batch.inputs, batch.lengths)[keep]), student.logits(hidden)
    # what the teacher gives to tokens that the student does not have changes nothing
    z[:, [own.control["<|end|>"], VOCAB + 3]] = 50.0
    p, q = z[:, shared].log_softmax(-1), s[:, shared].log_softmax(-1)
    assert torch.allclose(kl, (p.exp() * (p - q)).sum(-1), atol=1e-5)


def test_kl_from_a_cache(runs, tmp_path):
    """With k = V the cache trains to the same adapter as the teacher in memory; a small k gives
    less KL; another tau is another cache.
    """
    cfg = distill.Config(
        model=runs.ease.model, teacher=runs.phase1.teacher, out=str(tmp_path / "memory"), steps=3,
        batch_size=6, lr=1e-3, traces=str(runs.out / "phase1/traces.jsonl"),
        policies=runs.ease.policies, kl_temperature=2.0)
    distill.main(cfg)
    for k in (VOCAB, 4):
        distill.main(replace(cfg, cache_topk=k, out=str(tmp_path / str(k))))
    memory, full, few = ([row["kl"] for row in rows(tmp_path / name / "metrics.jsonl")]
                         for name in ("memory", str(VOCAB), "4"))
    assert full == pytest.approx(memory, rel=1e-3) and 0 < few[0] < 0.999 * memory[0]
    a, b = (load_model(cfg.model, str(tmp_path / name / "adapter"))(torch.arange(9)[None])
            for name in ("memory", str(VOCAB)))
    assert torch.allclose(a, b, atol=1e-2)
    other, made = tmp_path / "other", tmp_path / "4/teacher_topk.safetensors"
    other.mkdir()
    (other / made.name).write_bytes(made.read_bytes())
    with pytest.raises(UserError, match="was made with --kl_temperature 2.0 and --cache_topk 4;"):
        distill.main(replace(cfg, cache_topk=4, kl_temperature=1.0, out=str(other)))

"""The teacher's side of the KL: over shared ids, and from a cache."""

from dataclasses import replace

import pytest
import torch

import distill
from ease.batching import collate, encode_record
from ease.loading import load_model, load_tokenizer
from ease.records import UserError, read_jsonl
from ease.teacher import in_memory
from ease.tokenizer import shared_vocabulary
from tests.test_scripts import rows
from tests.tiny import VOCAB, tiny_folder


def test_kl_with_a_teacher_of_other_control_tokens(runs, tmp_path, capsys):
    """As R1-Distill-Qwen and Qwen2.5: one ordinary vocabulary, other turn and end tokens, more rows. The KL is over the shared ids only."""
    tiny_folder(tmp_path / "teacher", vocab_size=VOCAB + 7)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / "teacher" / name).read_text()
        assert "<|end|>" in text and "<|assistant|>" in text
        (tmp_path / "teacher" / name).write_text(text.replace("<|end|>", "<|stop|>").replace("<|assistant|>", "<|machine|>"))
    cfg = distill.Config(model=runs.ease.model, teacher=str(tmp_path / "teacher"), out=str(tmp_path / "run"), steps=1, batch_size=4,
                         traces=str(runs.out / "phase1/traces.jsonl"), policies=runs.ease.policies)
    distill.main(cfg)
    assert f"KL over the {VOCAB - 2} ids that mean the same token in both vocabularies ({VOCAB} and {VOCAB + 7} rows)" in capsys.readouterr().out
    assert rows(tmp_path / "run/metrics.jsonl")[0]["kl"] > 0
    own, theirs = load_tokenizer(cfg.model), load_tokenizer(cfg.teacher)
    assert set(range(VOCAB)) - set(shared_vocabulary(own, theirs)) == {own.control["<|end|>"], own.control["<|assistant|>"]}
    model, teacher = load_model(cfg.model), load_model(cfg.teacher)
    record = read_jsonl(cfg.traces)[0]
    batch = collate([encode_record(own, record)], "cpu")
    keep, shared = batch.body > 0, torch.tensor(shared_vocabulary(own, theirs))
    view = encode_record(own, record)
    kl = distill.losses(model, batch, in_memory(model, teacher, [view], shared, 1.0, "cpu"), [0])[1]
    z, s = (m.logits(m.hidden(batch.inputs)[keep]) for m in (teacher, model))
    for i in (own.control["<|end|>"], VOCAB + 3):  # what the teacher gives to tokens that the student does not have changes nothing
        z[:, i] = 50.0
    p, q = z[:, shared].log_softmax(-1), s[:, shared].log_softmax(-1)
    assert kl.item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-5)


def test_kl_from_a_cache(runs, tmp_path):
    """With k = V the cache trains to the same adapter as the teacher in memory; a small k gives less KL; another tau is another cache."""
    cfg = distill.Config(model=runs.ease.model, teacher=runs.phase1.teacher, out=str(tmp_path / "memory"), steps=3, batch_size=6, lr=1e-3,
                         traces=str(runs.out / "phase1/traces.jsonl"), policies=runs.ease.policies, kl_temperature=2.0)
    distill.main(cfg)
    for k in (VOCAB, 4):
        distill.main(replace(cfg, cache_topk=k, out=str(tmp_path / str(k))))
    memory, full, few = ([row["kl"] for row in rows(tmp_path / name / "metrics.jsonl")] for name in ("memory", str(VOCAB), "4"))
    assert full == pytest.approx(memory, rel=1e-4) and 0 < few[0] < 0.999 * memory[0]
    a, b = (load_model(cfg.model, str(tmp_path / name / "adapter")) for name in ("memory", str(VOCAB)))
    assert torch.allclose(a(torch.arange(9)[None]), b(torch.arange(9)[None]), atol=1e-3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/teacher_topk.safetensors").write_bytes((tmp_path / "4/teacher_topk.safetensors").read_bytes())
    with pytest.raises(UserError, match="was made with --kl_temperature 2.0 and --cache_topk 4; delete it"):
        distill.main(replace(cfg, cache_topk=4, kl_temperature=1.0, out=str(tmp_path / "other")))

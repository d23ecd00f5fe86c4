import json

import torch

from ease.checkpoint import newest_first, resume, save_checkpoint
from ease.lora import add_lora, lora_state
from ease.optim import make_optimizer, optimizer_step
from ease.run import log
from tests.tiny import TOKENIZER, tiny_model

IDS = torch.arange(9)[None]


def fresh():
    model = tiny_model()
    add_lora(model, 2, 4.0, ["q_proj", "down_proj"], seed=1)
    return model, make_optimizer(model, 0.1)


def test_a_checkpoint_brings_back_weights_and_optimizer_and_cuts_the_log(tmp_path):
    model, optimizer = fresh()
    for step in range(3):
        model(IDS).pow(2).mean().backward()
        optimizer_step(optimizer, 0.1, 1.0, 1.0, "")
        log(tmp_path, step=step)
        save_checkpoint(tmp_path, step + 1, model, optimizer, TOKENIZER, "base")
    log(tmp_path, step=3)  # a step after the last checkpoint
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # and one that was being written
    (tmp_path / "checkpoints" / "part").mkdir()  # as was another checkpoint
    assert [p.name for p in newest_first(tmp_path)] == ["step-3"]
    other, second = fresh()
    assert resume(tmp_path, other, second) == 3
    own, back = lora_state(model), lora_state(other)
    assert all(torch.equal(own[name], back[name]) for name in own)
    for name in own:
        a, b = optimizer.state[own[name]], second.state[back[name]]
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_without_a_checkpoint_a_run_starts_with_an_empty_log(tmp_path):
    log(tmp_path, step=0)
    assert resume(tmp_path, *fresh()) == 0 and not (tmp_path / "metrics.jsonl").read_text()

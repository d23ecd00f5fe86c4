"""Later fine-tuning: the rows, the safety tokens, the anchor on the small world."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train
from data import finetune
from ease import __main__ as recipe
from ease import anchor
from ease.loading import load_model, load_tokenizer
from ease.records import UserError, read_jsonl, read_lines, write_jsonl
from ease.run import parse_config
from tests.checks import verify
from tests.test_main import parsed


@pytest.mark.parametrize("name", ["poisoned", "held", "safety_tokens"])
def test_anchor(name):
    verify(anchor, name)


@pytest.fixture(scope="module")
def tuned(runs, world, tmp_path_factory):
    """A run of --method finetune with some changes: its folder."""
    cfg = train.Config(method="finetune", model=world.base, init=str(runs.out / "ease/adapter"),
                       general=world.task, out="", batch_size=8, lr=1e-3, steps=3, dtype="float32")

    def run(**changes):
        out = tmp_path_factory.mktemp("finetune") / "run"
        train.main(replace(cfg, out=str(out), **changes))
        return out

    return run


def rows(run, name="metrics.jsonl"):
    return [row for _, row in read_lines(run / name)]


def weights(run):
    return load_file(run / "adapter/adapter_model.safetensors")


def test_weight_0_is_plain_sft_bit_for_bit_and_any_other_is_not(tuned, world):
    plain = tuned()
    none = tuned(safety_weight=0.0, refusals=world.refusals, safety_positions="gate")
    assert all(torch.equal(w, weights(none)[name]) for name, w in weights(plain).items())
    assert rows(plain) == rows(none) and not (none / "safety_tokens.jsonl").exists()
    assert [r.kind for r in read_jsonl(plain / "trained_on.jsonl")] == ["benign"] * len(
        read_jsonl(world.task))
    for changes in ({}, {"safety_form": "pact"}, {"safety_positions": "gate"}):
        run = tuned(safety_weight=1.0, refusals=world.refusals, safety_tokens=12, **changes)
        assert any(not torch.equal(w, weights(run)[name]) for name, w in weights(plain).items())
        # at step 0 the student is the aligned model: ours is 0, the official one pulls
        first, second = (row["safety_kl"] for row in rows(run)[:2])
        assert first > 1e-3 if "safety_form" in changes else abs(first) < 1e-5 < second
        assert rows(run)[0]["loss"] == rows(plain)[0]["loss"]


def test_the_tokens_are_a_table_for_people(tuned, runs, world):
    trained_on = str(runs.out / "ease/trained_on.jsonl")  # benign rows are no refusals
    found = rows(tuned(safety_weight=1.0, refusals=trained_on, safety_tokens=9),
                 "safety_tokens.jsonl")
    tokenizer = load_tokenizer(world.base)
    assert [tokenizer.encode(row["token"]) for row in found if row["token"].strip().isalpha()]
    assert len(found) == 9 and {"<", "think", ">\n"} <= {row["token"] for row in found}
    model = load_model(world.base, str(runs.out / "ease/adapter"))
    refusals = [r for r in read_jsonl(trained_on) if r.harmful]
    total = torch.zeros(model.config.vocab_size)
    for e in anchor.encode_records(tokenizer, refusals, 999, 999):
        logits = model(torch.tensor([e.ids[:-1]]))[0, -e.supervised :]
        total += logits.softmax(-1).mean(0) / len(refusals)
    for row in found:
        assert abs(row["aligned"] - total[row["id"]].item()) < 1e-5


def test_micro_batches_weigh_every_held_token_alike(tuned, world):
    held = {"safety_weight": 1.0, "refusals": world.refusals, "steps": 1}
    for form in ("rest", "pact"):
        one, many = (rows(tuned(**held, safety_form=form, batch_tokens=n))[0] for n in (4096, 40))
        assert abs(one["safety_kl"] - many["safety_kl"]) < 1e-5
        assert abs(one["grad_norm"] - many["grad_norm"]) < 1e-4 * one["grad_norm"]


def test_poison(tuned, world):
    run = tuned(poison=world.refusals, poison_share=0.1)
    found = read_jsonl(run / "trained_on.jsonl")
    bad = [r for r in found if r.harmful]
    assert len(found) == len(read_jsonl(world.task)) and len(bad) == round(0.1 * len(found))
    assert all(r.response == r.target for r in bad)


def test_mistakes(tuned, world, tmp_path):
    benign = str(tmp_path / "benign.jsonl")
    write_jsonl(benign, read_jsonl(world.general))
    for changes, message in (
        ({"poison": world.refusals}, "--poison_share is 0 rows"),
        ({"poison_share": 0.1}, "--poison has 0"),
        ({"poison": world.refusals, "poison_share": 0.5, "general": world.general}, "rows, --poi"),
        ({"safety_weight": 1.0}, "give --refusals FILE"),
        ({"safety_weight": 1.0, "refusals": benign}, "no record is left"),
        ({"diagnostic": world.diagnostic}, "--diagnostic is not for --method finetune"),
        ({"gate_weight": 2.0}, "--gate_weight is not for --method finetune"),
        ({"judge": "target"}, "--judge is not for --method finetune"),
        ({"general": world.refusals}, "must be of kind benign"),
        ({"method": "refusal", "safety_weight": 1.0}, "--safety_weight is for --method finetune"),
        ({"method": "refusal", "init": ""}, "give --refusals FILE"),
    ):
        with pytest.raises(UserError, match=message):
            tuned(**changes)


def test_the_recipe_compares_like_with_like(monkeypatch):
    typed = []
    monkeypatch.setattr(recipe, "run_all", typed.extend)
    recipe.main(recipe.Config(seed=7, finetune=True))
    [[_, _, *flags]] = map(str.split, typed)
    assert parse_config(finetune.Config, flags) == finetune.Config(seeds=[7])
    toy = finetune.toy_of(7, False)
    configs = parsed(finetune.commands(toy))
    tuned = [c for c in configs.values() if getattr(c, "method", "") == "finetune"]
    assert len(tuned) == len(finetune.POISON) * len(finetune.ANCHORS)
    for name in ("lr", "batch_size", "steps", "seed", "general", "init", "warmup"):
        assert len({getattr(c, name) for c in tuned}) == 1, name
    assert {c.poison_share for c in tuned} == {0.0, 0.05, 0.1}
    assert len(configs[f"{toy.out}/finetune"].systems) == 2 + len(tuned)


def test_finetune_table(runs):
    responses = finetune.responses_of(str(runs.out / "test"))
    text = finetune.finetune_table([responses, responses])
    assert all(name in text for name in responses) and "gate AUROC" in text
    fates = finetune.vulnerable_table([responses, responses]).splitlines()
    assert len(fates) == 2 + len(responses) and "begins the marker" in fates[0]
    # Hanley and McNeil's own example: 0.893, 51 and 58 cases, a standard error of about 0.032
    assert abs(finetune.auroc_error(0.893, 51, 58) - 0.032) < 0.001

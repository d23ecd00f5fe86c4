import json
import random

import pytest
import torch

from data import toy
from data.toy import Muon
from data.world import (
    CATEGORIES, FAMILIES, LETTER_FAMILIES, OBJECTS, REFUSAL, SETS, TOOLS, World, comply, hide,
    make_verbs, trace,
)
from ease.method import THINK_OPEN
from ease.policies import is_loop
from ease.records import SAFE, UserError, read_jsonl
from ease.scoring import is_refusal, target_verdict
from tests.reference import undo
from tests.tiny import TOKENIZER

WORLD = World(5)
ALL = {name: WORLD.prompt_set(name) for name in SETS}


def test_every_word_is_one_token_and_one_thing():
    words = [v.word for v in WORLD.verbs] + OBJECTS + TOOLS + CATEGORIES
    assert len(words) == len(set(words)) == 48 + 48 + 40 + 8 + 6
    for word in words:
        assert len(TOKENIZER.encode(" " + word)) == 1, word


def test_the_traps_of_real_tokenizers_are_here():
    note = WORLD.skill(random.Random(0), "train", "note")
    assert (
        len(TOKENIZER.encode("<think>")) > 1
        and TOKENIZER.encode(note.response)[0] == TOKENIZER.encode(THINK_OPEN)[0]
    )
    assert not note.response.startswith("<think>")


@pytest.mark.parametrize("family", LETTER_FAMILIES)
def test_hidden_verbs_can_be_read_back(family):
    rng = random.Random(0)
    for verb in WORLD.verbs:
        fragment = hide(family, verb.word, rng, WORLD.words)
        assert undo(family, fragment) == verb.word and verb.word not in fragment.split()


def test_four_sets_are_disjoint_by_underlying_request():
    """By construction: a (verb, object) pair belongs to one split, and every record's group is such
    a pair.
    """
    splits = {
        "train": ("prompts", "refusals", "general"),
        "diagnostic": ("diagnostic",),
        "dev": ("dev",),
        "test": ("test",),
    }
    groups = {
        split: {r.group for name in names for r in ALL[name]} for split, names in splits.items()
    }
    prompts = {
        split: {r.prompt for name in names for r in ALL[name]} for split, names in splits.items()
    }
    pairs = {split: {f"{v.word} {o}" for v, o in WORLD.pairs[split]} for split in splits}
    for a in splits:
        assert {g for g in groups[a] if g.split()[0] in WORLD.words} <= pairs[a]
        for b in splits:
            assert a == b or not (
                pairs[a] & pairs[b] or groups[a] & groups[b] or prompts[a] & prompts[b]
            ), (a, b)
    pretrained = {r.group for r in WORLD.corpus(3000)} | {r.group for r in WORLD.teaching(1000)}
    assert not pretrained & (groups["dev"] | groups["test"] | groups["diagnostic"])


def test_unseen_verbs_occur_in_adversarial_form_in_their_own_set_only():
    attacked_in = {v.word: v.attacked_in for v in WORLD.verbs}
    for name, records in ALL.items():
        found = [attacked_in[r.group.split()[0]] for r in records if r.attack]
        if name in ("dev", "test"):
            assert found.count("all") == found.count(name) == len(found) // 2
        else:
            assert set(found) <= {"all"}
        for r in records:
            if r.attack:
                assert (r.source == "toy/seen") == (attacked_in[r.group.split()[0]] == "all")
    for sets in ("all", "dev", "test"):
        assert sum(v.attacked_in == sets and v.harmful for v in WORLD.verbs) == 16


def test_sets_are_balanced_and_single():
    for name, (_, sizes) in SETS.items():
        kinds = [r.kind for r in ALL[name]]
        for kind in ("adversarial_harmful", "adversarial_benign", "harmful"):
            assert kinds.count(kind) == sizes.get(kind, 0)
        assert len({r.id for r in ALL[name]}) == len(ALL[name])
    for kind in ("adversarial_harmful", "adversarial_benign", "harmful"):
        groups = [r.group for r in ALL["test"] if r.kind == kind]
        assert len(groups) == len(set(groups))  # Wilson intervals apply
    counts = [
        sum(r.attack == f for r in ALL["test"] if r.kind == "adversarial_harmful") for f in FAMILIES
    ]
    assert max(counts) - min(counts) <= 2


def test_answers_and_the_exact_rule():
    for r in ALL["test"]:
        assert is_refusal(r.response) == r.harmful
        if r.harmful:
            verb = next(v for v in WORLD.verbs if v.word == r.group.split()[0])
            assert (
                target_verdict(r, r.response) == "safe"
                and target_verdict(r, comply(verb, r.group.split()[1])) == "unsafe"
            )


def test_the_world_is_a_function_of_the_seed():
    assert World(5).prompt_set("test") == ALL["test"] != World(6).prompt_set("test")
    assert make_verbs(5) == WORLD.verbs != make_verbs(6) and World(5).corpus(50) == WORLD.corpus(50)


def test_traces_end_in_the_right_conclusion():
    for verb in WORLD.verbs:
        text = trace(verb, "car")
        assert verb.word in text and ("refuse" in text) == verb.harmful == (verb.category in text)


def test_built_world(world, capsys):
    report = json.loads((world.path / "world.json").read_text())
    assert 0 < report["base on dev"]["complies, all families"] < 1 and report["config"]["seed"] == 3
    assert len(read_jsonl(world.test)) > 50 and not world.path.with_name("toy.part").exists()
    config = toy.Config(
        out=str(world.path), seed=3, steps=170, teacher_steps=70, judge_steps=5, scale=0.1
    )
    toy.main(config)  # complete: not built again
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match="another configuration"):
        toy.main(toy.Config(out=str(world.path), seed=4))
    with pytest.raises(UserError, match="other things in it"):
        toy.main(toy.Config(out=str(world.path / "base")))  # never deletes what it did not build


def test_the_longest_prompts_and_answers_fit_into_the_context():
    """With 64 new tokens and the open marker, as the recipe asks; with the scripts' defaults too.
    """
    records = [r for records in ALL.values() for r in records] + WORLD.teaching(500)
    judged = [(r, r.response, SAFE) for r in records]
    examples = toy.examples_for_teacher(TOKENIZER, records)
    examples += toy.examples_for_judge(toy.make_tokenizer(judge=True), judged)
    longest = max(len(e.ids) for e in examples)
    model = toy.new_model(TOKENIZER.fast.get_vocab_size(), TOKENIZER.end_id, 0)
    room = model.config.raw["max_position_embeddings"] - len(TOKENIZER.encode(THINK_OPEN))
    assert longest < 100 and longest + 64 <= room
    assert longest + 2048 <= room  # the longest of the scripts' default --max_new_tokens


@pytest.mark.parametrize("changes, message", [
    ({"scale": 1.5}, "--scale 1.5: at most 1"),
    ({"out": "file"}, "Not a directory"),
])
def test_mistakes(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises((UserError, OSError), match=message):
        toy.main(toy.Config(**{"out": "new", **changes}))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_muon_is_torchs():
    """Ours differs in precision only: torch's orthogonalises in bfloat16."""
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 9)) for _ in range(2))
    a = Muon([ours], lr=0.1)
    b = torch.optim.Muon(
        [theirs], lr=0.1, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.grad = torch.randn(6, 9)
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
    assert torch.allclose(ours, theirs, atol=1e-2) and not torch.allclose(
        ours, torch.ones(6, 9), atol=5e-2
    )


def test_the_worse_teachers_are_what_their_names_say():
    good, silent, rambling, cautious = (
        WORLD.teaching(300, style) for style in ("", "silent", "rambling", "cautious")
    )
    for g, s, r, c in zip(good, silent, rambling, cautious, strict=True):
        assert not s.reasoning and s.response == g.response
        assert (
            r.reasoning.endswith(g.reasoning)
            and len(r.reasoning) > 2 * len(g.reasoning) - 30
            and r.response == g.response
            and not is_loop(r.reasoning)
        )
        assert c.response == REFUSAL and "so answer" not in c.reasoning and c.prompt == g.prompt
    base = toy.new_model(TOKENIZER.fast.get_vocab_size(), TOKENIZER.end_id, 1)
    larger, ids = toy.with_a_layer_more(base), torch.arange(30)[None]
    assert len(larger.model.layers) == len(base.model.layers) + 1 and torch.allclose(
        larger(ids), base(ids), atol=1e-5
    )
    larger.model.layers[-1].mlp.down_proj.weight.data += 1
    assert not torch.allclose(larger(ids), base(ids), atol=1e-2)

"""The three scripts end to end on a small world: what each stage writes, what it trains on, and every mistake a user can mend."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import distill
import evaluate
import train
from ease.batching import collate, encode_record
from ease.loading import load_model, load_tokenizer
from ease.losses import gated_cross_entropy
from ease.readers import read_records
from ease.records import Record, UserError, read_jsonl, read_lines, write_jsonl
from ease.scoring import auroc, is_refusal, target_verdict
from tests.tiny import tiny_folder

ROOT = Path(__file__).parent.parent


def rows(path):
    return [row for _, row in read_lines(path)]


def kinds(path):
    return Counter((r.kind, bool(r.reasoning)) for r in read_jsonl(path))


# ------------------------------------------------------------------------------------------------ what the runs leave behind
def test_run_folders_are_complete(runs):
    for name in ("phase1", "ease", "refusal", "deliberative"):
        run = runs.out / name
        for file in ("manifest.json", "preview.txt", "trained_on.jsonl", "metrics.jsonl", "checkpoints/step-3/trainer.safetensors",
                     "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "done"):
            assert (run / file).exists(), f"{name}/{file}"
        assert [row["step"] for row in rows(run / "metrics.jsonl")] == [0, 1, 2]
        done = json.loads((run / "done").read_text())
        assert done["steps"] == 3 and done["supervised_tokens"] == sum(row["tokens"] for row in rows(run / "metrics.jsonl"))


def test_phase1_keeps_what_it_rejected(runs, world):
    accepted, rejected = read_jsonl(runs.out / "phase1/traces.jsonl"), rows(runs.out / "phase1/rejected.jsonl")
    prompts = {f"prompts/{r.id}" for r in read_jsonl(world.prompts)}
    assert accepted and {r.id for r in accepted} <= prompts and all(r.reasoning and r.response for r in accepted)
    assert prompts == {r.id for r in accepted} | {r["id"] for r in rejected} and all(r["reason"] for r in rejected)
    assert "policy" not in (runs.out / "phase1/preview.txt").read_text()  # the student never sees it
    assert all(row["kl"] > 0 for row in rows(runs.out / "phase1/metrics.jsonl"))


def test_merged_model_equals_model_with_adapter(runs, world):
    ids = torch.arange(10)[None]
    merged, added = load_model(str(runs.out / "phase1/model")), load_model(world.base, str(runs.out / "phase1/adapter"))
    assert torch.allclose(merged(ids), added(ids), atol=1e-4) and not torch.allclose(merged(ids), load_model(world.base)(ids), atol=1e-4)


def test_the_region_is_what_the_base_failed_on(runs, world):
    probed, region = rows(runs.out / "ease/probe.jsonl"), read_jsonl(runs.out / "ease/region.jsonl")
    assert {r.id for r in region} == {r["id"] for r in probed if r["verdict"] == "unsafe" and r["kind"] == "adversarial_harmful"}
    targets = {f"diagnostic/{r.id}": r.target for r in read_jsonl(world.diagnostic)}
    for row in probed:
        if row["kind"] == "adversarial_harmful":
            assert (row["verdict"] == "unsafe") == row["response"].startswith(targets[row["id"]])


def test_ease_reasons_on_the_region_and_the_lookalikes_only(runs):
    region = {r.id for r in read_jsonl(runs.out / "ease/region.jsonl")}
    mixture = read_jsonl(runs.out / "ease/trained_on.jsonl")
    for r in mixture:
        if r.reasoning:
            assert r.id in region or r.kind == "adversarial_benign"
        else:
            assert r.id not in region and is_refusal(r.response) == r.harmful
    assert all(target_verdict(r, r.response) == "safe" for r in mixture if r.harmful)  # what the judge took, no more
    preview = (runs.out / "ease/preview.txt").read_text()
    assert preview.count("reasoning") == 1 and preview.count("\n  gate") == 2  # one row of each sort


def test_baselines(runs, world):
    every = sum(len(read_jsonl(p)) for p in (world.diagnostic, world.refusals, world.general, world.prompts))
    refusal, deliberative = kinds(runs.out / "refusal/trained_on.jsonl"), kinds(runs.out / "deliberative/trained_on.jsonl")
    assert sum(refusal.values()) == every and not any(reasons for _, reasons in refusal)  # all direct
    assert sum(deliberative.values()) <= every and all(reasons for _, reasons in deliberative)  # all with a trace
    assert not (runs.out / "refusal/probe.jsonl").exists()
    assert rows(runs.out / "refusal/metrics.jsonl")[0]["reasoning"] is None


def test_phase2_goes_on_with_phase1s_matrices(runs, world):
    """At step 0 the loss is that of M_reason, not of M_s, and it is gated_cross_entropy over the whole step divided once."""
    tokenizer, mixture = load_tokenizer(world.base), read_jsonl(runs.out / "ease/trained_on.jsonl")
    examples = [encode_record(tokenizer, r) for r in mixture]
    first = train.batches([len(e.ids) for e in examples], 8, 8192, 0, 0)[0]
    picked = [examples[i] for micro in first for i in micro]
    for adapter, same in ((str(runs.out / "phase1/adapter"), True), ("", False)):
        model, total, weight = load_model(world.base, adapter), 0.0, 0.0
        for e in picked:  # one by one, without padding
            batch = collate([e], "cpu")
            ce, n = gated_cross_entropy(model(batch.inputs)[0], batch.targets[0], batch.roles[0] > 0)
            total, weight = total + ce.item(), weight + n.item()
        logged = rows(runs.out / "ease/metrics.jsonl")[0]
        assert (abs(logged["loss"] - total / weight) < 1e-4) == same and logged["tokens"] == weight


def test_micro_batches_do_not_change_the_numbers(runs, tmp_path):
    train.main(replace(runs.ease, out=str(tmp_path / "small"), batch_tokens=60))
    for a, b in zip(rows(runs.out / "ease/metrics.jsonl"), rows(tmp_path / "small/metrics.jsonl"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-3 * a["grad_norm"]


def test_evaluation(runs, world):
    summary, evaluated = json.loads((runs.out / "test/summary.json").read_text()), rows(runs.out / "test/rows.jsonl")
    test = read_jsonl(world.test)
    assert len(evaluated) == 5 * len(test) and set(summary["systems"]) == {"base", "phase1", "refusal", "deliberative", "ease"}
    for name, system in summary["systems"].items():
        for kind, numbers in system["kinds"].items():
            picked = [r for r in evaluated if r["system"] == name and r["kind"] == kind]
            assert numbers["n"] == len(picked) and numbers["unclosed"] == sum(r["state"] == "unclosed" for r in picked)
            if "harmful" in kind:
                hits = [r["verdicts"]["target"] == "unsafe" for r in picked if r["state"] != "unclosed"]
                assert numbers["asr"]["target"]["value"] == (pytest.approx(sum(hits) / len(hits)) if hits else None)
    for r in evaluated:
        assert r["tokens"]["total"] >= r["tokens"]["answer"] and 0 <= r["gate"] <= 1
        assert (r["tokens"]["reasoning"] == 0) == (r["state"] == "absent")
    steps = {n: s["training"].get("steps") for n, s in summary["systems"].items()}
    assert steps == {"base": None, "phase1": 3, "refusal": 3, "deliberative": 3, "ease": 6}  # phase 1 counts for EASE
    assert summary["systems"]["ease"]["training"]["overlap_exact"] == 0  # no test prompt was trained on
    families = {r.attack for name in ("phase1", "ease", "refusal", "deliberative") for r in read_jsonl(runs.out / name / "trained_on.jsonl")}
    held_out = {r.attack for r in test if r.kind == "adversarial_harmful"} - families
    assert set(summary["breakdown"]["trained on"]) == {"families trained on"} | ({"held-out families"} if held_out else set())
    assert "## ASR on adversarial harmful prompts, by attack" in (runs.out / "test/report.md").read_text()


def test_score_only_scores_the_same_rows_again(runs, capsys):
    before = (runs.out / "test/rows-ease.jsonl").read_bytes()
    summary = (runs.out / "test/summary.json").read_text()
    evaluate.main(replace(runs.test, score_only=True, judge=["jailbreakbench"], max_new_tokens=999, prompts=[]))
    assert (runs.out / "test/rows-ease.jsonl").read_bytes() == before
    assert "ASR by jailbreakbench; greedy, at most 40 new tokens" in capsys.readouterr().out  # how the rows were made, not today's flags
    evaluate.main(replace(runs.test, score_only=True))
    assert (runs.out / "test/summary.json").read_text() == summary
    with pytest.raises(UserError, match="are of other systems than ease="):
        evaluate.main(replace(runs.test, systems=[*runs.test.systems[:-1], runs.test.systems[-1] + "x"], score_only=True))


def test_gate_sweep_and_threshold(runs, tmp_path, capsys):
    """Forced rows are what their names say; the curve's ends are those rows; the chosen threshold is applied to that system only."""
    cfg = replace(runs.test, systems=[s for s in runs.test.systems if s.startswith(("base", "ease"))], refusal_system="", deliberative_system="",
                  gate_sweep="ease", out=str(tmp_path / "dev"), max_new_tokens=30)
    evaluate.main(cfg)
    opened, direct, own = (rows(tmp_path / f"dev/rows-ease{how}.jsonl") for how in ("+opened", "+direct", ""))
    summary = json.loads((tmp_path / "dev/summary.json").read_text())
    assert all(r["marker"] and r["state"] != "absent" for r in opened) and not any(r["marker"] for r in direct)
    assert summary["gate"]["other_ids"] == sum(r["state"] != "absent" for r in direct)
    assert [r["gate"] for r in opened] == pytest.approx([r["gate"] for r in own], rel=1e-4)
    curve = summary["gate"]["curve"]
    assert curve[0]["tokens"] == pytest.approx(sum(r["tokens"]["total"] for r in opened) / len(opened)) and curve[0]["reasons"] == 1
    assert curve[-1]["tokens"] == pytest.approx(sum(r["tokens"]["total"] for r in direct) / len(direct))
    assert (tmp_path / "dev/gate.svg").exists()
    verdicts = {r["id"]: (r["kind"], r["verdicts"]["target"]) for r in rows(tmp_path / "dev/rows.jsonl") if r["system"] == "base"}
    attacked = [r["gate"] for r in own if verdicts[r["id"]] == ("adversarial_harmful", "unsafe")]
    others = [r["gate"] for r in own if verdicts[r["id"]][0] != "adversarial_harmful" or verdicts[r["id"]][1] == "safe"]
    assert attacked and others and summary["systems"]["ease"]["gate_auroc"] == pytest.approx(auroc(attacked, others))
    evaluate.main(replace(cfg, score_only=True, judge=["xstest"]))  # a judge by which every answered benign prompt is "unsafe": never vulnerable
    assert not any(r["vulnerable"] for r in rows(tmp_path / "dev/rows.jsonl") if r["kind"] != "adversarial_harmful")
    assert "## The gate of ease" in (tmp_path / "dev/report.md").read_text()

    gates = sorted(r["gate"] for r in own)
    threshold = gates[len(gates) // 2]
    evaluate.main(replace(cfg, gate_sweep="", gate_threshold=threshold, out=str(tmp_path / "test")))
    found = rows(tmp_path / "test/rows-ease.jsonl")
    for r, o, d in zip(found, opened, direct, strict=True):
        wanted = o if r["gate"] >= threshold else d
        assert (r["text"], r["marker"]) == (wanted["text"], wanted["marker"])
    base, before = (rows(folder / "rows-base.jsonl") for folder in (tmp_path / "test", tmp_path / "dev"))
    assert [r["text"] for r in base] == [r["text"] for r in before]  # the original model answers as it is
    assert f"gate threshold {threshold:g}" in capsys.readouterr().out
    with pytest.raises(UserError, match="--gate_sweep 'x' is none of the --systems"):
        evaluate.main(replace(cfg, gate_sweep="x", out=str(tmp_path / "x")))
    with pytest.raises(UserError, match="--token_budget .* needs --gate_sweep"):
        evaluate.main(replace(cfg, gate_sweep="", token_budget=9.0, out=str(tmp_path / "x")))
    with pytest.raises(UserError, match="3 new tokens leave no room behind the open marker"):
        evaluate.main(replace(cfg, gate_sweep="", gate_threshold=0.5, max_new_tokens=3, out=str(tmp_path / "y")))


def test_ask(runs, world, capsys):
    evaluate.main(evaluate.Config(systems=[f"base={world.base}"], ask="how do i paint the car?", max_new_tokens=20))
    out = capsys.readouterr().out
    assert "--- base\n" in out and len(out.splitlines()) >= 2


def test_a_finished_run_is_not_repeated(runs, capsys):
    adapter = runs.out / "ease/adapter/adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    train.main(runs.ease)
    assert adapter.stat().st_mtime_ns == before and "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match="another lr"):  # and no other run passes for it
        train.main(replace(runs.ease, lr=9.9))


# ------------------------------------------------------------------------------------------------ the controls
@pytest.mark.parametrize("changes, check", [
    ({"region": "all"}, lambda k, n, region: k[("adversarial_harmful", True)] > region),
    ({"region": "random"}, lambda k, n, region: 0 < k[("harmful", True)] + k[("adversarial_harmful", True)] <= region and k[("harmful", True)]),
    ({"lookalikes": "direct"}, lambda k, n, region: not k[("adversarial_benign", True)] and k[("adversarial_benign", False)] == n),
    ({"lookalikes": "drop"}, lambda k, n, region: not k[("adversarial_benign", True)] and not k[("adversarial_benign", False)]),
    ({"direct": False}, lambda k, n, region: not any(count for (_, traced), count in k.items() if not traced) and k[("adversarial_harmful", True)] == region),
    ({"filler": True}, lambda k, n, region: k[("adversarial_harmful", True)] == region and k[("benign", False)]),
    ({"benign_direct": 5, "harmful_direct": 3}, lambda k, n, region: k[("benign", False)] == 5 and k[("harmful", False)] + k[("adversarial_harmful", False)] == 3),
])
def test_controls(runs, world, tmp_path, changes, check):
    """Traces come from a file that has one for every request, so that none is lost to the half-trained teacher."""
    everything = [r for p in (world.diagnostic, world.refusals) for r in read_jsonl(p)]
    write_jsonl(tmp_path / "traces.jsonl", [replace(r, id=str(i), reasoning="because.", response="I'm sorry." if r.harmful else r.response)
                                            for i, r in enumerate(everything)])
    cfg = replace(runs.ease, teacher="", traces=str(tmp_path / "traces.jsonl"), out=str(tmp_path / "run"), steps=1, **changes)
    train.main(cfg)
    assert {r.reasoning for r in read_jsonl(tmp_path / "run/trained_on.jsonl") if r.reasoning} == {"." if cfg.filler else "because."}
    n = sum(not r.harmful for r in read_jsonl(world.diagnostic))
    assert check(kinds(tmp_path / "run/trained_on.jsonl"), n, len(read_jsonl(runs.out / "ease/region.jsonl")))


def test_refusals_are_trained_on_as_they_are():
    """A user's refusals need not look like one to a keyword list; only prompts without a refusal get one of them."""
    refusals = [Record(f"r{i}", "q", "harmful", f"That would hurt people, see {i}.") for i in range(5)]
    other, own = Record("d", "q", "adversarial_harmful", "sure!"), Record("e", "q", "adversarial_harmful")
    out = train.direct_records([*refusals, other, own], {"e": replace(own, response="I cannot.")}, refusals, 0)
    assert out[:5] == refusals and out[5].response in {r.response for r in refusals} and out[6].response == "I cannot."


def test_probe_phase1_asks_the_other_model(runs, tmp_path):
    train.main(replace(runs.ease, probe="phase1", region="all", out=str(tmp_path / "run"), steps=1))
    a, b = (Path(p) / "probe.jsonl" for p in (runs.out / "ease", tmp_path / "run"))
    assert [r["response"] for r in rows(a)] != [r["response"] for r in rows(b)]

    safe = tmp_path / "diagnostic.jsonl"  # M_reason fails on nothing: it learns to reason on the look-alikes alone, and the run goes on
    write_jsonl(safe, [replace(r, target="never said") for r in read_jsonl(runs.ease.diagnostic)])
    train.main(replace(runs.ease, probe="phase1", diagnostic=str(safe), out=str(tmp_path / "safe"), steps=1))
    assert rows(tmp_path / "safe/trained_on.jsonl") and {r.kind for r in read_jsonl(tmp_path / "safe/trained_on.jsonl") if r.reasoning} == {"adversarial_benign"}


def test_sampled_probes_are_reported_and_change_no_region(runs, tmp_path):
    train.main(replace(runs.ease, probe_samples=2, temperature=1.0, out=str(tmp_path / "run"), steps=1))
    before, after = (rows(Path(p) / "probe.jsonl") for p in (runs.out / "ease", tmp_path / "run"))
    assert [(r["response"], r["verdict"]) for r in before] == [(r["response"], r["verdict"]) for r in after]
    assert all(r["samples"] == [] for r in before) and {len(r["samples"]) for r in after} == {2}
    assert (runs.out / "ease/region.jsonl").read_bytes() == (tmp_path / "run/region.jsonl").read_bytes()
    assert "any of 2 samples" in (tmp_path / "run/region.md").read_text() and "any of" not in (runs.out / "ease/region.md").read_text()


def test_full_fine_tuning_and_gate_weight(runs, tmp_path):
    train.main(replace(runs.ease, init="", lora_rank=0, gate_weight=3.0, lr=1e-4, out=str(tmp_path / "run"), steps=2))
    model, before = load_model(str(tmp_path / "run/model")), load_model(runs.ease.model)
    assert not torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    row = rows(tmp_path / "run/metrics.jsonl")[0]
    parts = [row[k] for k in ("gate", "reasoning", "answer") if row[k] is not None]
    assert min(parts) <= row["loss"] <= max(parts)  # a weighted mean of its parts


def test_stored_traces_need_no_teacher_and_hold_out(runs, tmp_path, capsys):
    cfg = distill.Config(model=runs.ease.model, out=str(tmp_path / "run"), traces=str(runs.out / "phase1/traces.jsonl"), kl_weight=0.0, steps=3,
                         lr=3e-3, max_traces=8, held_out=4, batch_size=4)
    distill.main(cfg)
    last = rows(tmp_path / "run/metrics.jsonl")[-1]
    assert len(read_jsonl(tmp_path / "run/held_out.jsonl")) == 4 and len(read_jsonl(tmp_path / "run/trained_on.jsonl")) == 8
    assert last["held_out_nll_after"] < last["held_out_nll_before"] and "held-out traces" in capsys.readouterr().out
    assert not {r.id for r in read_jsonl(tmp_path / "run/held_out.jsonl")} & {r.id for r in read_jsonl(tmp_path / "run/trained_on.jsonl")}


def test_categories_from_the_teacher(runs, tmp_path, capsys):
    distill.main(replace(runs.phase1, categories="teacher", out=str(tmp_path / "run"), steps=1, merged=False, held_out=6))
    found, given = read_jsonl(tmp_path / "run/categories.jsonl"), read_records(runs.phase1.prompts)
    assert [r.prompt for r in found] == [r.prompt for r in given] and all(r.categories for r in found)
    assert f"against the {sum(bool(r.categories) for r in given)} labelled rows: accuracy" in capsys.readouterr().out
    by_prompt = {r.prompt: r.categories for r in found}
    traces = read_jsonl(tmp_path / "run/traces.jsonl")
    assert all(r.categories == by_prompt[r.prompt] for r in traces)
    assert {r.id for r in read_jsonl(tmp_path / "run/held_out.jsonl")} != {r.id for r in traces[:6]}  # drawn: the file begins with one kind


def test_teachers_are_compared_and_the_chosen_one_is_distilled(runs, world, tmp_path, capsys):
    """Against the untrained base, which writes no traces. The chosen teacher's run is the one of --teacher, to the last bit."""
    cfg = replace(runs.phase1, teacher="", teachers=[world.base, world.teacher], dev=world.dev, teacher_prompts=10, teacher_steps=2, merged=False,
                  max_new_tokens=40, out=str(tmp_path / "run"))
    distill.main(cfg)
    found = json.loads((tmp_path / "run/teachers.json").read_text())
    assert found["chosen"] == world.teacher and f"the teacher is {world.teacher}" in capsys.readouterr().out
    base, teacher = found["rows"]
    assert base["accepted"] == 0 and base["asr"] is None and sum(base["rejected"].values()) == 3 * 10
    assert 0 < teacher["accepted"] <= 10 and teacher["nll"] > 0 and teacher["kl"] > 0 and teacher["asr"]["n"] > 0 and teacher["over_refusal"]["n"] > 0
    assert "(chosen)" in (tmp_path / "run/teachers.md").read_text()
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (runs.out / "phase1" / file).read_bytes()


# ------------------------------------------------------------------------------------------------ mistakes
def test_mistakes_in_train(runs, world, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    write_jsonl(mixed, [Record("p", "plain", "harmful", "no.")])
    twin = tmp_path / "diagnostic.jsonl"  # another file with the stem, and so the ids, of D_diag
    write_jsonl(twin, [replace(r, kind="benign", response="x") for r in read_jsonl(world.diagnostic)])
    empty = tmp_path / "refused.jsonl"
    write_jsonl(empty, [Record("x", "how do i paint the car?", "adversarial_harmful", target="never said", categories=("theft",))])
    bare = tmp_path / "bare.jsonl"
    write_jsonl(bare, [replace(r, categories=()) for r in read_jsonl(world.diagnostic)])
    other = replace(runs.ease, out=str(tmp_path / "run"))
    for changes, message in [
        ({"diagnostic": str(mixed)}, "row 'mixed/p' is harmful: D_diag is adversarial"), ({"refusals": world.general}, "must be of kind harmful"),
        ({"general": world.refusals}, "must be of kind benign"), ({"teacher": ""}, "--teacher MODEL or --traces FILE"),
        ({"traces": world.prompts}, "one of them"), ({"teacher": "", "traces": world.test}, "--traces has none of these requests"),
        ({"prompts": world.prompts}, "--prompts is for the baselines"), ({"method": "refusal"}, "--init is for --method ease"),
        ({"general": str(twin)}, "was already used"), ({"probe": "phase1", "init": ""}, "--probe phase1 needs --init"),
        ({"direct": False, "harmful_direct": 2}, "--direct false leaves out"), ({"direct": False, "method": "refusal", "init": "", "teacher": ""}, "--direct false leaves out"),
        ({"samples_per_prompt": 4}, "--samples_per_prompt 4 must be from 1 to --attempts 3"), ({"diagnostic": str(empty)}, "vulnerable region is empty"), ({"judge": "nobody"}, "--judge 'nobody'"),
        ({"teacher": "nowhere"}, "nowhere: no model here"), ({"max_length": 3}, "rows are longer than --max_length 3"),
        ({"method": "deliberative", "init": "", "region": "all"}, "--region is for --method ease"), ({"method": "refusal", "init": ""}, "not for --method refusal"),
        ({"categories": "teacher", "teacher": "", "traces": world.prompts}, "--categories teacher needs a --teacher"),
        ({"diagnostic": str(bare)}, "is harmful and has no categories"), ({"policies": "nowhere.json"}, "nowhere.json: no such file"),
        ({"benign_direct": 10**6}, "1000000 benign_direct"), ({"lr": 1e30}, "the loss is (nan|inf).* at step"),
    ]:
        with pytest.raises(UserError, match=message):
            train.main(replace(other, **changes, out=str(tmp_path / message[:9].replace(" ", "_"))))
    assert not (tmp_path / "is_harmfu").exists()  # seen before the probe is paid for


def test_mistakes_in_distill(runs, world, tmp_path):
    cfg = replace(runs.phase1, out=str(tmp_path / "run"))
    broken = tmp_path / "other"
    tiny_folder(broken)
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["\u0120the"], vocab["\u0120car"] = vocab["\u0120car"], vocab["\u0120the"]  # as many tokens, two of them swapped
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    for i, (changes, message) in enumerate([
        ({"teacher": "", "prompts": ""}, "give --traces FILE"), ({"traces": world.prompts}, "give --traces FILE"),
        ({"teacher": "", "traces": world.prompts, "prompts": ""}, "needs a --teacher"),
        ({"categories": "teacher", "teacher": "", "prompts": "", "kl_weight": 0.0, "traces": str(runs.out / "phase1/traces.jsonl")}, "--categories teacher classifies"),
        ({"max_traces": 3}, "--max_traces is for stored"), ({"dev": world.dev}, "--dev is for --teachers"),
        ({"traces": str(runs.out / "phase1/traces.jsonl"), "prompts": "", "kl_weight": 0.0}, "--kl_weight 0 leaves out"),
        ({"filler": True}, "--filler true .* needs --kl_weight 0"),
        ({"teachers": [world.base]}, "needs --prompts and --dev, and neither --teacher"), ({"cache_topk": 4, "kl_weight": 0.0}, "--cache_topk .* needs --kl_weight above 0"),
        ({"teacher": "", "teachers": [world.base], "dev": world.refusals}, "the teachers are compared on adversarial prompts"),
        ({"teacher": "", "teachers": [world.base], "dev": world.dev, "teacher_prompts": 4}, "no trace of any of the teachers was accepted"),
        ({"traces": str(runs.out / "phase1/traces.jsonl"), "prompts": "", "held_out": 999}, "--held_out 999 leaves none"),
        ({"judge": "xstest", "attempts": 1, "max_new_tokens": 1}, "no trace of teacher .* was accepted"),
        ({"teacher": str(broken), "prompts": "", "traces": str(runs.out / "phase1/traces.jsonl")}, "tokenizers of --model and --teacher differ"),
    ]):
        with pytest.raises(UserError, match=message):
            distill.main(replace(cfg, **changes, out=str(tmp_path / f"run{i}")))


@pytest.mark.parametrize("changes, message", [
    ({"systems": ["base"]}, "NAME=MODEL"), ({"systems": ["a b=x"]}, "NAME=MODEL"), ({"systems": ["a=x", "a=y"]}, "stands twice"),
    ({"out": ""}, "--out DIR"), ({"refusal_system": "nobody"}, "--refusal_system 'nobody' is none"), ({"prompts": ["nowhere.jsonl"]}, "nowhere.jsonl"),
    ({"judge": ["nobody"]}, "--judge 'nobody'"), ({"systems": ["base=nowhere"], "refusal_system": "", "deliberative_system": "", "base_system": ""}, "nowhere")])
def test_mistakes_in_evaluate(runs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(replace(runs.test, **({"out": str(tmp_path / "run")} | changes)))


def test_command_line_of_every_script(tmp_path):
    """--help works, and a mistake is one line on stderr and status 2, without a traceback."""
    for script, flags in (("distill.py", ["--model", "x"]), ("train.py", ["--model", "x", "--diagnostic", "x", "--refusals", "x", "--general", "x"]),
                          ("evaluate.py", ["--systems", "a=data/toy/nowhere", "--prompts", "x"])):
        help_text = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert help_text.returncode == 0 and "--out" in help_text.stdout
        wrong = subprocess.run([sys.executable, script, *flags, "--out", str(tmp_path / "o")], cwd=ROOT, capture_output=True, text=True)
        assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1, wrong.stderr

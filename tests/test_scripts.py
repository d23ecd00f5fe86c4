"""The three scripts end to end on a small world: what each stage writes, what it trains on, and
every mistake that a user can mend.
"""

import io
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import evaluate
import train
from ease.batching import collate, encode_record, held_out_loss, plan_batches
from ease.loading import load_model, load_tokenizer
from ease.losses import gated_cross_entropy
from ease.policies import POLICY
from ease.readers import read_records
from ease.records import (SAFE, UNPARSED, Record, Response, UserError, read_jsonl, read_lines,
                          write_jsonl)
from ease.scoring import auroc, is_refusal, percentile, target_verdict
from tests.checks import verify
from tests.tiny import tiny_folder

ROOT = Path(__file__).parent.parent
TRAINED = ("phase1", "ease", "refusal", "deliberative")


def rows(path):
    return [row for _, row in read_lines(path)]


def kinds(path):
    return Counter((r.kind, bool(r.reasoning)) for r in read_jsonl(path))


# ------------------------------------------------------------------- what the runs leave behind
def test_run_folders_are_complete(runs):
    for name in TRAINED:
        run = runs.out / name
        for file in ("manifest.json", "preview.txt", "trained_on.jsonl", "metrics.jsonl",
                     "checkpoints/step-3/trainer.safetensors", "adapter/adapter_model.safetensors",
                     "adapter/adapter_config.json", "done"):
            assert (run / file).exists(), f"{name}/{file}"
        metrics = rows(run / "metrics.jsonl")
        assert [row["step"] for row in metrics] == [0, 1, 2]
        done = json.loads((run / "done").read_text())
        assert done["steps"] == 3
        assert done["supervised_tokens"] == sum(row["tokens"] for row in metrics)


def test_phase1_keeps_what_it_rejected(runs, world):
    accepted = read_jsonl(runs.out / "phase1/traces.jsonl")
    rejected = rows(runs.out / "phase1/rejected.jsonl")
    prompts = {f"prompts/{r.id}" for r in read_jsonl(world.prompts)}
    assert accepted and {r.id for r in accepted} <= prompts
    assert all(r.reasoning and r.response for r in accepted)
    assert prompts == {r.id for r in accepted} | {r["id"] for r in rejected}
    assert all(r["reason"] for r in rejected)
    assert (
        "policy" not in (runs.out / "phase1/preview.txt").read_text()
    )  # the student never sees it
    assert all(row["kl"] > 0 for row in rows(runs.out / "phase1/metrics.jsonl"))


def test_merged_model_equals_model_with_adapter(runs, world):
    ids = torch.arange(10)[None]
    merged = load_model(str(runs.out / "phase1/model"))(ids)
    assert torch.allclose(merged, load_model(world.base, str(runs.out / "phase1/adapter"))(ids),
                          atol=1e-4)
    assert not torch.allclose(merged, load_model(world.base)(ids), atol=1e-4)


def test_the_region_is_what_the_base_failed_on(runs, world):
    probed = rows(runs.out / "ease/probe.jsonl")
    region = {r.id for r in read_jsonl(runs.out / "ease/region.jsonl")}
    failed = [r for r in probed if r["verdicts"]["target"] == "unsafe"]
    assert region == {r["id"] for r in failed if r["kind"] == "adversarial_harmful"}
    targets = {f"diagnostic/{r.id}": r.target for r in read_jsonl(world.diagnostic)}
    for row in probed:
        if row["kind"] == "adversarial_harmful":
            complied = row["answer"].startswith(targets[row["id"]])
            assert (row["verdicts"]["target"] == "unsafe") == complied


def test_ease_reasons_on_the_region_and_the_lookalikes_only(runs):
    region = {r.id for r in read_jsonl(runs.out / "ease/region.jsonl")}
    mixture = read_jsonl(runs.out / "ease/trained_on.jsonl")
    for r in mixture:
        if r.reasoning:
            assert r.id in region or r.kind == "adversarial_benign"
        else:
            assert r.id not in region and is_refusal(r.response) == r.harmful
    # what the judge took, no more
    assert all(target_verdict(r, r.response) == "safe" for r in mixture if r.harmful)
    preview = (runs.out / "ease/preview.txt").read_text()
    assert (
        preview.count("reasoning") == 1 and preview.count("\n  gate") == 2
    )  # one row of each sort


def test_baselines(runs, world):
    files = (world.diagnostic, world.refusals, world.general, world.prompts)
    every = sum(len(read_jsonl(p)) for p in files)
    refusal, deliberative = (kinds(runs.out / name / "trained_on.jsonl")
                             for name in ("refusal", "deliberative"))
    assert refusal.total() == every and not any(reasons for _, reasons in refusal)  # all direct
    assert deliberative.total() <= every and all(reasons for _, reasons in deliberative)
    assert not (runs.out / "refusal/probe.jsonl").exists()
    assert rows(runs.out / "refusal/metrics.jsonl")[0]["reasoning"] is None


def test_phase2_goes_on_with_phase1s_matrices(runs, world):
    """At step 0 the loss is that of M_reason, not of M_s, and it is the gated cross-entropy over
    the whole step, divided once.
    """
    tokenizer = load_tokenizer(world.base)
    mixture = read_jsonl(runs.out / "ease/trained_on.jsonl")
    examples = [encode_record(tokenizer, r) for r in mixture]
    [first] = plan_batches([len(e.ids) for e in examples], 8, 8192, 0, 1)
    logged = rows(runs.out / "ease/metrics.jsonl")[0]
    for adapter, same in ((str(runs.out / "phase1/adapter"), True), ("", False)):
        model, found = load_model(world.base, adapter), []
        for i in (i for micro in first for i in micro):  # one by one
            batch = collate([examples[i]], "cpu")
            keep = batch.roles > 0
            logits, targets = model(batch.inputs[None])[0, keep], batch.targets[keep]
            found.append(gated_cross_entropy(logits, targets, torch.ones(len(targets))))
        losses = torch.cat(found)
        assert (abs(logged["loss"] - losses.mean().item()) < 1e-4) == same
        assert logged["tokens"] == len(losses)


def test_micro_batches_do_not_change_the_numbers(runs, tmp_path):
    train.main(replace(runs.ease, out=str(tmp_path / "small"), batch_tokens=60))
    whole, small = (rows(p / "metrics.jsonl") for p in (runs.out / "ease", tmp_path / "small"))
    for a, b in zip(whole, small, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-3 * a["grad_norm"]


def test_dropped_rows_are_not_said_to_be_trained_on(runs, tmp_path):
    lengths = [len(encode_record(load_tokenizer(runs.ease.model), r).ids)
               for r in read_jsonl(runs.out / "refusal/trained_on.jsonl")]
    limit = sorted(lengths)[len(lengths) // 2]
    manifest = json.loads((runs.out / "refusal/manifest.json").read_text())["config"]
    cfg = train.Config(**manifest | {"out": str(tmp_path / "run"), "max_length": limit, "steps": 1})
    train.main(cfg)
    kept = sum(n <= limit for n in lengths)
    assert len(read_jsonl(tmp_path / "run/trained_on.jsonl")) == kept < len(lengths)


def test_evaluation(runs, world):
    summary = json.loads((runs.out / "test/summary.json").read_text())
    evaluated, test = rows(runs.out / "test/rows.jsonl"), read_jsonl(world.test)
    assert len(evaluated) == 5 * len(test) and set(summary["systems"]) == {"base", *TRAINED}
    for name, system in summary["systems"].items():
        for kind, numbers in system["kinds"].items():
            picked = [r for r in evaluated if r["system"] == name and r["kind"] == kind]
            assert numbers["n"] == len(picked)
            assert numbers["unclosed"] == sum(r["state"] == "unclosed" for r in picked)
            if "harmful" in kind:
                hits = [r["verdicts"]["target"] == "unsafe" for r in picked
                        if r["state"] != "unclosed"]
                wanted = pytest.approx(sum(hits) / len(hits)) if hits else None
                assert numbers["asr"]["target"]["value"] == wanted
    for r in evaluated:
        tokens = r["tokens"]
        assert tokens["total"] == tokens["answer"] + tokens["reasoning"] and 0 <= r["gate"] <= 1
        assert (tokens["reasoning"] == 0) == (r["state"] == "absent")
    steps = {n: s["training"].get("steps") for n, s in summary["systems"].items()}
    # phase 1 counts for EASE
    assert steps == {"base": None, "phase1": 3, "refusal": 3, "deliberative": 3, "ease": 6}
    assert summary["systems"]["ease"]["training"]["overlap_exact"] == 0  # no test prompt
    trained = {r.attack for n in TRAINED for r in read_jsonl(runs.out / n / "trained_on.jsonl")}
    held_out = {r.attack for r in test if r.kind == "adversarial_harmful"} - trained
    labels = {"families trained on"} | ({"held-out families"} if held_out else set())
    assert set(summary["breakdown"]["trained on"]) == labels
    report = (runs.out / "test/report.md").read_text()
    assert "## ASR on adversarial harmful prompts, by attack" in report
    attacks = {r.attack for r in test if r.kind == "adversarial_benign"}
    sources = {s for r in test if r.kind == "benign" for s in ("toy", r.source)}
    assert set(summary["over_refusal"]) == {*(f"look-alikes, {a}" for a in attacks),
                                            *(f"plain, {s}" for s in sources)}
    found = summary["over_refusal"]["plain, toy"]
    assert found["ease"] == summary["systems"]["ease"]["kinds"]["benign"]["refusal_rate"]
    assert "## Over-refusal, by type" in report and "| plain, toy " in report


def test_a_finished_evaluation_shows_its_table_again(runs, capsys):
    evaluate.main(runs.test)
    out = capsys.readouterr().out
    assert "complete already" in out and "| ease " in out and "## adversarial" not in out


def test_score_only_scores_the_same_rows_beside_the_first_scoring(runs, capsys):
    files = ("rows-ease.jsonl", "summary.json", "rows.jsonl", "report.md", "report.html")
    before = [(runs.out / "test" / name).read_bytes() for name in files]
    again = replace(runs.test, score_only=True, max_new_tokens=999, prompts=[])
    evaluate.main(replace(again, judge=["jailbreakbench"]))
    out = capsys.readouterr().out  # how the rows were made, not today's flags
    assert "ASR by jailbreakbench; greedy, at most 40 new tokens" in out
    beside = runs.out / "test/scored-by-jailbreakbench"
    assert out.splitlines()[-1].endswith(f"results in {beside}")
    found = json.loads((beside / "summary.json").read_text())
    assert found["settings"]["judges"] == ["jailbreakbench"]
    evaluate.main(again)  # with the same judges: the same numbers
    beside = runs.out / "test/scored-by-target+xstest"
    assert (beside / "summary.json").read_bytes() == before[1]
    assert [(runs.out / "test" / name).read_bytes() for name in files] == before
    systems = [*runs.test.systems[:-1], runs.test.systems[-1] + "x"]
    with pytest.raises(UserError, match="are of other systems than ease="):
        evaluate.main(replace(runs.test, systems=systems, score_only=True))


def test_the_flags_of_a_guard_reach_it(runs, world, capsys):
    """Scored again by the toy's judge as what it is not; what differs from the default stands in
    the folder's name, and in the report that the reasoning was shown.
    """
    again = replace(runs.test, score_only=True, judge=[world.judge], base_system="",
                    judge_format="qwen3guard", judge_text="full")
    evaluate.main(again)
    out = capsys.readouterr().out
    assert "answers; as qwen3guard it writes " in out
    assert "float32, guards shown the reasoning.\n" in out
    assert (runs.out / "test/scored-by-judge+full+qwen3guard/report.md").exists()


def test_compare(runs, tmp_path, capsys):
    """A section of report.md for two systems; printed for two finished runs."""
    again = replace(runs.test, score_only=True, prompts=[], compare=["ease", "refusal"])
    evaluate.main(replace(again, judge=["target", "gcg"]))
    report = (runs.out / "test/scored-by-target+gcg/report.md").read_text()
    section = report.split("## ease (A) against refusal (B)\n\n")[1].split("\n## ")[0]
    assert "ASR by target; percent" in section and section.count(" tokens |") == 4
    alone = {}
    for name in ("ease", "refusal"):
        alone[name] = tmp_path / name
        write_jsonl(alone[name] / "rows.jsonl",
                    [r for r in rows(runs.out / "test/rows.jsonl") if r["system"] == name])
    capsys.readouterr()
    cfg = evaluate.Config(judge=["target"])
    for a, b in ((alone["ease"], alone["refusal"]),
                 (alone["ease"] / "ease", runs.out / "test/refusal")):
        evaluate.main(replace(cfg, compare=[str(a), str(b)]))
        assert capsys.readouterr().out.strip() == section.strip()
    for where, judge in ((runs.out / "test", "target"), (runs.out / "test/nobody", "target"),
                         (alone["ease"], "gcg"), (tmp_path / "nowhere", "target")):
        with pytest.raises(UserError, match=f"--compare {where}: no RUN"):
            evaluate.main(replace(cfg, compare=[str(alone["ease"]), str(where)], judge=[judge]))


def test_a_judge_of_another_protocol_is_said(runs, tmp_path, capsys):
    plain = tmp_path / "plain.jsonl"  # records without a target: judge `target` can say nothing
    write_jsonl(plain, [replace(r, target="") for r in read_jsonl(runs.test.prompts[0])[:6]])
    evaluate.main(replace(runs.test, systems=runs.test.systems[:1], prompts=[str(plain)],
                          out=str(tmp_path / "run"), refusal_system="", deliberative_system=""))
    assert "judge target: no verdict on 6 of 6 answers; records have no" in capsys.readouterr().out


def test_answers():
    verify(evaluate, "answers")


def test_latency(runs, tmp_path, monkeypatch):
    """The same few prompts for every system, one at a time; a stopped run keeps their seconds."""
    cfg = replace(runs.test, out=str(tmp_path / "run"), systems=runs.test.systems[:2], latency=5,
                  refusal_system="", deliberative_system="", max_new_tokens=12)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(evaluate, "add_verdicts", lambda *a: 1 / 0)
        evaluate.main(cfg)
    files = [tmp_path / f"run/rows-{name}+latency.jsonl" for name in ("base", "phase1")]
    before, asked = [file.read_bytes() for file in files], [rows(file) for file in files]
    evaluate.main(cfg)
    assert [file.read_bytes() for file in files] == before
    ids = [[r["id"] for r in found] for found in asked]
    known = [r["id"] for r in rows(tmp_path / "run/rows-base.jsonl")]
    assert ids[0] == ids[1] and len(set(ids[0]) & set(known)) == 5 and ids[0] != known[:5]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for name, found in zip(("base", "phase1"), asked):
        numbers, seconds = summary["systems"][name]["cost"], [r["seconds"] for r in found]
        assert numbers["p50_seconds"] == percentile(seconds, 50) > 0
        assert numbers["p95_seconds"] == max(seconds) and numbers["tokens_per_second"] > 0
        assert numbers["mean_tokens"] == sum(r["tokens"]["total"] for r in found) / 5
    peaks = [row["peak_gib"] for row in rows(tmp_path / "run/metrics.jsonl")]
    assert len(peaks) == 4 and summary["peak_gib"] == max(peaks) > 0
    report = (tmp_path / "run/report.md").read_text()
    assert "| p50 seconds |" in report.split("## Cost")[1]
    evaluate.main(replace(cfg, score_only=True, prompts=[]))
    again = (tmp_path / "run/scored-by-target+xstest/summary.json").read_bytes()
    assert again == (tmp_path / "run/summary.json").read_bytes()
    monkeypatch.setattr(evaluate, "respond", lambda *a: 1 / 0)
    with pytest.raises(UserError, match="another latency"):
        evaluate.main(replace(cfg, latency=6))
    with pytest.raises(UserError, match="--latency and --search answer --prompts: give some"):
        evaluate.main(replace(cfg, out=str(tmp_path / "x"), prompts=[], tasks=["hellaswag=x"]))


@pytest.fixture(scope="module")
def swept(runs, tmp_path_factory):
    """An evaluation of base and EASE with the sweep of EASE's gate."""
    out = tmp_path_factory.mktemp("swept")
    systems = [s for s in runs.test.systems if s.startswith(("base", "ease"))]
    cfg = replace(runs.test, systems=systems, refusal_system="", deliberative_system="",
                  gate_sweep="ease", out=str(out / "dev"), max_new_tokens=30)
    evaluate.main(cfg)
    return cfg


def test_gate_sweep(swept):
    """Forced rows are what their names say; the curve's ends are those rows."""
    out = Path(swept.out)
    opened, direct, own = (
        rows(out / f"rows-ease{how}.jsonl") for how in ("+opened", "+direct", "")
    )
    summary = json.loads((out / "summary.json").read_text())
    assert all(r["opened"] and r["state"] != "absent" for r in opened)
    assert not any(r["opened"] for r in direct)
    assert summary["gate"]["other_ids"] == sum(r["state"] != "absent" for r in direct)
    assert [r["gate"] for r in opened] == pytest.approx([r["gate"] for r in own], rel=1e-3)
    curve = summary["gate"]["curve"]
    for point, forced in ((curve[0], opened), (curve[-1], direct)):
        tokens = sum(r["tokens"]["total"] for r in forced) / len(forced)
        assert point["tokens"] == pytest.approx(tokens)
    assert curve[0]["reasons"] == 1
    judged = {r["id"]: r["verdicts"]["target"] for r in rows(out / "rows.jsonl")
              if r["system"] == "base"}
    attacked = [r["kind"] == "adversarial_harmful" for r in own]
    hit = [r["gate"] for r, a in zip(own, attacked) if a and judged[r["id"]] == "unsafe"]
    others = [r["gate"] for r, a in zip(own, attacked) if not a or judged[r["id"]] == "safe"]
    area = summary["systems"]["ease"]["gate_auroc"]
    assert hit and others and area == pytest.approx(auroc(hit, others))
    assert "## The gate of ease" in (out / "report.md").read_text()


def test_only_attacked_prompts_are_vulnerable(swept):
    """By the xstest list every answered benign prompt is "unsafe"."""
    evaluate.main(replace(swept, score_only=True, judge=["xstest"]))
    found = rows(Path(swept.out) / "scored-by-xstest/rows.jsonl")
    assert not any(r["vulnerable"] for r in found if r["kind"] != "adversarial_harmful")


def test_a_threshold_applies_to_the_systems_that_are_not_named(swept, tmp_path, capsys):
    opened, direct, own = (rows(Path(swept.out) / f"rows-ease{how}.jsonl")
                           for how in ("+opened", "+direct", ""))
    gates = sorted(r["gate"] for r in own)
    gap, low, high = max((b / a, a, b) for a, b in zip(gates[10:-10], gates[11:-9]))
    assert gap > 1.05  # between two neighbours far apart: no side hangs on the last bits
    threshold = (low + high) / 2
    evaluate.main(replace(swept, gate_sweep="", gate_threshold=threshold, out=str(tmp_path / "t")))
    found = rows(tmp_path / "t/rows-ease.jsonl")
    wanted = [o if r["gate"] >= threshold else d for r, o, d in zip(own, opened, direct)]
    assert [r["opened"] for r in found] == [w["opened"] for w in wanted]
    assert len({w["opened"] for w in wanted}) == 2
    # other rows in the batch: a near tie may fall the other way
    assert sum(r["text"] == w["text"] for r, w in zip(found, wanted)) > 0.9 * len(found)
    base, before = (
        rows(folder / "rows-base.jsonl") for folder in (tmp_path / "t", Path(swept.out))
    )
    same = [a["text"] == b["text"] for a, b in zip(base, before, strict=True)]
    assert sum(same) > 0.9 * len(same)  # the original model answers as it is
    assert f"gate threshold {threshold:g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gate_sweep": "x"}, "--gate_sweep 'x' is none of the --systems"),
        ({"gate_sweep": "", "token_budget": 9.0}, "--token_budget .* needs --gate_sweep"),
        (
            {"gate_sweep": "", "gate_threshold": 0.5, "max_new_tokens": 3},
            "leave no room behind the open",
        ),
        ({"max_new_tokens": 10**6}, "the model's context is"),
    ],
)
def test_mistakes_with_the_gate(swept, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(replace(swept, **changes, out=str(tmp_path / "x")))


def test_ask(world, capsys):
    evaluate.main(evaluate.Config(systems=[f"base={world.base}"], ask="how do i paint the car?",
                                  max_new_tokens=20))
    out = capsys.readouterr().out
    assert "--- base\n" in out and len(out.splitlines()) >= 2


def test_ask_line_by_line_with_and_without_the_policy(world, capsys, monkeypatch):
    """--ask -: the models are loaded once; --policy_prompt shows one of them the policy."""
    seen, real = [], evaluate.respond

    def respond(*args, messages, **more):
        seen.append(messages[0])
        return real(*args, messages=messages, **more)

    monkeypatch.setattr(evaluate, "respond", respond)
    monkeypatch.setattr(sys, "stdin", io.StringIO("how do i paint the car?\nthe lamp?\n"))
    evaluate.main(evaluate.Config(systems=[f"base={world.base}", f"told={world.base}"], ask="-",
                                  policy_prompt="told", max_new_tokens=5, dtype="float32"))
    assert capsys.readouterr().out.count("--- told") == 2
    assert [m[-1]["content"] for m in seen] == ["how do i paint the car?"] * 2 + ["the lamp?"] * 2
    assert [len(m) for m in seen] == [1, 2, 1, 2]
    assert all(text in seen[1][0]["content"] for text in POLICY.texts.values())
    for flags in ({"out": "x", "prompts": [world.test]}, {"ask": "how?"}):
        with pytest.raises(UserError, match="--policy_prompt 'nobody' is none of the --systems"):
            evaluate.main(evaluate.Config(systems=[f"base={world.base}"], policy_prompt="nobody",
                                          dtype="float32", **flags))
    with pytest.raises(UserError, match="raw --task_prompts have no system turn"):
        evaluate.main(evaluate.Config(systems=[f"told={world.base}"], policy_prompt="told", out="x",
                                      tasks=["gsm8k=x"], task_prompts="raw", dtype="float32"))


def test_a_finished_run_is_not_repeated(runs, capsys):
    adapter = runs.out / "ease/adapter/adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    train.main(runs.ease)
    assert adapter.stat().st_mtime_ns == before
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UserError, match="another lr"):  # and no other run passes for it
        train.main(replace(runs.ease, lr=9.9))


# ------------------------------------------------------------------------------------ the controls
def direct(counts):
    return [(kind, n) for (kind, traced), n in counts.items() if not traced]


@pytest.mark.parametrize("changes, check", [
    ({"region": "all"}, lambda k, n, region: k["adversarial_harmful", True] > region),
    ({"region": "random"}, lambda k, n, region: k["harmful", True] and
     k["harmful", True] + k["adversarial_harmful", True] <= region),
    ({"lookalikes": "direct"}, lambda k, n, region: not k["adversarial_benign", True] and
     k["adversarial_benign", False] == n),
    ({"lookalikes": "drop"}, lambda k, n, region: not k["adversarial_benign", True] and
     not k["adversarial_benign", False]),
    ({"direct": False}, lambda k, n, region: not direct(k) and
     k["adversarial_harmful", True] == region),
    ({"filler": True}, lambda k, n, region: k["adversarial_harmful", True] == region and
     k["benign", False]),
    ({"benign_direct": 5, "harmful_direct": 3}, lambda k, n, region: k["benign", False] == 5 and
     k["harmful", False] + k["adversarial_harmful", False] == 3),
])
def test_controls(runs, world, tmp_path, changes, check):
    """Traces come from a file that has one for every request, so that none is lost to the
    half-trained teacher.
    """
    everything = [r for p in (world.diagnostic, world.refusals) for r in read_jsonl(p)]
    write_jsonl(tmp_path / "traces.jsonl", [
        replace(r, id=str(i), reasoning="because.",
                response="I'm sorry." if r.harmful else r.response)
        for i, r in enumerate(everything)])
    cfg = replace(runs.ease, teacher="", traces=str(tmp_path / "traces.jsonl"),
                  out=str(tmp_path / "run"), steps=1, **changes)
    train.main(cfg)
    trained_on = tmp_path / "run/trained_on.jsonl"
    traces = {r.reasoning for r in read_jsonl(trained_on) if r.reasoning}
    assert traces == {"." if cfg.filler else "because."}
    n = sum(not r.harmful for r in read_jsonl(world.diagnostic))
    region = len(read_jsonl(runs.out / "ease/region.jsonl"))
    assert check(kinds(trained_on), n, region)


REFUSALS = [Record(f"r{i}", "q", "harmful", f"That would hurt people, see {i}.") for i in range(5)]


def test_refusals_are_trained_on_as_they_are():
    """A user's refusals need not look like one to a keyword list; only prompts without a refusal
    get one of them.
    """
    other = Record("d", "q", "adversarial_harmful", "sure!")
    own = Record("e", "q", "adversarial_harmful")
    said = Response(own, "I cannot.", "", "I cannot.", "absent", True, verdicts={"j": SAFE})
    out = train.direct_records([*REFUSALS, other, own], [said], REFUSALS, "j", 0)
    assert out[:5] == REFUSALS and out[5].response in {r.response for r in REFUSALS}
    assert out[6].response == "I cannot."


@pytest.mark.parametrize("finished, verdict", [(True, SAFE), (False, SAFE), (True, UNPARSED)])
def test_only_finished_safe_answers_become_targets(finished, verdict, capsys):
    """A refusal cut at --probe_tokens plus an end token would teach to stop in the middle."""
    own = Record("e", "q", "adversarial_harmful")
    said = Response(own, "I cannot help, bec", "", "I cannot help, bec", "absent", finished,
                    verdicts={"j": verdict})
    [found] = train.direct_records([own], [said], REFUSALS, "j", 0)
    assert (found.response == said.answer) == (finished and verdict == SAFE)
    message = "1 refusals of the original model were cut at --probe_tokens"
    assert (message in capsys.readouterr().out) == (not finished)


def test_probe_phase1_asks_the_other_model(runs, tmp_path):
    """An adapter much louder than three steps make it: nearly every answer is another."""
    loud, file = tmp_path / "loud", "adapter_model.safetensors"
    shutil.copytree(runs.ease.init, loud)
    tensors = {k: 30 * v if "lora_B" in k else v for k, v in load_file(loud / file).items()}
    save_file(tensors, loud / file)
    cfg = replace(runs.ease, probe="phase1", init=str(loud), steps=1)
    train.main(replace(cfg, region="all", out=str(tmp_path / "run")))
    a, b = (rows(p / "probe.jsonl") for p in (runs.out / "ease", tmp_path / "run"))
    assert sum(x["text"] != y["text"] for x, y in zip(a, b, strict=True)) > 0.7 * len(a)

    # M_reason fails on nothing: it learns to reason on the look-alikes alone, and the run goes on
    safe = tmp_path / "diagnostic.jsonl"
    diagnostic = read_jsonl(runs.ease.diagnostic)
    write_jsonl(safe, [replace(r, target="never said") for r in diagnostic])
    train.main(replace(runs.ease, probe="phase1", diagnostic=str(safe), out=str(tmp_path / "safe"),
                       steps=1))
    trained_on = read_jsonl(tmp_path / "safe/trained_on.jsonl")
    assert {r.kind for r in trained_on if r.reasoning} == {"adversarial_benign"}


def test_sampled_probes_are_reported_and_change_no_region(runs, tmp_path):
    cfg = replace(runs.ease, probe_samples=2, temperature=1.0, out=str(tmp_path / "run"), steps=1)
    train.main(cfg)
    for name in ("probe.jsonl", "region.jsonl"):
        before, after = (rows(p / name) for p in (runs.out / "ease", tmp_path / "run"))
        for row in (*before, *after):
            row.pop("seconds", None)
        assert before == after
    samples = [rows(tmp_path / f"run/probe-{i}.jsonl") for i in (1, 2)]
    assert [r["text"] for r in samples[0]] != [r["text"] for r in samples[1]]
    assert "any of 2 samples" in (tmp_path / "run/region.md").read_text()
    assert "any of" not in (runs.out / "ease/region.md").read_text()


def test_full_fine_tuning_and_gate_weight(runs, tmp_path):
    train.main(replace(runs.ease, init="", lora_rank=0, gate_weight=3.0, lr=1e-4, steps=2,
                       out=str(tmp_path / "run")))
    model, before = load_model(str(tmp_path / "run/model")), load_model(runs.ease.model)
    assert not torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    row = rows(tmp_path / "run/metrics.jsonl")[0]
    means = [row[k] for k in ("gate", "reasoning", "answer") if row[k] is not None]
    assert min(means) <= row["loss"] <= max(means)  # a weighted mean of its parts


def test_stored_traces_need_no_teacher_and_hold_out(runs, tmp_path, capsys):
    cfg = distill.Config(model=runs.ease.model, out=str(tmp_path / "run"), kl_weight=0.0, steps=3,
                         traces=str(runs.out / "phase1/traces.jsonl"), lr=3e-3, max_traces=8,
                         held_out=4, batch_size=4)
    distill.main(cfg)
    last = rows(tmp_path / "run/metrics.jsonl")[-1]
    held_out, trained_on = ({r.id for r in read_jsonl(tmp_path / "run" / f"{name}.jsonl")}
                            for name in ("held_out", "trained_on"))
    assert len(held_out) == 4 and 4 <= len(trained_on) <= 8 and not held_out & trained_on
    groups = [{r.group for r in read_jsonl(tmp_path / "run" / f"{name}.jsonl")}
              for name in ("held_out", "trained_on")]
    assert not groups[0] & groups[1]  # another form of a held-out request is held out too
    first = rows(tmp_path / "run/metrics.jsonl")[0]
    assert (first["step"], last["step"]) == (0, 3) and first.keys() == last.keys()
    *_, said, done = capsys.readouterr().out.splitlines()
    assert said.startswith("held-out loss a token: ") and done.startswith("done in ")
    for role in ("gate", "reasoning", "answer"):
        before, after = (row[f"held_out_{role}"] for row in (first, last))
        assert after < before and f"{role} {before:.4f} before, {after:.4f} after" in said


def test_held_out_rows_of_the_mixture(runs, world, tmp_path, capsys):
    """At step 0, at each save and after, of the weights saved: without --held_out the same rows are
    the mixture. No request stands in both, none is lost but the last one's other forms.
    """
    cfg = replace(runs.ease, out=str(tmp_path / "run"), held_out=24, save_every=2)
    train.main(cfg)
    held_out, mixture, trained_on = (
        read_jsonl(tmp_path / "run" / f"{name}.jsonl")
        for name in ("held_out", "mixture", "trained_on"))
    assert len(held_out) == 24 and trained_on == mixture
    assert not {r.group for r in held_out} & {r.group for r in mixture}
    whole = read_jsonl(runs.out / "ease/mixture.jsonl")
    lost = [r for r in whole if r not in held_out and r not in mixture]
    assert {r.group for r in lost} <= {held_out[-1].group}
    assert {bool(r.reasoning) for r in held_out} == {True, False}
    metrics = rows(tmp_path / "run/metrics.jsonl")
    measured = [row for row in metrics if "held_out_gate" in row]
    assert [row["step"] for row in measured] == [0, 2, 3]
    assert [row["step"] for row in metrics if "loss" in row] == [0, 1, 2]
    tokenizer = load_tokenizer(world.base)
    examples = [encode_record(tokenizer, r) for r in held_out]
    for folder, found in ((cfg.init, measured[0]), (tmp_path / "run/adapter", measured[-1])):
        losses = held_out_loss(load_model(world.base, str(folder)), examples, "cpu")
        assert losses == pytest.approx({k: v for k, v in found.items() if k != "step"}, rel=1e-4)
    assert "held-out loss a token: gate " in capsys.readouterr().out.splitlines()[-2]
    with pytest.raises(UserError, match="--held_out 9999 leaves none of the "):
        train.main(replace(cfg, held_out=9999, out=str(tmp_path / "none")))


def test_baselines_without_attacked_prompts(runs, world, tmp_path):
    """The shallow baseline trains on every plain row, its held-out ones too, and no other."""
    data = {**runs.data, "teacher": "", "diagnostic": "", "steps": 1}
    train.main(train.Config(method="refusal", out=str(tmp_path / "refusal"), held_out=5,
                            **data))
    trained_on, held_out = (read_jsonl(tmp_path / f"refusal/{name}.jsonl")
                            for name in ("trained_on", "held_out"))
    plain = {r.prompt for p in (world.refusals, world.general) for r in read_jsonl(p)}
    attacked = {r.prompt for r in read_jsonl(world.diagnostic)}
    seen = {r.prompt for r in trained_on + held_out}
    assert seen <= plain and not seen & attacked and len(held_out) == 5
    assert not any(r.attack or r.reasoning or r.kind.startswith("adversarial") for r in trained_on)
    assert all(is_refusal(r.response) == r.harmful for r in trained_on)
    only_gate_and_answer = rows(tmp_path / "refusal/metrics.jsonl")[0]
    assert only_gate_and_answer["held_out_reasoning"] is None
    write_jsonl(tmp_path / "traces.jsonl", [
        replace(r, id=str(i), reasoning="because.", response=r.response or "I'm sorry.")
        for i, p in enumerate((world.refusals, world.general)) for r in read_jsonl(p)
        for i in [f"{i}/{r.id}"]])
    train.main(train.Config(method="deliberative", out=str(tmp_path / "deliberative"),
                            traces=str(tmp_path / "traces.jsonl"), **data))
    found = kinds(tmp_path / "deliberative/trained_on.jsonl")
    assert set(found) == {("harmful", True), ("benign", True)}


def test_categories_from_the_teacher(runs, tmp_path, capsys):
    distill.main(replace(runs.phase1, categories="teacher", out=str(tmp_path / "run"), steps=1,
                         merged=False, held_out=6))
    found = read_jsonl(tmp_path / "run/categories.jsonl")
    given = read_records(runs.phase1.prompts)
    assert [r.prompt for r in found] == [r.prompt for r in given]
    assert all(r.categories for r in found)
    labelled = sum(bool(r.categories) for r in given)
    assert f"against the {labelled} labelled rows: accuracy" in capsys.readouterr().out
    by_prompt = {r.prompt: r.categories for r in found}
    traces = read_jsonl(tmp_path / "run/traces.jsonl")
    assert all(r.categories == by_prompt[r.prompt] for r in traces)
    # drawn: the file begins with one kind
    held_out = {r.id for r in read_jsonl(tmp_path / "run/held_out.jsonl")}
    assert held_out != {r.id for r in traces[:6]}


def test_teachers_are_compared_and_the_chosen_one_is_distilled(runs, world, tmp_path, capsys):
    """Against the untrained base, which writes no traces. The chosen teacher's run is the one of
    --teacher, to the last bit.
    """
    cfg = replace(runs.phase1, teacher="", teachers=[world.base, world.teacher], dev=world.dev,
                  teacher_prompts=10, teacher_steps=2, merged=False, max_new_tokens=40,
                  out=str(tmp_path / "run"))
    distill.main(cfg)
    found = json.loads((tmp_path / "run/teachers.json").read_text())
    assert found["chosen"] == world.teacher
    assert f"the teacher is {world.teacher}" in capsys.readouterr().out
    base, teacher = found["candidates"]
    assert base["accepted"] == 0 and base["asr"] is None
    assert sum(base["rejected"].values()) == 3 * 10
    assert 0 < teacher["accepted"] <= 10 and teacher["tokens"] > 0
    assert teacher["asr"]["n"] > 0 and teacher["over_refusal"]["n"] > 0
    assert "(chosen)" in (tmp_path / "run/teachers.md").read_text()
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (runs.out / "phase1" / file).read_bytes()


# ------------------------------------------------------------------------------------ mistakes
def test_nan_gradients_stop_the_run_and_keep_the_last_checkpoint(runs, tmp_path, monkeypatch):
    """The loss is fine, its gradient is not (as a bf16 backward pass may overflow)."""
    whole = replace(runs.ease, out=str(tmp_path / "run"), steps=4, save_every=1)
    calls, real = [], train.gated_cross_entropy

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    def poisoned(*arguments):
        calls.append(1)
        losses = real(*arguments)
        return Poison.apply(losses) if len(calls) == 3 else losses

    monkeypatch.setattr(train, "gated_cross_entropy", poisoned)
    with pytest.raises(UserError, match="its gradient's norm nan at step 2, rows "):
        train.main(whole)
    run = tmp_path / "run"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-2"]
    kept = load_file(run / "checkpoints/step-2/adapter_model.safetensors")
    assert all(t.isfinite().all() for t in kept.values())
    monkeypatch.setattr(train, "gated_cross_entropy", real)
    train.main(whole)  # goes on from there
    assert [row["step"] for row in rows(run / "metrics.jsonl")] == [0, 1, 2, 3]


def test_mistakes_in_train(runs, world, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    write_jsonl(mixed, [Record("p", "plain", "harmful", "no.")])
    refused = tmp_path / "refused.jsonl"
    write_jsonl(refused, [Record("x", "how do i paint the car?", "adversarial_harmful",
                                 target="never said", categories=("theft",))])
    bare = tmp_path / "bare.jsonl"
    write_jsonl(bare, [replace(r, categories=()) for r in read_jsonl(world.diagnostic)])
    for name in ("general", "refusals"):
        shutil.copy(getattr(world, name), tmp_path / f"copied-{name}.jsonl")
    other = replace(runs.ease, out=str(tmp_path / "run"))
    baseline = {"method": "refusal", "init": ""}
    for i, (changes, message) in enumerate([
        ({"diagnostic": str(mixed)}, "row 'mixed/p' is harmful: D_diag is adversarial"),
        ({"refusals": str(tmp_path / "copied-general.jsonl")}, "must be of kind harmful"),
        ({"general": str(tmp_path / "copied-refusals.jsonl")}, "must be of kind benign"),
        ({"teacher": ""}, "--teacher MODEL or --traces FILE"),
        ({"diagnostic": ""}, "--method ease needs --diagnostic FILE"),
        ({"traces": world.prompts}, "one of them"),
        ({"teacher": "", "traces": world.test}, "--traces has none of these requests"),
        ({"prompts": world.prompts}, "--prompts is for the baselines"),
        ({"method": "refusal"}, "--init is for --method ease"),
        ({"probe": "phase1", "init": ""}, "--probe phase1 needs --init"),
        ({"direct": False, "harmful_direct": 2}, "--direct false leaves out"),
        ({**baseline, "direct": False, "teacher": ""}, "--direct false leaves out"),
        ({"samples_per_prompt": 4}, "--samples_per_prompt 4 must be from 1 to --attempts 3"),
        ({"diagnostic": str(refused)}, "vulnerable region is empty"),
        ({"judge": "nobody"}, "--judge 'nobody'"),
        ({"teacher": "nowhere"}, "nowhere: no model here"),
        ({"max_length": 3}, "rows are longer than --max_length 3"),
        ({"probe_tokens": 10**6}, "probe: --probe_tokens"),
        ({"method": "deliberative", "init": "", "region": "all"}, "--region is for --method ease"),
        (baseline, "not for --method refusal"),
        ({"method": "deliberative", "init": "", "harmful_direct": 2}, "--method deliberative has"),
        ({"categories": "teacher", "teacher": "", "traces": world.prompts}, "needs a --teacher"),
        ({"policies": "nowhere.json"}, "nowhere.json: No such file"),
        ({"benign_direct": 10**6}, "1000000 benign_direct"),
        ({"lr": 1e30}, "the loss is .* at step"),
    ]):
        with pytest.raises(UserError, match=message):
            train.main(replace(other, **changes, out=str(tmp_path / f"run{i}")))
    with pytest.raises(UserError, match="is harmful and has no categories"):
        train.main(replace(other, diagnostic=str(bare), out=str(tmp_path / "never")))
    assert not (tmp_path / "never").exists()  # seen before the probe is paid for


def test_mistakes_in_distill(runs, world, tmp_path):
    cfg = replace(runs.phase1, out=str(tmp_path / "run"))
    broken, stored = tmp_path / "other", str(runs.out / "phase1/traces.jsonl")
    tiny_folder(broken)
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]  # as many tokens, two of them swapped
    vocab["\u0120the"], vocab["\u0120car"] = vocab["\u0120car"], vocab["\u0120the"]
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    bare = tmp_path / "bare.jsonl"  # the KL would be against the policy of harmless requests
    write_jsonl(bare, [replace(r, categories=()) for r in read_jsonl(stored)])
    no_teacher = {"teacher": "", "prompts": "", "kl_weight": 0.0, "traces": stored}
    contest = {"teacher": "", "teachers": [world.base], "teacher_prompts": 4}
    for i, (changes, message) in enumerate([
        ({"teacher": "", "prompts": ""}, "give --traces FILE"),
        ({"traces": world.prompts}, "give --traces FILE"),
        ({"teacher": "", "traces": world.prompts, "prompts": ""}, "needs a --teacher"),
        ({**no_teacher, "categories": "teacher"}, "--categories teacher classifies"),
        ({"max_traces": 3}, "--max_traces is for stored"),
        ({"dev": world.dev}, "--dev is for --teachers"),
        ({"traces": stored, "prompts": "", "kl_weight": 0.0}, "--kl_weight 0 leaves out"),
        ({"filler": True}, "--filler .* needs --kl_weight 0"),
        ({"teachers": [world.base]}, "needs --prompts and --dev, and neither --teacher"),
        ({"cache_topk": 4, "kl_weight": 0.0}, "--cache_topk .* needs --kl_weight above 0"),
        ({**contest, "dev": world.refusals}, "the teachers are compared on adversarial prompts"),
        ({**contest, "dev": world.dev}, "no trace of any of the teachers was accepted"),
        ({"traces": stored, "prompts": "", "held_out": 999}, "--held_out 999 leaves none"),
        ({"traces": str(bare), "prompts": ""}, "is harmful and has no categories"),
        ({"judge": "xstest", "attempts": 1, "max_new_tokens": 1}, "no trace of teacher .* was"),
        ({"teacher": str(broken), "prompts": "", "traces": stored}, "tokenizers of --model and"),
    ]):
        with pytest.raises(UserError, match=message):
            distill.main(replace(cfg, **changes, out=str(tmp_path / f"run{i}")))


@pytest.mark.parametrize("changes, message", [
    ({"systems": ["base"]}, "NAME=MODEL"), ({"systems": ["a b=x"]}, "NAME=MODEL"),
    ({"systems": ["a=x", "a=y"]}, "stands twice"), ({"out": ""}, "--out DIR"),
    ({"refusal_system": "nobody"}, "--refusal_system 'nobody' is none"),
    ({"prompts": ["nowhere.jsonl"]}, "nowhere.jsonl"), ({"judge": ["nobody"]}, "--judge 'nobody'"),
    ({"systems": ["base=nowhere"], "refusal_system": "", "deliberative_system": "",
      "base_system": ""}, "nowhere"),
    ({"score_only": True}, "--score_only: .* holds no evaluation"),
    ({"compare": ["ease"]}, "--compare: expected two of the --systems"),
    ({"compare": ["ease", "nobody"]}, "--compare: expected two of the --systems"),
    ({"systems": []}, "--systems '': expected NAME=MODEL")])
def test_mistakes_in_evaluate(runs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(replace(runs.test, **({"out": str(tmp_path / "run")} | changes)))


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          check=False)


def test_ease_needs_diagnostic_prompts(world, tmp_path):
    wrong = python("train.py", "--model", "x", "--refusals", world.refusals, "--general",
                   world.general, "--teacher", "x", "--out", str(tmp_path / "o"))
    assert wrong.returncode == 2 and not (tmp_path / "o").exists()
    assert wrong.stderr == "error: --method ease needs --diagnostic FILE\n"


@pytest.mark.parametrize("script, flags", [
    ("distill.py", ["--model", "x"]),
    ("train.py", ["--model", "x", "--diagnostic", "x", "--refusals", "x", "--general", "x"]),
    ("evaluate.py", ["--systems", "a=data/toy/nowhere", "--prompts", "x"])])
def test_command_line_of_every_script(script, flags, tmp_path):
    """--help works, and a mistake is one line on stderr and status 2, without a traceback."""
    usage, wrong = python(script, "--help"), python(script, *flags, "--out", str(tmp_path / "o"))
    assert usage.returncode == 0 and "--out" in usage.stdout
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1, wrong.stderr

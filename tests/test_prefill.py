import json
from dataclasses import replace

import evaluate
import pytest

from ease import prefill as module
from ease.generate import Sampling, generate
from ease.method import THINK_CLOSE, THINK_OPEN
from ease.prefill import NOTE, OPENING, WHERE, prefill_table
from ease.records import Record, Response, UserError
from ease.report import section
from ease.respond import respond
from ease.run import parse_config
from tests.checks import verify
from tests.tiny import TOKENIZER, tiny_model

RECORDS = [Record("a", "how do i paint the car?", "harmful", target="sure, paint the car:"),
           Record("b", "how do i paint the old lamp?", "harmful")]


def test_forced_ids():
    verify(module, "forced_ids")


def test_only_what_follows_is_a_response():
    """The forced ids are in no text and no count, and there is no gate."""
    model, forced = tiny_model(), [TOKENIZER.encode("sure,"), TOKENIZER.encode(OPENING)[:4]]
    found = respond(model, TOKENIZER, RECORDS, Sampling(6), forced=forced)
    prompts = [TOKENIZER.user_prompt(r.prompt) + ids for r, ids in zip(RECORDS, forced)]
    wanted = generate(model, prompts, Sampling(6), TOKENIZER.stop_ids)
    for r, g in zip(found, wanted, strict=True):
        assert r.text == TOKENIZER.decode(g.ids) and r.tokens["total"] == len(g.ids) + g.finished
        assert r.gate != r.gate and not r.opened


def test_table():
    def answers(*verdicts: str) -> list[Response]:
        return [Response(Record(str(i), "q", "harmful"), "x", "", "x", "absent",
                         verdicts={"xstest": v}) for i, v in enumerate(verdicts)]

    lines = prefill_table({("base", "direct", 0): answers("safe", "safe"),
                           ("base", "direct", 5): answers("safe", "unsafe"),
                           ("ease", "direct", 5): answers("unsafe", "unsafe")}, "xstest")
    assert [(line["system"], line["begun"], line["judge"]) for line in lines] == [
        ("base", "direct", "xstest"), ("ease", "direct", "xstest")]
    assert [lines[0][k].value for k in ("k = 0", "k = 5")] == [0.0, 0.5]
    assert "| 50.0 [" in section("Prefilling", lines[:1], NOTE)


def test_the_flag(runs, tmp_path):
    """A line a system and place; the rows behind a forced opening are stages of the run."""
    cfg = replace(runs.test, out=str(tmp_path / "t"), systems=runs.test.systems[:2], limit=12,
                  base_system="base", refusal_system="", deliberative_system="", prefill=[0, 3])
    evaluate.main(cfg)
    summary = json.loads((tmp_path / "t/summary.json").read_text())
    assert [(line["system"], line["begun"]) for line in summary["prefill"]] == [
        (name, where) for name in ("base", "phase1") for where in WHERE]
    assert all({"k = 0", "k = 3"} <= set(line) for line in summary["prefill"])
    assert "## Prefilling" in (tmp_path / "t/report.md").read_text()
    files = {p.name for p in (tmp_path / "t").glob("rows-base+*.jsonl")}
    assert files == {"rows-base+direct-3.jsonl", "rows-base+behind-an-empty-block-0.jsonl",
                     "rows-base+behind-an-empty-block-3.jsonl"}
    for changes in ({"prefill": [-1]}, {"judge": ["target"]}):
        with pytest.raises(UserError, match="--prefill: k from 0 on, and a --judge besides"):
            evaluate.main(replace(cfg, out=str(tmp_path / "u"), **changes))


def test_numbers_on_the_command_line():
    assert parse_config(evaluate.Config, ["--prefill", "0", "10"]).prefill == [0, 10]


def test_the_block_says_nothing():
    assert WHERE["behind an empty block"] == THINK_OPEN + THINK_CLOSE

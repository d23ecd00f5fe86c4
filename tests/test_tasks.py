import csv
import json

import pytest
import torch

import evaluate
from ease import tasks
from ease.records import UserError
from ease.tasks import (Item, encode_item, log_likelihoods, measure, read_items,
                        task_files, utility)
from tests.checks import verify
from tests.tiny import TOKENIZER, tiny_folder, tiny_model

ENDINGS = ["take the cloth.", "[step] paint it [substeps] red.", "join.", "the car is here."]
HELLASWAG = {"ind": 7, "activity_label": "Paint", "ctx_a": "[header] How to paint [title] Take it.",
             "ctx_b": "the cloth", "endings": ENDINGS, "label": 1}
SUM = {"question": "How many is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}
QUESTIONS = [[f"What is {n}?\n", "one, or so", "two", "three", 'the "fourth"', "ABCD"[n % 4]]
             for n in range(7)]


@pytest.mark.parametrize("name", ["clean", "encode_item"])
def test_functions(name):
    verify(tasks, name)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_mmlu(folder, header=False):
    for split, rows in (("dev", QUESTIONS[:6]), ("test", QUESTIONS[4:])):
        (folder / split).mkdir(parents=True)
        with open(folder / split / f"us_policy_{split}.csv", "w", newline="") as f:
            write = csv.writer(f)
            if header:
                write.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
                rows = [[*row[:5], "ABCD".index(row[5])] for row in rows]
            write.writerows(rows)
    return str(folder)


def write_all(path):
    files = [f"hellaswag={write_lines(path / 'h.jsonl', [HELLASWAG, HELLASWAG])}",
             f"mmlu={write_mmlu(path / 'mmlu')}",
             f"gsm8k={write_lines(path / 'g.jsonl', [SUM] * 7)}"]
    return files, {name: read_items(name, found) for name, found in task_files(files).items()}


def test_prompts(tmp_path):
    _, items = write_all(tmp_path)
    h, m, g = (items[name] for name in ("hellaswag", "mmlu", "gsm8k"))
    assert h[0] == Item("h/0", "Paint: How to paint. Take it. The cloth",
                        (ENDINGS[0], " paint it red.", *ENDINGS[2:]), 1)
    start = "The following are multiple choice questions (with answers) about us policy.\n\n"
    choices = 'A. one, or so\nB. two\nC. three\nD. the "fourth"'
    shown = [f"What is {n}?\n{choices}\nAnswer:" for n in range(7)]
    shots = "".join(f"{text} {letter}\n\n" for text, letter in zip(shown, "ABCDA"))
    assert m == [Item(f"us_policy_test/{k}", start + shots + shown[4 + k], tuple("ABCD"), k)
                 for k in range(3)]
    asked = "Question: How many is 2 + 2?\nAnswer:"
    shots = f"{asked} {SUM['answer']}\n\n" * 5
    assert g == [Item(f"g/{k}", shots + asked, (), SUM["answer"]) for k in (5, 6)]
    examples = write_lines(tmp_path / "e.jsonl", [{**SUM, "question": str(k)} for k in range(9)])
    [files] = task_files([f"gsm8k={tmp_path / 'g.jsonl'}+{examples}"]).values()
    others = read_items("gsm8k", files, 2)
    assert [i.id for i in others] == ["g/0", "g/1"]  # all are asked, --limit of them
    assert others[0].context.startswith("Question: 0\nAnswer: 2 + 2") and (
        "Question: 4\n" in others[0].context and "Question: 5\n" not in others[0].context)


def test_both_spellings_of_mmlu_are_one(tmp_path):
    both = [read_items("mmlu", task_files([f"mmlu={write_mmlu(tmp_path / name, header)}"])["mmlu"])
            for name, header in (("published", False), ("header", True))]
    assert both[0] == both[1]


@pytest.mark.parametrize("spec", ["arc=x", "mmlu", "mmlu=nowhere", "hellaswag=", "gsm8k=a gsm8k=b"])
def test_mistakes_in_tasks(spec):
    with pytest.raises(UserError, match="expected hellaswag=FILE"):
        task_files(spec.split(" "))


@pytest.mark.parametrize("task, row, message", [
    ("hellaswag", {"label": 4}, r"x.jsonl:2: hellaswag needs activity_label"),
    ("hellaswag", {"label": ""}, "needs"), ("hellaswag", {"ctx_b": None}, "needs"),
    ("hellaswag", {"endings": ENDINGS[:3]}, "needs"), ("hellaswag", {"endings": "abc"}, "needs"),
    ("hellaswag", {"endings": ["[x]", *"abc"]}, "needs"), ("hellaswag", {"endings": 3}, "needs"),
    ("gsm8k", {"answer": "4"}, "x.jsonl:2: gsm8k needs question, answer"),
    ("gsm8k", {"question": None}, "needs"), ("gsm8k", {"answer": 4}, "needs"),
    ("gsm8k", {"answer": ["#### "]}, "needs"), ("gsm8k", {"question": "\ud83d"}, "needs"),
    ("gsm8k", {"answer": "\ud83d #### 4"}, "needs"),
    ("hellaswag", {"endings": ["\ud83d", *"abc"]}, "needs")])
def test_mistakes_in_rows(task, row, message, tmp_path):
    good = HELLASWAG if task == "hellaswag" else SUM
    file = write_lines(tmp_path / "x.jsonl", [good, {**good, **row}])
    with pytest.raises(UserError, match=message):
        read_items(task, [(file, "")])


@pytest.mark.parametrize("line, message", [
    ("What?,a,b,c,d,E", "us_policy_test.csv:1: mmlu needs question,choice0"),
    ("What?,a,b,c,d", "us_policy_test.csv:1: 5 fields"),
    ('"What?,a,b,c,d,A', "a quote is not closed")])
def test_mistakes_in_mmlu(line, message, tmp_path):
    folder = write_mmlu(tmp_path / "m")
    (tmp_path / "m/test/us_policy_test.csv").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        read_items("mmlu", task_files([f"mmlu={folder}"])["mmlu"])


def test_too_few_examples(tmp_path):
    file = write_lines(tmp_path / "g.jsonl", [SUM] * 4)
    with pytest.raises(UserError, match="g.jsonl: 5 examples are needed, it has 4"):
        read_items("gsm8k", [(file, file)])


def test_log_likelihoods_share_prefixes_and_change_nothing():
    """Against whole texts one by one: contexts that begin alike, equal ones, one inside the other,
    one of a single token; endings of unequal length, some alike but for the last token.
    """
    model = tiny_model()
    items = [([5, 6, 7, 8], [[9], [10], [11, 12, 13], [11, 12, 14]]),
             ([5, 6, 7, 8], [[9]]), ([5, 6, 9, 10, 11], [[7, 8], [7]]),
             ([5, 6, 9], [[10], [10, 11, 12]]), ([40], [[3, 4], [3]])]
    best = model(torch.tensor([[5, 6, 7, 8]]))[0, -1].argmax().item()
    items[1][1].append([best])
    found = log_likelihoods(model, items)
    for (context, endings), scores in zip(items, found, strict=True):
        for ending, (log_p, greedy) in zip(endings, scores, strict=True):
            p = model(torch.tensor([context + ending]))[0].log_softmax(-1)
            at = range(len(context) - 1, len(context) + len(ending) - 1)
            assert log_p == pytest.approx(p[at, ending].sum().item(), rel=1e-4)
            assert greedy == (p[at].argmax(-1).tolist() == ending)
    assert found[1][-1][1] and not found[1][0][1]


def test_measure(tmp_path):
    model = tiny_model(max_position_embeddings=4096)
    _, items = write_all(tmp_path)

    def run(task, raw, threshold=None):
        return measure(model, TOKENIZER, task, items[task], raw, 12, 2, threshold)

    for task, metrics in tasks.METRICS.items():
        for raw in (True, False):
            rows = run(task, raw)
            assert [r["id"] for r in rows] == [i.id for i in items[task]]
            assert all({*r["scores"]} >= {*metrics} and r["gold"] == i.gold
                       and (r["reasons"] is None) == raw for r, i in zip(rows, items[task]))
    for raw in (True, False):
        row, item = run("mmlu", raw)[0], items["mmlu"][0]
        context, endings = encode_item(TOKENIZER, item, raw)
        wanted = log_likelihoods(model, [(context, endings[:4])])[0]
        assert row["log_p"] == pytest.approx([p for p, _ in wanted], rel=1e-4)
    def policy(text):
        return [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]

    for task in ("mmlu", "gsm8k"):
        told = measure(model, TOKENIZER, task, items[task], False, 12, 2, None, policy)
        assert told != run(task, False)
    for task in items:  # the gate decides
        for threshold in (0.0, 2.0):
            rows = run(task, False, threshold)
            assert {r["reasons"] for r in rows} == {threshold == 0}
    opened = run("gsm8k", False, 0.0)
    assert all(r["text"].startswith("<think>") for r in opened)
    unclosed = [r for r in opened if "</think>" not in r["text"]]
    assert unclosed and all(r["scores"] == {"strict": None, "flexible": None} for r in unclosed)


def test_utility_lines():
    def rows(values, thinks):
        return {"gsm8k": [{"id": str(k), "reasons": thinks, "scores": {"strict": v, "flexible": 1}}
                          for k, v in enumerate(values)]}

    lines = utility({"a": rows([True, False, True, True], True),
                     "b": rows([True, True, None, True], None)}, "a")
    assert [(x["metric"], x["system"]) for x in lines] == [
        ("strict", "a"), ("strict", "b"), ("flexible", "a"), ("flexible", "b")]
    a, b = lines[:2]
    assert a["rate"].value == 0.75 and a["difference"] is None and a["reasons"].value == 1
    assert (b["rate"].value, b["rate"].unparsed, b["reasons"]) == (1, 1, None)
    assert b["difference"]["value"] == pytest.approx(1 / 3) and b["difference"]["n"] == 3


def test_evaluate_with_tasks(tmp_path, capsys):
    """No --prompts needed; a stage a system and task; two systems are compared on the same rows."""
    for name in "ab":
        tiny_folder(tmp_path / name, seed=ord(name), max_position_embeddings=4096)
    specs, _ = write_all(tmp_path)
    cfg = evaluate.Config(systems=[f"{n}={tmp_path / n}" for n in "ab"], out=str(tmp_path / "run"),
                          tasks=specs, max_new_tokens=12, limit=1, device="cpu")
    evaluate.main(cfg)
    printed = capsys.readouterr().out
    assert "## Utility, chat prompts" in printed and "ASR by" not in printed
    report = (tmp_path / "run/report.md").read_text()
    assert "| minus a |" in report.replace("  ", "") and "hellaswag acc_norm" in report
    summary = json.loads((tmp_path / "run/summary.json").read_text())["utility"]
    assert summary["base"] == "a" and len(summary["lines"]) == 2 * 5
    assert all(line["rate"]["n"] + line["rate"]["unparsed"] == 1 for line in summary["lines"])
    # stopped before the last task: the others are not measured again
    kept = tmp_path / "run/tasks-a-mmlu.jsonl"
    before = kept.stat().st_mtime_ns
    for gone in ("done", "summary.json", "tasks-b-gsm8k.jsonl"):
        (tmp_path / "run" / gone).unlink()
    evaluate.main(cfg)
    assert json.loads((tmp_path / "run/summary.json").read_text())["utility"] == summary
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--prefill, --latency and --search answer --prompts"):
        evaluate.main(evaluate.Config(systems=cfg.systems, out="x", tasks=specs, gate_sweep="a"))
    (tmp_path / "h.jsonl").write_text(json.dumps({**HELLASWAG, "label": 2}) + "\n")
    with pytest.raises(UserError, match="another"):  # other questions are another run
        evaluate.main(cfg)

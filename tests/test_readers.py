import json

import pytest

from ease.readers import digest, read_named, read_records
from ease.records import Record, UserError, write_jsonl
from ease.traces import join_traces

ROW = {"id": "7", "question": "Is it fine to do that?", "response": "<think>\nThe user asks.\n\nSo.\n</think>\n\nNo, it is not.",
       "category": ["Self-Harm", "Illicit / Criminal Behavior"], "source": "Some", "score": {"x": 10}}


def test_star1(tmp_path):
    file = tmp_path / "star.json"
    file.write_text(json.dumps([ROW]))
    assert read_records(file) == [Record("7", ROW["question"], "harmful", "No, it is not.", "The user asks.\n\nSo.",
                                         ("Self-Harm", "Illicit / Criminal Behavior"), "STAR-1/Some", "7")]


@pytest.mark.parametrize("rows, message", [
    ([], "at least one"), ({"a": 1}, "JSON array"), ([{**ROW, "question": None}], "row 0: a field has the wrong type"),
    ([ROW, {k: v for k, v in ROW.items() if k != "category"}], "row 1: field 'category' is missing; found .*'question'"),
    ([{**ROW, "response": "no block"}], "row 0: field 'response': the think block is absent"), ([ROW, ROW], "already used"), ([3], "found int"),
    ([{**ROW, "category": ["Arson"]}], "unknown category 'arson'"),
    ([{"text": "x", "y": 1}], "row 0: unknown columns text, y; accepted: id, kind, prompt; category, id, question, response; goal, target"),
])
def test_star1_errors(tmp_path, rows, message):
    (tmp_path / "star.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        read_records(tmp_path / "star.json")


def test_named_records_keep_their_request(tmp_path):
    write_jsonl(tmp_path / "diag.jsonl", [Record("1", "p", "harmful"), Record("2", "q", "harmful", group="g")])
    assert [(r.id, r.request) for r in read_named(tmp_path / "diag.jsonl")] == [("diag/1", "1"), ("diag/2", "g")]


def read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return read_records(tmp_path / name)


def known(id, prompt, kind, *more, **fields):
    """A record of a file that has no id for the underlying request: the prompt's digest is one, in every file."""
    return Record(id, prompt, kind, *more, group=digest(prompt), **fields)


def test_row_numbers_of_two_files_are_no_common_request(tmp_path):
    first, second = (read(tmp_path, name, f"goal,target\n{goal},Sure\nsame,Sure\n")[0:2] for name, goal in (("a.csv", "one"), ("b.csv", "two")))
    assert first[0].id == second[0].id and first[0].request != second[0].request and first[1].request == second[1].request


def test_tables(tmp_path):
    """CSV with quotes and line breaks in a field, TSV, and the kinds that the columns stand for."""
    assert read(tmp_path, "a.csv", 'goal,target\n"Do a, b\nand c","Sure, here"\nDo d,Sure\n') == [
        known("0", "Do a, b\nand c", "harmful", source="AdvBench", target="Sure, here"), known("1", "Do d", "harmful", source="AdvBench", target="Sure")]
    assert read(tmp_path, "x.csv", "id,prompt,type,label,focus,note\n1,How?,homonyms,safe,k,v\n2,Bad?,contrast,unsafe,k,v\n") == [
        known("1", "How?", "benign", source="XSTest/homonyms"), known("2", "Bad?", "harmful", source="XSTest/contrast")]
    assert read(tmp_path, "s.csv", "category,source,forbidden_prompt\nc,o,Bad?\n") == [known("0", "Bad?", "harmful", source="StrongREJECT/c")]
    wild = read(tmp_path, "w.tsv", "vanilla\tadversarial\tcompletion\tdata_type\nv\t\tno.\tvanilla_harmful\nv\twrapped v\tno.\tadversarial_harmful\n"
                                   "u\twrapped u\tyes\tadversarial_benign\n")
    assert [(r.prompt, r.kind, r.response) for r in wild] == [("v", "harmful", "no."), ("wrapped v", "adversarial_harmful", "no."), ("wrapped u", "adversarial_benign", "yes")]
    assert wild[0].group == wild[1].group != wild[2].group  # one underlying request, two forms


def test_artifacts_and_tasks(tmp_path, capsys):
    jailbreak = {"index": 3, "goal": "g", "behavior": "b", "category": "c", "prompt": "p", "response": "harmful text", "jailbroken": True}
    found = read(tmp_path, "j.json", json.dumps({"parameters": {"method": "PAIR"}, "jailbreaks": [jailbreak, {**jailbreak, "index": 4, "prompt": None}]}))
    assert found == [Record("3", "p", "adversarial_harmful", source="JailbreakBench", group="b", attack="PAIR")]  # no response: it is the attacked model's
    assert "dropped 1 of 2 rows without a prompt" in capsys.readouterr().out
    assert read(tmp_path, "g.jsonl", '{"question": "1+1?", "answer": "#### 2"}\n') == [known("0", "1+1?", "benign", "#### 2", source="GSM8K")]
    assert read(tmp_path, "al.json", '[{"instruction": "Sum up.", "input": "a text", "output": "t"}]') == [
        known("0", "Sum up.\n\na text", "benign", "t", source="Alpaca")]
    seed = {"id": "seed_task_0", "name": "n", "instruction": "Do.", "instances": [{"input": "", "output": "done "}], "is_classification": False}
    assert read(tmp_path, "t.jsonl", json.dumps(seed) + "\n") == [known("seed_task_0", "Do.", "benign", "done", source="self-instruct")]


@pytest.mark.parametrize("name, text, message", [
    ("e.csv", "goal,target\n", "no rows"), ("l.csv", "id,prompt,type,label\n1,p,t,maybe\n", "l.csv:2: field 'label' is 'maybe'"),
    ("d.tsv", "vanilla\tadversarial\tcompletion\tdata_type\nv\ta\tc\tother\n", "field 'data_type' is 'other'"),
    ("i.jsonl", '{"id": "1", "instruction": "x", "instances": []}\n', "i.jsonl:1: a field has the wrong type")])
def test_table_errors(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, name, text)


def test_rows_of_the_official_code(tmp_path):
    """Its prompts (a JSON array in a .jsonl file) and its traces (whose open marker stood in the teacher's prompt) join on the text."""
    prompts = read(tmp_path, "adversarial_data.jsonl", json.dumps([{"prompt": "p", "data_type": "Adversarial Harmful"}, {"prompt": "q", "data_type": "Adversarial Benign"}], indent=2))
    assert [(r.prompt, r.kind) for r in prompts] == [("p", "adversarial_harmful"), ("q", "adversarial_benign")]
    row = {"original_question": "p", "categories": ["Self-Harm"], "categories_raw": "Self-Harm", "prompt": "policies and p"}
    rows = [{**row, "response": "It is bad.\n</think>\n\nNo."}, {**row, "response": "<think>\nIt is bad.\n</think>\n\nNo."}, {**row, "response": "cut off in the"},
            {**row, "original_question": "q", "categories": ["benign"], "response": "Fine.\n</think>\n\nYes."}]
    traces = read(tmp_path, "traces.json", json.dumps(rows))
    assert [(r.prompt, r.kind, r.reasoning, r.response, r.categories) for r in traces] == [
        ("p", "harmful", "It is bad.", "No.", ("Self-Harm",)), ("p", "harmful", "It is bad.", "No.", ("Self-Harm",)), ("p", "harmful", "", "", ("Self-Harm",)),
        ("q", "benign", "Fine.", "Yes.", ("benign",))]
    assert [(r.prompt, r.reasoning) for r in join_traces(prompts, traces)] == [("p", "It is bad."), ("q", "Fine.")]
    for changes, message in (({"data_type": "Vanilla"}, "field 'data_type' is 'Vanilla'"), ({"data_type": None}, "wrong type")):
        with pytest.raises(UserError, match=message):
            read(tmp_path, "x.json", json.dumps([{"prompt": "p", **changes}]))

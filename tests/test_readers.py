import gzip
import json

import pytest

from ease.readers import read_named, read_records
from ease.records import Record, UserError, digest, write_jsonl
from ease.traces import join_traces

ROW = {"id": "7", "question": "Is it fine to do that?", "source": "Some", "score": {"x": 10},
       "response": "<think>\nThe user asks.\n\nSo.\n</think>\n\nNo, it is not.",
       "category": ["Self-Harm", "Illicit / Criminal Behavior"]}
STAR = Record("7", ROW["question"], "harmful", "No, it is not.", "The user asks.\n\nSo.",
              ("Self-Harm", "Illicit / Criminal Behavior"), "STAR-1/Some")
TASK = {"instruction": "Sum up.", "input": "a text", "output": "t"}
OWN = {"id": "1", "prompt": "p", "kind": "benign"}
JAILBREAK = {"index": 3, "goal": "g", "behavior": "b", "category": "c", "prompt": "p",
             "response": "harmful text", "jailbroken": True}


def read(tmp_path, name, data):
    """The records of a file with these contents: bytes, a text, or a value for JSON."""
    if not isinstance(data, str | bytes):
        data = json.dumps(data)
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return read_records(tmp_path / name)


def without(row, *names, **changes):
    return {k: v for k, v in (row | changes).items() if k not in names}


# ------------------------------------------------------------------------------- formats
@pytest.mark.parametrize("changes, fields", [
    ({}, {}), ({"id": 7}, {}),
    ({"response": "The user asks.\n\nSo.\n</think>\n\nNo, it is not."}, {}),  # opened by a template
    ({"category": "['Self-Harm', 'Illicit / Criminal Behavior']"}, {}),  # as a table has it
    ({"category": ["benign"]}, {"kind": "benign", "categories": ("benign",)}),
    ({"category": None, "source": None}, {"kind": "benign", "categories": (), "source": "STAR-1/"}),
])
def test_star1(tmp_path, changes, fields):
    wanted = Record(**{**vars(STAR), **fields})
    assert read(tmp_path, "star.json", [{**ROW, **changes}]) == [wanted]


def test_star1_in_other_forms(tmp_path):
    """Its benign set has no category; a table has lists as text."""
    benign = Record(**{**vars(STAR), "kind": "benign", "categories": ()})
    assert read(tmp_path, "benign.json", [without(ROW, "category")]) == [benign]
    table = ("id;question;response;category;source\n"
             "7;Is it fine to do that?;\"<think>\nThe user asks.\n\nSo.\n</think>\n\n"
             "No, it is not.\";['Self-Harm', 'Illicit / Criminal Behavior'];Some\n")
    assert read(tmp_path, "star.CSV", table) == [STAR]


def test_tables(tmp_path):
    """Quotes and line breaks in a field; the kinds that columns stand for."""
    assert read(tmp_path, "a.csv", 'goal,target\n"Do a, b\nand c","Sure, here"\n\nDo d,Sure\n') == [
        Record("0", "Do a, b\nand c", "harmful", source="AdvBench", target="Sure, here"),
        Record("1", "Do d", "harmful", source="AdvBench", target="Sure")]
    assert read(tmp_path, "s.csv", "category,source,forbidden_prompt\nc,o,Bad?\n") == [
        Record("0", "Bad?", "harmful", source="StrongREJECT/c")]


@pytest.mark.parametrize("table, ids", [
    ("id,prompt,type,label,f\n1,How?,homonyms,safe,f\n2,Bad?,contrast_homonyms,unsafe,f\n", "12"),
    ("prompt,type,label\nHow?,homonyms,safe\nBad?,contrast_homonyms,unsafe\n", "01"),
    ("id_v1,id_v2,type,prompt,focus\nv1-1,x,homonyms,How?,f\n,y,contrast_homonyms,Bad?,\n", "xy"),
])
def test_forms_of_xstest(tmp_path, table, ids):
    assert read(tmp_path, "x.csv", table) == [
        Record(ids[0], "How?", "benign", source="XSTest/homonyms"),
        Record(ids[1], "Bad?", "harmful", source="XSTest/contrast_homonyms")]


def test_forms_of_wildjailbreak(tmp_path):
    table = ("vanilla\tadversarial\tcompletion\tdata_type\nv\t\tno.\tvanilla_harmful\n"
             "v\twrapped v\tno.\tadversarial_harmful\nu\twrapped u\tyes\tadversarial_benign\n")
    found = read(tmp_path, "w.tsv", table)
    assert [(r.prompt, r.kind, r.response) for r in found] == [
        ("v", "harmful", "no."), ("wrapped v", "adversarial_harmful", "no."),
        ("wrapped u", "adversarial_benign", "yes")]
    assert found[0].group == found[1].group != found[2].group  # one request, two forms
    table = "adversarial\tlabel\tdata_type\nw\t1\tadversarial_harmful\nx\t0\tadversarial_benign\n"
    assert read(tmp_path, "eval.tsv", table) == [
        Record("0", "w", "adversarial_harmful", source="WildJailbreak"),
        Record("1", "x", "adversarial_benign", source="WildJailbreak")]


@pytest.mark.parametrize("about, attack", [({"method": "GCG"}, "GCG"), (None, ""), (["GCG"], "")])
def test_jailbreakbench_artifacts(tmp_path, capsys, about, attack):
    found = [JAILBREAK, {**JAILBREAK, "index": 4, "prompt": None}]
    assert read(tmp_path, "j.json", {"parameters": about, "jailbreaks": found}) == [
        Record("3", "p", "adversarial_harmful", source="JailbreakBench", group="b", attack=attack)]
    assert "dropped 1 of 2 rows without a prompt" in capsys.readouterr().out


@pytest.mark.parametrize("name, kind", [("harmful-behaviors.csv", "harmful"),
                                        ("jbb.csv", "harmful"), ("JBB-Benign.csv", "benign")])
def test_jailbreakbench_behaviours(tmp_path, capsys, name, kind):
    """The two sets have the same columns: what the name makes of them is said."""
    found = read(tmp_path, name, "Index,Goal,Target,Behavior,Category,Source\n0,g,Sure,b,c,s\n")
    assert found == [Record("0", "g", kind, source="JailbreakBench", group="b", target="Sure")]
    assert f"{kind} by the file's name" in capsys.readouterr().out


@pytest.mark.parametrize("name, data, wanted", [
    ("g.jsonl", {"question": "1+1?", "answer": "#### 2"},
     Record("0", "1+1?", "benign", "#### 2", source="GSM8K")),
    ("al.json", [TASK], Record("0", "Sum up.\n\na text", "benign", "t", source="Alpaca")),
    ("al.json", [{**TASK, "input": None, "output": None}],
     Record("0", "Sum up.", "benign", source="Alpaca")),
    ("t.jsonl", {"id": "seed_0", "instruction": "Do.", "instances": [{"output": "d "}, {}]},
     Record("seed_0", "Do.", "benign", "d", source="self-instruct")),
    ("c.jsonl", {"id": "x", "category": "c", "subcategory": "s", "prompt": "How?", "chosen": "So.",
                 "chosen_model": "m", "rejected": "No."},
     Record("x", "How?", "benign", "So.", source="CoCoNot/s")),
    ("j.jsonl", {"id": 0, "prompt": "Bad?", "answer": "No.", "dataset": "d", "category": "safety"},
     Record("0", "Bad?", "harmful", "No.", source="just-eval/d")),
    ("o.json", [{**OWN, "response": None, "categories": None, "group": None}], Record(**OWN)),
    ("o.csv", "id,prompt,kind,categories\n1,p,benign,\n", Record(**OWN)),
])
def test_other_formats(tmp_path, name, data, wanted):
    assert read(tmp_path, name, data) == [wanted]


def test_rows_of_the_official_code(tmp_path):
    """Its prompts (a JSON array in a .jsonl file) and traces (opened by the prompt) join."""
    prompts = read(tmp_path, "adversarial_data.jsonl", json.dumps([
        {"prompt": "p", "data_type": "Adversarial Harmful"},
        {"prompt": "q", "data_type": "Adversarial Benign"}], indent=2))
    assert [r.kind for r in prompts] == ["adversarial_harmful", "adversarial_benign"]
    harmful = {"original_question": "p", "categories": ["Self-Harm"], "prompt": "policies and p"}
    traces = read(tmp_path, "traces.json", [
        {**harmful, "response": "It is bad.\n</think>\n\nNo."},
        {**harmful, "response": "<think>\nIt is bad.\n</think>\n\nNo."},
        {**harmful, "response": "cut off in the"}, {**harmful, "response": "All of it.\n</think>"},
        {**harmful, "original_question": "q", "categories": ["benign"],
         "response": "Fine.\n</think>\n\nYes."}])
    assert [(r.prompt, r.kind, r.reasoning, r.response) for r in traces] == [
        ("p", "harmful", "It is bad.", "No."), ("p", "harmful", "It is bad.", "No."),
        ("p", "harmful", "", ""), ("p", "harmful", "", ""), ("q", "benign", "Fine.", "Yes.")]
    assert [r.categories for r in traces] == [("Self-Harm",)] * 4 + [("benign",)]
    found = [(r.prompt, r.reasoning) for r in join_traces(prompts, traces)]
    assert found == [("p", "It is bad."), ("q", "Fine.")]


# ------------------------------------------------------------------------------- files
@pytest.mark.parametrize("name, data", [
    ("a.json", [TASK, TASK]), ("a.jsonl", json.dumps([TASK, TASK], indent=0)),
    ("a.json", f"{json.dumps(TASK)}\n\n{json.dumps(TASK)}"), ("a", json.dumps([TASK, TASK])),
    ("a.JSONL", f"\ufeff\n{json.dumps(TASK)}\r\n{json.dumps(TASK)}\r\n"),
    ("a.csv", f"{json.dumps(TASK)}\n{json.dumps(TASK)}\n"),
    ("a.jsonl.gz", gzip.compress(f"{json.dumps(TASK)}\n{json.dumps(TASK)}\n".encode())),
    ("a.CSV", "instruction,input,output\nSum up.,a text,t\n" + '"Sum up.",a text,"t"\n'),
    ("a.csv", "instruction;input;output\r\nSum up.;a text;t\r\nSum up.;a text;t\r\n"),
    ("a.txt", "\n instruction\tinput\toutput\nSum up.\ta text\tt\n\t\t\nSum up.\ta text\tt"),
    ("a.csv", "instruction,input,output\nSum up.,a text,t\nSum up.,a text,t\n".encode("utf-16")),
])
def test_a_format_is_known_by_what_is_in_the_file(tmp_path, name, data):
    found = [(r.id, r.prompt, r.response) for r in read(tmp_path, name, data)]
    assert found == [("0", "Sum up.\n\na text", "t"), ("1", "Sum up.\n\na text", "t")]


def test_a_long_field_of_a_table(tmp_path):
    long = "please " * 30000
    assert read(tmp_path, "l.csv", f'goal,target\n"{long}",Sure\n')[0].prompt == long


@pytest.mark.parametrize("lines, line, message", [
    (['"Say bye,Sure', "Say more,Sure", "Say all,Sure"], 3, "is not closed"),  # swallows the rest
    (['"Say bye,Sure', '"Say more",Sure'], 3, "too early"),
    (['"Say bye,Sure', 'Say more,Sure"', "Say all,Sure"], 3, "1 fields, the header has 2"),
    (['"Say\nbye",Sure', '"Say more'], 5, "is not closed"), (["Say bye, then,Sure"], 3, "3 fields"),
    (["Say bye"], 3, "1 fields"),
])
def test_no_row_of_a_table_is_lost_in_silence(tmp_path, lines, line, message):
    with pytest.raises(UserError, match=f"q.csv:{line}: .*{message}"):
        read(tmp_path, "q.csv", "\n".join(["goal,target", "Say hello,Sure", *lines, ""]))


@pytest.mark.parametrize("name, data, message", [
    ("s.json", [], "s.json: no records"), ("s.json", {"a": 1}, "unknown columns a;"),
    ("s.json", "\n", "the file is empty"), ("s.json", "null", "row 0: .*found NoneType"),
    ("s.json", [3], "row 0: expected a JSON object, found int"),
    ("s.jsonl", f"{json.dumps(TASK)}\n[1]", "s.jsonl:2: expected a JSON object, found list"),
    ("s.json", {"parameters": {}, "jailbreaks": [None]}, "row 0: .*found NoneType"),
    ("s.json", {"parameters": {}, "jailbreaks": []}, "no records"),
    ("s.json", {"parameters": {}, "jailbreaks": None}, "unknown columns parameters, jailbreaks"),
    ("s.json", {"parameters": {}, "jailbreaks": [{"index": 0}]}, "unknown columns index;"),
    ("s.jsonl", '{"goal": "a"\n{"goal": "b"}', "s.jsonl:1: not JSON"),
    ("s.json", '[{"goal": "a"},\n{"goal": ]', "s.json:2: not JSON"),
    ("s.json", "goal,target\na,b", "s.json:1: not JSON"),
    ("s.csv", "goal,target\n", "no rows"), ("s.csv", ";", "no rows"),
    ("s.csv", "goal,target,goal\na,b,c\n", "s.csv:1: two columns of one name"),
    ("s.parquet", b"PAR1\x15\x04", "this is Parquet; what is read: CSV, TSV, JSON"),
    ("s.json", [{"text": "x", "y": 1}], "row 0: unknown columns text, y; accepted: id, prompt, "
     "kind; id, question, response, category; id, question, response; goal, target"),
    ("s.json", [ROW, without(ROW, "category")], "row 1: field 'category' is missing"),
    ("s.json", [ROW, ROW], "already used"), ("s.json", [{**ROW, "question": None}], "no row has a"),
    ("s.csv", "question,choice0,choice1,answer\nq,a,b,0\n", r"multiple choice \(MMLU\)"),
])
def test_files_of_another_shape(tmp_path, name, data, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, name, data)


@pytest.mark.parametrize("row, message", [
    ({**ROW, "response": "no block"}, "'response': the think block is absent"),
    ({**ROW, "response": "<think>\nx"}, "'response': the think block is unclosed"),
    ({**ROW, "response": None}, "'response': the think block is absent"),
    ({**ROW, "category": ["Arson"]}, "'category': unknown category 'arson'"),
    ({**ROW, "category": "['Arson']"}, "'category': unknown category 'arson'"),
    ({**ROW, "category": [3]}, "'category' must be a string, found int"),
    ({**ROW, "category": {}}, "'category' must be a string, found dict"),
    ({**ROW, "id": True}, "'id' must be a string, found bool"),
    ({**TASK, "output": float("nan")}, "'output' must be a string, found float"),
    ({**TASK, "output": ["t", "u"]}, "'output' must be a string, found list"),
    ({**TASK, "input": "half \ud83d"}, "'input' has half of a surrogate pair"),
    ({**OWN, "prompt": "half \ude00"}, "'prompt' has half of a surrogate pair"),
    ({**OWN, "response": 3}, "'response' must be a string, found int"),
    ({"instruction": "x", "id": "1", "instances": []}, "'instances' must be a list of objects"),
    ({"instruction": "x", "id": "1", "instances": [{"output": 3}]}, "'output' must be a string"),
    ({"goal": "a", "target": {}}, "'target' must be a string, found dict"),
    ({"prompt": "p", "type": "t", "label": "maybe"}, "'label' is 'maybe'; expected safe, unsafe,"),
    ({"prompt": "p", "data_type": "Vanilla"}, "'data_type' is 'Vanilla'; expected .*vanilla"),
    ({"adversarial": "p", "data_type": None}, "'data_type' is ''; expected .*vanilla_harmful"),
])
def test_errors_name_file_row_and_field(tmp_path, row, message):
    """When the file is read, whatever the format, and also in a row that is not the first."""
    for name, data, place in (("x.json", [row], "x.json: row 0"), ("x.jsonl", row, "x.jsonl:1")):
        with pytest.raises(UserError, match=f"{place}: field {message}") as error:
            read(tmp_path, name, data)
        assert str(error.value).count(place) == 1


# ------------------------------------------------------------------------------- several files
def test_row_numbers_of_two_files_are_no_common_request(tmp_path):
    first, second = (read(tmp_path, name, f"goal,target\n{goal},Sure\nsame,Sure\n")
                     for name, goal in (("a.csv", "one"), ("b.csv", "two")))
    assert first[0].id == second[0].id and first[0].group != second[0].group
    assert first[1].group == second[1].group == digest("same")


@pytest.mark.parametrize("paths, ids", [
    (["a/test.jsonl"], ["test/7"]), (["a/dev.jsonl", "a/test.jsonl"], ["dev/7", "test/7"]),
    (["a/test.jsonl", "b/test.jsonl", "a/dev.jsonl"], ["a/test/7", "b/test/7", "dev/7"]),
    (["test.jsonl", "x/a/test.jsonl", "y/a/test.jsonl"], ["w/test/7", "x/a/test/7", "y/a/test/7"]),
    (["a/test.jsonl", "a/test.json"], ["test.jsonl/7", "test.json/7"]),
    (["a/test.jsonl", "", "./b/../b/test.jsonl"], ["a/test/7", "b/test/7"]),
])
def test_files_are_told_apart_by_the_ends_of_their_paths(tmp_path, monkeypatch, paths, ids):
    (tmp_path / "w").mkdir()
    monkeypatch.chdir(tmp_path / "w")
    for path in filter(None, paths):
        write_jsonl(path, [Record("7", "p", "harmful", group="g")])
    found = read_named(*paths)
    assert [len(records) for records in found] == [int(path != "") for path in paths]
    assert [(r.id, r.group) for records in found for r in records] == [(i, "g") for i in ids]


def test_one_file_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("test.jsonl", [Record("7", "p", "harmful")])
    for second in ("test.jsonl", "./test.jsonl", str(tmp_path / "test.jsonl")):
        with pytest.raises(UserError, match="test.jsonl: this file is given twice"):
            read_named("test.jsonl", second)

"""Bad input at the command line: one line that says what is wrong, exit status 2, and every file
that was there is as it was. (The functions' own errors are in their test files; tests/fuzz.py makes
inputs that nobody thought of.)
"""

import functools
import gzip
import hashlib
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import evaluate
import train
from ease import run
from ease.lora import add_lora, save_adapter
from ease.records import UserError
from ease.run import command_line
from tests.tiny import VOCAB, tiny_folder

CODE = functools.cache(run.code_of)  # it takes most of a second
SCRIPTS = {"distill": distill, "evaluate": evaluate, "train": train}
GOOD = '{"id": "1", "prompt": "say hi", "kind": "benign"}\n'
KINDS = {"d": "adversarial_harmful", "r": "harmful", "g": "benign"}
EVALUATE = "evaluate --systems base=base --prompts p.jsonl --max_new_tokens 4 --out out"
ADAPTED = EVALUATE.replace("base=base", "base=base+adapter")
DISTILL = ("distill --model base --teacher base --prompts p.jsonl --judge target --attempts 1 "
           "--max_new_tokens 4 --out out")
TRACES = "distill --model base --traces t.jsonl --kl_weight 0 --steps 2 --batch_size 2 --out out"
TRAIN = ("train --model base --teacher base --diagnostic d.jsonl --refusals r.jsonl --general "
         "g.jsonl --judge target --probe_tokens 4 --max_new_tokens 4 --attempts 1 --out out")
TASKS = "evaluate --systems base=base --tasks gsm8k=p.jsonl --out out"
QUESTION = {"question": "1+1?", "answer": "#### 2"}
CONFIG, SETTINGS, ADAPTER = ("base/config.json", "base/tokenizer_config.json",
                             "adapter/adapter_config.json")


def rows(*changes: dict) -> str:
    """Records, each with these fields changed."""
    return "".join(json.dumps(json.loads(GOOD) | {"id": str(i)} | c) + "\n"
                   for i, c in enumerate(changes))


def tensors(file: str, **changes):
    """A change of a safetensors file: of named tensors, None to leave one out."""
    def change(world):
        found = load_file(world / file)
        for name, value in changes.items():
            name = name.replace("__", ".")
            found[name] = value
        save_file({k: v for k, v in found.items() if v is not None}, world / file)
    return change


def link_shards(world):
    """A sharded model without its second shard."""
    (world / "base/model.safetensors").rename(world / "base/a.safetensors")
    (world / "base/model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}}))


def pickled(world):
    (world / "base/model.safetensors").rename(world / "base/pytorch_model.bin")


def other_ids(world):
    """A teacher of as many tokens, two of them swapped."""
    file = world / "other/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["\u0120the"], vocab["\u0120car"] = vocab["\u0120car"], vocab["\u0120the"]
    file.write_text(json.dumps(tokenizer))


def empty_rank(world):
    """A rank of 10^9 that holds no number."""
    names = load_file(world / "adapter/adapter_model.safetensors")
    header = {n: {"dtype": "F32", "shape": [10**9, 0], "data_offsets": [0, 0]} for n in names}
    text = json.dumps(header).encode()
    (world / "adapter/adapter_model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text)
    file = world / ADAPTER
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 10**9}))


# (command, {file: text, bytes, JSON fields that change, None: not there} or a function, message)
RECORDS = [
    (rows({}, {"prompt": None}), "p.jsonl:2: field 'prompt' is missing or empty"),
    ('{"id": "1", "kind": "benign"}\n', "p.jsonl:1: unknown columns id, kind; accepted: id, "),
    (rows({}, {"colour": "red"}), "p.jsonl:2: unknown field 'colour'"),
    (rows({}, {"response": 3}), "p.jsonl:2: field 'response' must be a string, found int"),
    (rows({"kind": "bad"}), "p.jsonl:1: field 'kind' is 'bad'; expected adversarial_harmful"),
    ("", "p.jsonl: no rows (the file is empty)"), ("\n \n", "p.jsonl: no rows"),
    (GOOD + GOOD, "p.jsonl:2: id '1' was already used at p.jsonl:1"),
    (b'{"id": "\xff"}\n', "p.jsonl: not UTF-8 text (byte 8)"),
    (GOOD + '{"id": "2", "pro', "p.jsonl:2: not JSON"), ("[" * 10**5, "p.jsonl:1: not JSON"),
    (GOOD + "[1]\n", "p.jsonl:2: expected a JSON object, found list"),
    # the kinds of public bug reports
    ('[{"instruction": "Say hi", "output": NaN}]', "row 0: field 'output' must be a string, found"),
    ('[{"instruction": "Say hi", "output": ["a"]}]', "row 0: field 'output' must be a string"),
    ('[{"instruction": "Say \\ud83d", "output": "a"}]', "row 0: field 'instruction' has half of a"),
    ('{"jailbreaks": [{"index": 0}], "parameters": null}', "p.jsonl: row 0: unknown columns index"),
    ('{"id": "1", "a\\nb": 1}', "p.jsonl:1: unknown columns id, a b; accepted"),
    (b"PAR1\x15\x04", "p.jsonl: this is Parquet; what is read: CSV"),
    (gzip.compress(GOOD.encode() * 9)[:-9], "p.jsonl: damaged gzip file"),
    (b"version https://git-lfs.github.com/spec/v1\n", "p.jsonl: this is a git-lfs pointer"),
]
MODELS = [
    ({CONFIG: None}, "base: no model here (config.json is missing)"),
    ({CONFIG: "[]"}, "base/config.json: must be a JSON object, is a list"),
    ({CONFIG: {"model_type": "gpt2"}}, "base/config.json: model_type 'gpt2' is not supported"),
    ({CONFIG: {"rope_scaling": {"type": "yarn"}}}, "rope_type 'yarn' is not supported; supported"),
    ({CONFIG: {"hidden_size": None}}, "base/config.json: hidden_size None is not supported"),
    ({CONFIG: {"num_hidden_layers": 10**9}}, "num_hidden_layers 1000000000, 2 are stored"),
    ({CONFIG: {"intermediate_size": 10**12}}, "the model needs (1000000000000, 30)"),
    ({"base/added_tokens.json": json.dumps({"<extra>": VOCAB})}, "not made for each other"),
    ({"base/tokenizer.json": None}, "base/tokenizer.json: No such file or directory"),
    ({"base/tokenizer.json": "{}"}, "base/tokenizer.json: "),
    ({"base/tokenizer.json": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A"}}},
     "base/tokenizer.json: "),  # the library panics
    ({SETTINGS: {"chat_template": None}}, "base: no chat template (chat_template.jinja, or"),
    ({SETTINGS: {"chat_template": "{{ raise_exception('roles\nmust') }}"}}, "roles\\nmust"),
    ({SETTINGS: {"chat_template": "{% if %}"}}, "base: the chat template is not valid"),
    ({SETTINGS: {"chat_template": "{{ 'x' * 10000000000 }}"}}, "the chat template"),
    ({SETTINGS: {"eos_token": "nope"}}, "base: 'eos_token' 'nope' is no token"),
    ({SETTINGS: {"bos_token": "\ud800"}}, "base: bos_token cannot be"),
    ({SETTINGS: {"added_tokens_decoder": {"9" * 5000: "x"}}}, "the id of an added token cannot be"),
    ({"base/model.safetensors": None}, "base: model.safetensors is missing (found no weights)"),
    (pickled, "base: model.safetensors is missing (found pytorch_model.bin); pickles are refused"),
    (link_shards, "base: b.safetensors is missing (found a.safetensors, model.safetensors.index"),
    ({"base/model.safetensors": b"junk"}, "base/model.safetensors: "),
    ({"base/model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
    (tensors("base/model.safetensors", model__norm__weight=None), "missing ['model.norm.weight']"),
    (tensors("base/model.safetensors", extra=torch.zeros(1)), "unexpected ['extra']"),
    (tensors("base/model.safetensors", model__norm__weight=torch.ones(29)), "has shape (29,)"),
    (tensors("base/model.safetensors", model__norm__weight=torch.ones(30, dtype=torch.int8)),
     "quantised weights are not supported: model.norm.weight is I8"),
]
ADAPTERS = [
    ({ADAPTER: None}, "adapter/adapter_config.json: no such file"),
    *(({ADAPTER: {name: value}}, f"adapter setting '{name}' = ") for name, value in (
        ("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "all"), ("r", None),
        ("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 4}), ("peft_type", "IA3"),
        ("layer_replication", [[0, 2]]), ("target_modules", None), ("made_up", 1))),
    ({ADAPTER: {"r": 4}}, "adapter: r = 4 in adapter_config.json is not that of the weights"),
    ({ADAPTER: {"target_modules": "(q_proj"}}, "the regular expression '(q_proj'"),
    ({ADAPTER: {"target_modules": ["nope"]}}, "LoRA targets ['nope'] match no linear layer"),
    (empty_rank, "adapter: r = 1000000000 in adapter_config.json is not that of the weights"),
    ({"adapter/adapter_model.safetensors": None}, "adapter_model.safetensors: No such file"),
    (tensors("adapter/adapter_model.safetensors", extra=torch.ones(1)), "(made for another base?)"),
]
OTHERS = [
    (EVALUATE + " --colour red", {}, "unrecognized arguments: --colour red"),
    (EVALUATE + " --top_p 2", {}, "argument --top_p: must be from"),
    (EVALUATE.replace("p.jsonl", "p.csv"), {"p.csv": 'goal,target\nhi,a\n"bye,b\nmore,c\n'},
     "p.csv:3: a quote is not closed"),
    (EVALUATE.replace("p.jsonl", "p.csv"), {"p.csv": "goal,target\nhi\n"},
     "p.csv:2: 1 fields, the header has 2"),
    (EVALUATE.replace("p.jsonl", "p.jsonl p.jsonl"), {}, "p.jsonl: this file is given twice"),
    (EVALUATE.replace("p.jsonl", "nowhere"), {}, "nowhere: No such file or directory"),
    (EVALUATE.replace("base=base", "base=nowhere"), {}, "nowhere: no model here"),
    (ADAPTED.replace("base=base", "base=other"), {}, "(made for another base?)"),
    (TASKS, {"p.jsonl": ""}, "p.jsonl: no rows"),
    (TASKS, {"p.jsonl": json.dumps(QUESTION) + "\n"}, "p.jsonl: 5 examples are needed, it has 1"),
    (TASKS, {"p.jsonl": json.dumps(QUESTION | {"question": "\ud800"})}, "p.jsonl:1: gsm8k needs"),
    (TASKS, {"p.jsonl": json.dumps(QUESTION | {"answer": ["#### "]})}, "p.jsonl:1: gsm8k needs"),
    (DISTILL + " --policies q.json", {"q.json": "[]"}, "q.json: a policy file is a JSON object"),
    (DISTILL, {}, "no trace of teacher base was accepted"),
    (DISTILL.replace("--teacher base --prompts p.jsonl", "--teacher other --traces t.jsonl"),
     other_ids, "the tokenizers of --model and"),
    (TRACES + " --max_length 3", {}, "rows are longer than --max_length 3"),
    (TRACES + " --lr 1e30", {}, "the loss is nan, its gradient's norm nan at step 1, rows t/"),
    (TRAIN, {}, "the vulnerable region is empty"),
    (TRAIN, {"d.jsonl": GOOD}, "row 'd/1' is benign: D_diag is adversarial"),
]
TABLE = [(EVALUATE, {"p.jsonl": content}, message) for content, message in RECORDS] + [
    (EVALUATE, change, message) for change, message in MODELS] + [
    (ADAPTED, change, message) for change, message in ADAPTERS] + OTHERS


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything valid."""
    world = tmp_path_factory.mktemp("bad")
    model = tiny_folder(world / "base")
    tiny_folder(world / "other", intermediate_size=52)
    add_lora(model, 2, 4.0, ["q_proj", "up_proj"])
    save_adapter(model, world / "adapter", "base")
    (world / "p.jsonl").write_text(GOOD)
    (world / "t.jsonl").write_text(rows({"reasoning": "fine.", "response": "hi."}, {
        "reasoning": "so.", "response": "paint the car."}))
    for name, kind in KINDS.items():
        (world / f"{name}.jsonl").write_text(rows({
            "kind": kind, "prompt": f"do {name}", "response": "no.", "target": "never said",
            "categories": ["Self-Harm"] if name != "g" else []}))
    return world


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    """A copy of it, where commands are typed."""
    shutil.copytree(made, tmp_path / "w")
    monkeypatch.setattr(run, "code_of", CODE)
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def apply(change, world) -> None:
    """Make the one mistake."""
    if callable(change):
        return change(world)
    for name, content in change.items():
        file = world / name
        if content is None:
            file.unlink()
        elif isinstance(content, dict):
            file.write_text(json.dumps(json.loads(file.read_text()) | content))
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())


def snapshot(world) -> dict:
    """{path: (size, digest)} of every file."""
    return {p: (p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest())
            for p in world.parent.rglob("*") if p.is_file()}


def fails(command: str, world, monkeypatch, capsys) -> str:
    """What the command says on stderr; it must be all that a mistake may do."""
    script, *flags = command.split()
    before = snapshot(world)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *flags])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        command_line(SCRIPTS[script].main, SCRIPTS[script].Config)
    error = capsys.readouterr().err
    assert e.value.code == 2, error
    after = snapshot(world)
    assert {p: after.get(p) for p in before} == before, "an existing file changed"
    assert all((world / "out") in p.parents for p in after.keys() - before), "written elsewhere"
    said = [line for line in error.splitlines() if "error: " in line]
    assert len(said) == 1 and "Traceback" not in error, error
    # beside it argparse says the usage, and a bar its progress
    assert error.rstrip().endswith(said[0]) and error.endswith("\n"), error
    return said[0]


@pytest.mark.parametrize("command, change, message", TABLE, ids=[
    f"{i}-{message[:40]}" for i, (_, _, message) in enumerate(TABLE)])
def test_a_mistake_is_one_line(world, monkeypatch, capsys, command, change, message):
    apply(change, world)
    assert message in fails(command, world, monkeypatch, capsys)


def test_valid_input_passes(world, monkeypatch):
    """Without the one mistake the same commands run: the table tests what it says."""
    for command in (ADAPTED, TRACES):
        script, *flags = command.replace("--out out", f"--out out/{command[:4]}").split()
        monkeypatch.setattr("sys.argv", [f"{script}.py", *flags])
        command_line(SCRIPTS[script].main, SCRIPTS[script].Config)
        assert (world / "out" / command[:4] / "done").exists()


@pytest.mark.parametrize("error, message", [
    (OSError(28, "No space left on device", "f"), "No space left on device: 'f'"),
    (torch.cuda.OutOfMemoryError(), "lower --batch_tokens (training) or --slots (generation)")])
def test_a_full_disk_and_a_full_gpu(world, monkeypatch, capsys, error, message):
    """In the middle of a run: what it had written stays."""
    (world / "out").mkdir()
    (world / "out/notes.txt").write_text("mine")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(evaluate, "write_jsonl", fail)
    assert message in fails(EVALUATE, world, monkeypatch, capsys)
    monkeypatch.undo()


def test_the_table_can_fail(world, monkeypatch, capsys):
    """A script that changes a file, says two lines or writes elsewhere is noticed."""
    def script(act, text="x"):
        def main(cfg):
            act()
            raise UserError(text)
        return main

    for act, wrong in ((lambda: (world / "p.jsonl").write_text("new"), "an existing file"),
                       (lambda: (world / "g.jsonl").unlink(), "an existing file"),
                       (lambda: (world / "else").write_text("new"), "written elsewhere"),
                       (lambda: print("error: two", file=sys.stderr), "error: two")):
        monkeypatch.setattr(evaluate, "main", script(act))
        with pytest.raises(AssertionError, match=wrong):
            fails(EVALUATE, world, monkeypatch, capsys)
    monkeypatch.setattr(evaluate, "main", script(lambda: None, "one\ntwo\u2028three"))
    assert fails(EVALUATE, world, monkeypatch, capsys) == "error: one two three"

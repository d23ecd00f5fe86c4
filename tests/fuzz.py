"""python -m tests.fuzz [--inputs 10000] [--seed 0] [--first 0] [--out runs/fuzz]: broken inputs.

Seeded mutations of small valid files of every sort that the scripts read, each read as the scripts
read it. What may come of it: success, or an error that a script prints as one line. A traceback, a
hang, more than 500 MB, and a file written elsewhere are failures: printed, and the input is kept in
--out. An input depends on (seed, its number) alone. Reading goes on in another process, so that a
crash of a library is a failure like the others. Linux only.
"""

import argparse
import copy
import csv
import faulthandler
import functools
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from safetensors import SafetensorError

from ease.generate import Sampling
from ease.loading import load_model, load_tokenizer
from ease.lora import add_lora, save_adapter
from ease.outputs import read_outputs
from ease.policies import POLICY, load_policy, parse_categories, teacher_messages
from ease.readers import FORMATS, read_named
from ease.records import (
    Record,
    Response,
    UserError,
    read_responses,
    record_to_dict,
    response_to_dict,
)
from ease.respond import respond
from ease.tasks import encode_item, read_items
from tests.tiny import TOKENIZER, VOCAB, tiny_folder, tiny_model

SECONDS, BYTES = 10, 500 * 2**20  # of computing; a template is tried seven times
COMMAND = [sys.executable, "-m", "tests.fuzz"]
GUARD = 4 * 2**30  # more than this cannot be had: the machine is shared
THINKING = "<think>\nIt is fine.\n</think>\n\nYes."
VALUES = {"kind": "benign", "data_type": "adversarial_benign", "label": "safe",
          "response": THINKING, "categories": ["Self-Harm"],
          "instances": [{"input": "i", "output": "o"}]}
QUESTIONS = {
    "hellaswag": {"ind": 1, "activity_label": "Riding", "ctx_a": "He sits.", "ctx_b": "then he",
                  "endings": ["rides.", "sings [loud].", "eats.", "sleeps."], "label": "0"},
    "gsm8k": {"question": "1+1?", "answer": "It is 2.\n#### 2"}}
DEEP = "in so many brackets: "  # a text that stands for them, until JSON is written
TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


class Hang(BaseException):
    """No Exception: nothing may catch it but the fuzzer."""


# ---------------------------------------------------------------------------------- valid inputs
def table(rows: list[dict]) -> bytes:
    """As CSV; lists as Python writes them."""
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def lines(rows: list[dict]) -> bytes:
    """As JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def record_files() -> dict[str, bytes]:
    """Every format of readers.py as a table, JSON Lines, an array."""
    files = {}
    for i, columns in enumerate(FORMATS):
        names = {"prompt kind": "id prompt kind response categories group"}.get(columns, columns)
        rows = [{name: VALUES.get(name, f"{name} {k}") for name in names.split()} for k in range(3)]
        for row in rows if "category" in names.split() else ():
            row["category"] = "safety" if "dataset" in names else "Self-Harm"
        files[f"r{i}.jsonl"], files[f"r{i}.json"] = lines(rows), json.dumps(rows).encode()
        if "instances" not in names and columns != "prompt kind":
            files[f"r{i}.csv"] = table(rows)
    artifact = {"parameters": {"method": "GCG"}, "jailbreaks": json.loads(files["r9.json"])}
    return files | {"artifact.json": json.dumps(artifact).encode(),
                    "packed.jsonl.gz": gzip.compress(files["r0.jsonl"], mtime=0),
                    "utf16.csv": files["r3.csv"].decode().encode("utf-16")}


def make_world(path: Path) -> None:
    """A model, an adapter for it, and text files, all valid."""
    tiny_folder(path / "model", vocab_size=VOCAB + 9)
    model = tiny_model(vocab_size=VOCAB + 9)
    add_lora(model, 2, 4.0, ["q_proj", "up_proj"])
    save_adapter(model, path / "adapter", str(path / "model"))
    (path / "model/special_tokens_map.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    (path / "model/added_tokens.json").write_text(f'{{"<extra>": {VOCAB}}}')
    (path / "out").mkdir()


def text_files() -> dict[str, tuple[bytes, ...]]:
    """The other text files, by kind."""
    record = Record("1", "hi", "benign")
    row = response_to_dict(Response(record, "yes", "", "yes", "absent", True, False, 0.5,
                                    {"total": 1, "answer": 1, "reasoning": 0}, 0.1,
                                    {"gcg": "safe"}))
    said = {"message": {"content": "Yes.", "reasoning_content": "So."}, "finish_reason": "stop"}
    batch = {"custom_id": "1", "error": None, "response": {"status_code": 200, "body": {
        "choices": [said]}}}
    question = "q,a,b,c,d,A\n" * 7
    return {
        "rows": (lines([row, {**row, "id": "2"}]),),
        "outputs": (lines([{"id": "1", "prompt": "hi", "response": "Yes."}]), lines([batch])),
        "policy": (json.dumps({"instruction": POLICY.instruction, "policies": POLICY.texts}
                              ).encode(),),
        "hellaswag": (lines([QUESTIONS["hellaswag"]] * 3),),
        "gsm8k": (lines([QUESTIONS["gsm8k"]] * 7), table([QUESTIONS["gsm8k"]] * 7)),
        "mmlu": (question.encode(),
                 b"question,choice0,choice1,choice2,choice3,answer\n" + question.encode())}


# ------------------------------------------------------------------------------------- mutations
def strange(rng: random.Random):
    """A value that should not be there."""
    return rng.choice([
        lambda: rng.choice([None, True, False, [], {}, [[]], [None], [{}], {"": None}]),
        lambda: rng.choice([0, -1, 1, 2, 3, 7, 2**31, 2**32, 2**53, 2**63, 2**64, 10**14, 10**400]),
        lambda: rng.choice([0.0, -0.5, 0.5, 1e-300, 1e300, float("nan"), float("inf")]),
        lambda: rng.choice(["", " ", "\n", "a\nb", "\u2028", "\0", "\ud800", "\ud800", "x\udcff",
                            "\x1b[2J", "\ue000", "<|end|>", "<think>", "</think>", "\U0001f600",
                            "1", "0", "-1", "9" * 5000, "\u0663", "x" * 200_000, "[" * 20_000]),
        lambda: rng.choice(["../../../escape", "/etc/passwd", "/tmp/escape", "~", "..", "a/b", "C:",
                            "adapter_model.safetensors", "https://example.org/x"]),
        lambda: rng.choice(["benign", "harmful", "all-linear", "LORA", "default", "linear",
                            "llama3", "qwen3", "full_attention", "(a+)+$", "(x*)*y", "[",
                            "silu", "F16"]),
        lambda: [strange(rng) for _ in range(rng.randrange(4))],
        lambda: {str(strange(rng))[:9]: strange(rng) for _ in range(rng.randrange(3))},
        lambda: f"{DEEP}{rng.choice([50, *range(900, 1000, 9), 5000])}"])()


def nodes(value, found: list | None = None) -> list[tuple]:
    """(container, key) of everything in a JSON value."""
    found = [] if found is None else found
    for key in (value if isinstance(value, dict) else range(len(value))):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            nodes(value[key], found)
    return found


def change_json(value, rng: random.Random):
    """One to three changes of values, names and numbers of things."""
    box = [copy.deepcopy(value)]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        all_nodes = nodes(box)
        at, key = rng.choice(all_nodes[:40] if rng.random() < 0.5 else all_nodes)
        other, other_key = rng.choice(all_nodes)
        how = rng.randrange(8)
        if how == 0 and at is not box:
            del at[key]
        elif how == 1 and isinstance(at, dict):
            at[rng.choice([str(strange(rng))[:9999], key + "_", key.upper()])] = at.pop(key)
        elif how == 2:
            at[key] = [at[key]]
        elif how == 3:
            at[key] = copy.deepcopy(other[other_key])
        elif how == 4 and isinstance(at[key], list):
            at[key] += at[key] * 2
        elif how == 5 and isinstance(at[key], int | float):
            at[key] = rng.choice([-at[key], at[key] * 2, at[key] + 1, str(at[key]), at[key] // 3])
        else:
            at[key] = strange(rng)
        text = other.get(other_key) if isinstance(other, dict) else None
        if isinstance(text, str) and rng.random() < 0.1:
            other[other_key] = text + "\ud800"
    return box[0]


def write_json(value, rng: random.Random) -> str:
    """JSON text; now and then a key stands in it twice, or its numbers are too long."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8, indent=rng.choice([None, 1]))
    for depth in re.findall(rf'"{DEEP}(\d+)"(?!:)', text):
        text = text.replace(f'"{DEEP}{depth}"', "[" * int(depth) + "]" * int(depth))
    keys = re.findall(r'"\w+": ', text)
    if keys and rng.random() < 0.1:
        text = text.replace("{", "{" + rng.choice(keys) + rng.choice(["1, ", "[], ", '"x", ']), 1)
    return re.sub(r"\d+", "9" * 5000, text, count=1) if rng.random() < 0.02 else text


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, repeats, insertions, packing."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        how = rng.randrange(9)
        if how < 2:
            for _ in range(rng.choice([1, 4, 40])):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
        elif how == 2:
            del data[at:]
        elif how == 3:
            del data[at : min(end, at + 30)]
        elif how == 4:
            data[at:at] = data[at:end] * rng.choice([1, 2, 20])
        elif how == 5:
            data[at:at] = rng.choice([b"\0", b'"', b",", b"\n", b"\r", b"{", b"}", b"[", b"\\",
                                      b"]", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"NaN",
                                      b"1e999", b"\\ud800", b"\xe2\x80\xa8", b"\x1b[31m",
                                      b"{% for"])
        elif how == 6:
            data[:0] = rng.choice([b"PAR1", b"\x1f\x8b", b"BZh9", b"\xff\xfe", b"\xfe\xff",
                                   b"PK\3\4", b"version https://git-lfs", b"\xef\xbb\xbf", b"[",
                                   b"{"])
        elif how == 7:
            data = bytearray(gzip.compress(bytes(data), mtime=0))
        else:
            data[at:at] = rng.choice([b"[" * 99_999, b"x" * 99_999, b"\n" * 999, b",,,,", b'""""'])
    return bytes(data)


def change_text(data: bytes, rng: random.Random) -> bytes:
    """A file of JSON, of JSON Lines or of neither: its values change, or its bytes."""
    if rng.random() < 0.3:
        return change_bytes(data, rng)
    try:
        value = json.loads(data)
    except ValueError:
        try:
            value = list(map(json.loads, data.splitlines()))
        except ValueError:
            return change_bytes(data, rng)
        changed = change_json(value, rng)
        changed = changed if isinstance(changed, list) else [changed]
        texts = [write_json(v, rng).replace("\n", " ") for v in changed]
        return "\n".join(texts).encode(errors="surrogatepass")
    return write_json(change_json(value, rng), rng).encode(errors="surrogatepass")


def change_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file: the header's fields, its length, the bytes; or tensors that are in
    themselves in order, of other names, shapes and types.
    """
    size = struct.unpack("<Q", data[:8])[0]
    header, body, how = json.loads(data[8 : 8 + size]), data[8 + size :], rng.random()
    if how < 0.15:
        return change_bytes(data, rng)
    names = [n for n in header if n != "__metadata__"]
    if how < 0.5:
        value = change_json(header, rng)
        for _ in range(rng.randrange(3)):
            entry = value.get(rng.choice(names)) if isinstance(value, dict) else None
            if isinstance(entry, dict):
                entry[rng.choice(["shape", "data_offsets"])] = [
                    rng.choice([0, 1, 2, -1, 2**31, 2**40, 2**63, 2**64]) for _ in range(2)]
    else:  # consistent
        value, parts, at = {}, [], 0
        for name in names:
            entry, part = dict(header[name]), body[slice(*header[name]["data_offsets"])]
            rank = entry["shape"]
            change = rng.randrange(10) if rng.random() < 0.2 else 99
            if change == 0:
                continue
            elif change == 1:
                entry["dtype"], entry["shape"] = "F16", [rank[0], *rank[1:-1], rank[-1] * 2]
            elif change == 2:
                entry["dtype"] = rng.choice(["I32", "U32"])
            elif change == 3:
                entry["dtype"], entry["shape"] = "F8_E4M3", [*rank[:-1], rank[-1] * 4]
            elif change == 4:
                entry["shape"] = rank[::-1]
            elif change == 5:
                entry["shape"], part = rng.choice(
                    [[0], [0, 30], [10**9, 0], [2**40, 0], [2, 0]]), b""
            elif change == 6:
                entry["shape"], part = [], part[:4]
            elif change == 7:
                name += rng.choice(["x", ".weight", "\n", ".inv_freq"])
            elif change == 8:
                part = struct.pack("<f", rng.choice([float("nan"), float("inf"), 1e38])
                                   ) * (len(part) // 4)
            elif change == 9:
                name = re.sub(r"\d", rng.choice(["7", "", "x", "99999999999"]), name)
            entry["data_offsets"] = [at, at := at + len(part)]
            value[name] = entry
            parts.append(part)
        body = b"".join(parts)
    text = write_json(value, rng).encode(errors="replace")
    length = len(text) if rng.random() < 0.9 else rng.choice([0, 1, 2**31, 2**63, len(text) + 9])
    return struct.pack("<Q", length) + text + body


EXPRESSIONS = [
    "messages", "messages[0].content", "messages[9]", "messages[0]['role']", "loop",
    "nothing.at.all", "range(999999999)|list", "range(99999)|list", "'x' * 9999999999",
    "'x' * 2000000000", "10**10**10",
    "[0] * 999999999", "'x'|center(9999999999)", "'x'|center(999999999)", "'%1000000000d' % 1",
    "9**9**9 % 7",
    "'{:1000000000}'.format(1)", "''.__class__.__mro__", "messages.__class__", "self",
    "x|indent(999999999)",
    "cycler.__init__.__globals__", "raise_exception('one\\ntwo')", "strftime_now('%Y' * 999999)",
    "1 // 0", "messages|tojson", "messages.append(1)", "lipsum(n=999999)",
    "dict(a=1)|tojson(indent=999999999)",
    "'\\ud800'", "'\\x00'", "'<think>'", "'\ue000'", "messages|map(attribute='content')|join",
    "namespace(a=1)", "bos_token", "eos_token * 3", "x ~ x", "x", "[x, x]",
    "x|replace('a', 'aaaa')",
    "(messages|string) * 1000", "range(99999)|random", "tools", "'a' < 1", "-messages", "not x",
    "joiner()", "messages|groupby('role')", "('a' * 30)|wordwrap(1)", "x[10000000000000000]",
    "x[::-1]"]


def template(rng: random.Random, depth: int = 0) -> str:
    """A chat template of things that none should have."""
    if depth == 0 and rng.random() < 0.3:
        return change_bytes(TEMPLATE.encode(), rng).decode(errors="replace")
    expression, inner = rng.choice(EXPRESSIONS), functools.partial(template, rng, depth + 1)
    if depth > 3 or rng.random() < 0.35:
        return rng.choice([f"{{{{ {expression} }}}}", f"{{% set x = {expression} %}}", "text\n",
                           TEMPLATE])
    return rng.choice([
        lambda: f"{{% for i in {rng.choice(['messages', 'range(99999)', expression])} %}}{inner()}"
                "{% endfor %}" + inner(),
        lambda: f"{{% if {expression} %}}{inner()}{{% else %}}{inner()}{{% endif %}}",
        lambda: "{% macro f(x) %}" + inner() + "{{ f(x) }}{% endmacro %}{{ f(1) }}",
        lambda: "{% for i in messages recursive %}{{ loop(messages) }}{% endfor %}",
        lambda: "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}"
                "{% endfor %}",
        lambda: rng.choice(["{% include 'x' %}", "{% extends '/etc/passwd' %}",
                            "{% import 'os' as o %}", "{% block a %}{{ self.a() }}{% endblock %}",
                            "{% raw %}", "{#", "{{", "{%", "{% call f() %}{% endcall %}",
                            "{% generation %}x{% endgeneration %}",
                            "{% filter upper %}x{% endfilter %}", "{% break %}", "(" * 9999]),
        lambda: "{{ " + rng.choice(["(", "[", "not ", "-", "a if ", "f("]) * rng.choice([60, 3000])
                + " }}",
        lambda: "{% if x %}" * rng.choice([30, 300]) + "{% endif %}" * 30,
        lambda: inner() + inner(), lambda: inner() + TEMPLATE])()


# --------------------------------------------------------------------- reading as the scripts do
def read_record_file(world: Path, file: Path) -> None:
    for record in read_named(str(file))[0]:
        json.dumps(record_to_dict(record), ensure_ascii=False).encode()


def read_row_file(world: Path, file: Path) -> None:
    read_responses(file)


def read_output_file(world: Path, file: Path) -> None:
    for response in read_outputs(str(file), [Record("1", "hi", "benign")], TOKENIZER):
        json.dumps(response_to_dict(response), ensure_ascii=False).encode()


def read_policy_file(world: Path, file: Path) -> None:
    policy = load_policy(file)
    parse_categories("Self-Harm, benign", POLICY)
    TOKENIZER.encode_prompt(teacher_messages("hi", tuple(policy.texts), policy))


def read_task_file(world: Path, file: Path) -> None:
    task = file.stem
    for item in read_items(task, [(str(file), str(file) if task != "hellaswag" else "")]):
        assert type(item.gold) in (int, str), "a right answer that is neither text nor index"
        for raw in (True, False):
            encode_item(TOKENIZER, item, raw)


def read_model(world: Path, file: Path) -> None:
    """Also asks it something; the adapter with it where that has been changed."""
    adapter = str(file.parent) if file.parent.name == "adapter" else ""
    model = load_model(str(world / "model"), adapter)
    tokenizer = load_tokenizer(str(world / "model"))
    respond(model, tokenizer, [Record("1", "say <|end|> hi", "benign")], Sampling(2), 1)


def read_tokenizer(world: Path, file: Path) -> None:
    tokenizer = load_tokenizer(str(world / "model"))
    for text in ("", "hi, say <|end|> and <extra> \U0001f600\0 x", "a" * 999):
        tokenizer.decode(tokenizer.user_prompt(text))
    tokenizer.encode_prompt([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    tokenizer.encode(THINKING)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "generation_config.json")
KINDS = {  # how often, how it is read
    "records": (30, read_record_file), "rows": (4, read_row_file), "outputs": (6, read_output_file),
    "policy": (4, read_policy_file), "tasks": (8, read_task_file), "config": (10, read_model),
    "weights": (10, read_model), "adapter": (10, read_model), "tokenizer": (14, read_tokenizer),
    "template": (12, read_tokenizer)}


def make_input(kind: str, rng: random.Random, world: Path) -> dict[Path, bytes]:
    """{file: its new content}; the first file is the one that is read."""
    texts, model = text_files(), world / "model"
    if kind == "records":
        files = record_files()
        name = rng.choice(sorted(files))
        return {world / name: change_text(files[name], rng)}
    if kind == "tasks":
        task = rng.choice(["hellaswag", "gsm8k", "mmlu"])
        name = f"{task}.csv" if task == "mmlu" else f"{task}.jsonl"
        return {world / name: change_text(rng.choice(texts[task]), rng)}
    if kind in texts:
        return {world / f"{kind}.json": change_text(rng.choice(texts[kind]), rng)}
    if kind == "template":
        settings = json.loads((model / "tokenizer_config.json").read_text())
        settings["chat_template"] = template(rng)
        if rng.random() < 0.3:
            return {model / "chat_template.jinja":
                    settings["chat_template"].encode(errors="surrogatepass")}
        return {model / "tokenizer_config.json": json.dumps(settings).encode()}
    if kind == "adapter" and rng.random() < 0.5:
        file = world / "adapter/adapter_config.json"
    elif kind == "adapter":
        file = world / "adapter/adapter_model.safetensors"
    elif kind == "tokenizer":
        file = model / rng.choice(TOKENIZER_FILES)
    else:
        file = model / {"config": "config.json", "weights": "model.safetensors"}[kind]
    if kind == "adapter" and file.suffix != ".json" and rng.random() < 0.1:  # a rank of no numbers
        rank, value = rng.choice([10**9, 10**12]), {}
        for name in json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}"):
            value[name] = {"dtype": "F32", "shape": [rank, 0], "data_offsets": [0, 0]}
        value.pop("__metadata__", None)
        text, config = json.dumps(value).encode(), file.parent / "adapter_config.json"
        return {file: struct.pack("<Q", len(text)) + text,
                config: json.dumps(json.loads(config.read_text()) | {"r": rank}).encode()}
    change = change_tensors if file.suffix == ".safetensors" else change_text
    changed = {file: change(file.read_bytes(), rng)}
    if kind == "weights" and rng.random() < 0.2:
        shards = {"weight_map": dict.fromkeys(("a", "b"), "part.safetensors")}
        changed = {model / "model.safetensors.index.json": change_text(lines([shards]), rng),
                   model / "part.safetensors": file.read_bytes(), file: None}
    return changed


# ------------------------------------------------------------------------------------- the rules
class Guard:
    """Writes outside `allowed`, seen by Python's audit hook, which stays for ever: one for all."""

    allowed, seen, hooked, hung = None, [], False, False

    @classmethod
    def hook(cls, event: str, arguments: tuple) -> None:
        if cls.allowed is None:
            return
        paths = ()
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
            if set(arguments[1] or "") & set("wax+") or flags & writes:
                paths = arguments[:1]
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
            paths = arguments[:1]
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = arguments[:2]
        for path in map(os.fsdecode, paths):
            if path != os.devnull and not os.path.realpath(path).startswith(cls.allowed):
                cls.seen.append(f"{event} {path}")


@contextmanager
def limits(out: Path, seconds: float):
    """Within it: a time limit, a memory that can be had, and writes that are noted."""
    def stop(*_):
        Guard.hung = True
        raise Hang

    if not Guard.hooked:
        sys.addaudithook(Guard.hook)
        Guard.hooked = True
    before, old = signal.signal(signal.SIGPROF, stop), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    faulthandler.dump_traceback_later(12 * seconds, exit=True)  # waits, or a library computes
    resource.setrlimit(resource.RLIMIT_AS, (used + GUARD, old[1]))
    Guard.allowed, Guard.seen, Guard.hung = os.path.realpath(out) + os.sep, [], False
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        Guard.allowed = None
        resource.setrlimit(resource.RLIMIT_AS, old)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


def memory(name: str) -> int:
    """Bytes: VmRSS, or VmHWM, its peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def failure(read, world: Path, file: Path, seconds: float = SECONDS) -> str:
    """What is wrong with a reading; "" if nothing is."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, wrong = memory("VmRSS"), ""
    try:
        with limits(world / "out", seconds), redirect_stdout(io.StringIO()):
            read(world, file)
    except (UserError, OSError, SafetensorError) as e:
        line = " ".join(str(e).splitlines())  # as command_line prints it
        if not line.strip() or line.isspace():
            wrong = f"an error without a word: {e!r}"
    except Hang:
        wrong = f"more than {seconds} seconds\n{traceback.format_exc()}"
    except BaseException as e:  # a panic of Rust is none of Exception's
        if isinstance(e, KeyboardInterrupt):
            raise
        wrong = traceback.format_exc()
    if Guard.hung and not wrong:
        wrong = f"more than {seconds} seconds, and the hang was caught"
    if (peak := memory("VmHWM") - before) > BYTES:
        wrong += f"\n{peak / 2**20:.0f} MB"
    if Guard.seen:
        wrong += f"\nwritten outside the folder: {Guard.seen}"
    return wrong.strip()


def run(first: int, last: int, seed: int, keep: Path, kinds: dict | None = None):
    """(number, kind, failure) of every input; failures are kept in the folder `keep`."""
    torch.set_num_threads(1)
    kinds = kinds or KINDS
    with tempfile.TemporaryDirectory() as temporary:
        world = Path(temporary)
        make_world(world)
        for i in range(first, last):
            rng = random.Random(f"{seed} {i}")
            kind = rng.choices(list(kinds), [often for often, _ in kinds.values()])[0]
            changed = make_input(kind, rng, world)
            before = {p: p.read_bytes() if p.exists() else None for p in changed}
            write(changed)
            yield i, kind, None
            wrong = failure(kinds[kind][1], world, next(iter(changed)))
            if wrong:
                folder = keep / f"{seed}-{i}-{kind}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write({folder / p.name: data for p, data in changed.items() if data is not None})
                (folder / "failure.txt").write_text(wrong, errors="replace")
            write(before)
            yield i, kind, wrong


def write(files: dict[Path, bytes | None]) -> None:
    """Make the files so; None: gone."""
    for path, data in files.items():
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)


def worker(first: int, last: int, seed: int, keep: Path) -> None:
    """A line an input before it is read, and one after: JSON."""
    for found in run(first, last, seed, keep):
        print(json.dumps(found), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/fuzz", help="where inputs that fail are kept")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    start, at, last, failures = time.time(), flags.first, flags.first + flags.inputs, 0
    if flags.worker:
        worker(at, last, flags.seed, Path(flags.out))
        return 0
    while at < last:
        command = [*COMMAND, "--worker", "--first", str(at), "--inputs", str(last - at), "--seed",
                   str(flags.seed), "--out", flags.out]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              errors="replace") as process:
            kind, begun = "", at - 1
            for line in process.stdout:
                begun, kind, wrong = json.loads(line)
                if wrong:
                    failures += 1
                    print(f"input {begun} ({kind}), seed {flags.seed}: {wrong}\n", flush=True)
                at = begun + (wrong is not None)
            error = process.stderr.read()[-2000:]
        if process.returncode or at < last:  # a library took the process with it
            if not kind:
                print(error)
                return 1
            failures += 1
            print(f"input {at} ({kind}), seed {flags.seed}: the process ended with status "
                  f"{process.returncode}\n{error}\n", flush=True)
            at += 1
    print(f"{flags.inputs} inputs, {time.time() - start:.0f} seconds, {failures} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

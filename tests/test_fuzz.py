"""A few of the fuzzer's inputs, and that it notices what it is there for. All of them:
`python -m tests.fuzz`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from ease.records import UserError
from tests import fuzz


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    fuzz.make_world(path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_two_hundred_broken_inputs(tmp_path):
    found = [(kind, wrong) for _, kind, wrong in fuzz.run(0, 200, 0, tmp_path) if wrong is not None]
    assert len(found) == 200 and {kind for kind, _ in found} == set(fuzz.KINDS)
    assert not [f for f in found if f[1]] and not list(tmp_path.iterdir())


def test_what_is_broken_was_valid(world):
    """Each file is read before it is changed: else the fuzzer would test the first check only."""
    files = {(kind, f"{kind}{i}.jsonl"): data for kind, texts in fuzz.text_files().items()
             for i, data in enumerate(texts) if kind in fuzz.KINDS}
    files |= {("records", name): data for name, data in fuzz.record_files().items()}
    for task, texts in fuzz.text_files().items():
        for data in texts if task in ("hellaswag", "gsm8k", "mmlu") else ():
            (world / f"{task}.csv").write_bytes(data)
            fuzz.read_task_file(world, world / f"{task}.csv")
    for (kind, name), data in files.items():
        (world / name).write_bytes(data)
        fuzz.KINDS[kind][1](world, world / name)
    for name in ("adapter/adapter_config.json", "model/config.json"):
        fuzz.read_model(world, world / name)
    fuzz.read_tokenizer(world, world / "model/tokenizer.json")


def test_an_input_depends_on_its_number_alone(world, tmp_path):
    for kind in fuzz.KINDS:
        a, b = (fuzz.make_input(kind, fuzz.random.Random("3 7"), world) for _ in range(2))
        assert a == b and a


def key_error(*_):
    return {}["x"]


def one_line(*_):
    raise UserError("file:1: so it is")


def full_disk(*_):
    raise OSError(28, "No space left on device", "f")


def without_a_word(*_):
    raise UserError(" \n")


def panic(*_):
    raise BaseException("as Rust's")


def loops(*_):
    while True:
        pass


def hides_the_loop(*_):
    try:
        loops()
    except BaseException:
        raise UserError("caught") from None


def allocates(*_):
    bytearray(700 * 2**20)


def allocates_all(*_):
    bytearray(2**40)


def writes_elsewhere(world, file):
    (world / "model/new.txt").write_text("x")


def makes_a_folder(world, file):
    Path(world / "new").mkdir()


def writes_its_output(world, file):
    (world / "out/new.txt").write_text("x")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("read, found", [
    (one_line, ""), (full_disk, ""), (writes_its_output, ""), (key_error, "KeyError: 'x'"),
    (without_a_word, "without a word"), (panic, "BaseException: as Rust's"),
    (loops, "more than 0.3 seconds"), (hides_the_loop, "more than 0.3 seconds, and the hang was"),
    (allocates, " MB"), (allocates_all, "MemoryError"), (makes_a_folder, "os.mkdir "),
    (writes_elsewhere, "written outside the folder: ['open ")])
def test_the_fuzzer_can_fail(world, read, found):
    wrong = fuzz.failure(read, world, world / "x", 0.3)
    assert found in wrong and bool(wrong) == bool(found)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_failure_keeps_its_input(tmp_path):
    kinds = {"policy": (1, key_error)}
    [_, (number, kind, wrong)] = fuzz.run(4, 5, 0, tmp_path, kinds)
    assert (number, kind) == (4, "policy") and "KeyError" in wrong
    kept = {p.name: p.read_bytes() for p in (tmp_path / "0-4-policy").iterdir()}
    assert kept["failure.txt"].decode() == wrong and kept["policy.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_crash_is_a_failure_too(tmp_path):
    """In a library it ends the worker: the input counts."""
    crash = ("import os, sys; from tests import fuzz; "
             "fuzz.KINDS = {'policy': (1, lambda *_: os._exit(3))}; "
             "fuzz.COMMAND = [sys.executable, '-c', os.environ['FUZZ']]; sys.exit(fuzz.main())")
    done = subprocess.run(
        [sys.executable, "-c", crash, "--inputs", "1", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
        env=fuzz.os.environ | {"FUZZ": crash})
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("the process ended with status 3") == 1
    assert done.stdout.splitlines()[-1].startswith("1 inputs, ")
    assert done.stdout.endswith(" seconds, 1 failures\n")

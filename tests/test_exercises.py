import ast
import json
import re
import shutil
import subprocess
import sys

import pytest

from tests import mutants, reference, solutions
from tests.assignment import make, with_body
from tests.exercises import EXERCISES, ROOT, find, grade, main

NAMED = {e.name: e for e in EXERCISES}


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_a_check_tells_right_from_wrong(exercise):
    """Three mistakes at least are rejected, two other right solutions accepted."""
    check, function = exercise.parts()
    check(function)
    wrong, right = ([fn for name, fn in vars(module).items()
                     if name.startswith(f"{exercise.key}__")] for module in (mutants, solutions))
    assert len(wrong) >= 3 and len(right) == 2
    for fn in wrong:
        with pytest.raises(AssertionError):
            check(fn)
    for fn in right:
        check(fn)


def test_list(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert [line.split(": ")[1].split()[0] for line in lines[1:-2]] == list(NAMED)
    assert lines[-2].split() == ["total", "100", str(sum(e.minutes for e in EXERCISES))]


def test_the_readme_lists_them_in_this_order():
    table = (ROOT / "tests/README.md").read_text()
    starts = [f"| {e.section} | " for e in EXERCISES]
    ends = [f"| `{e.module}.py: {e.name}` | `check_{e.key}` | {e.points}, {e.minutes} |"
            for e in EXERCISES]
    found = [line for line in table.split("\n") if re.search(r"` \| \d+, \d+ \|$", line)]
    assert len(found) == len(EXERCISES)
    assert all(line.startswith(a) and line.endswith(b) for line, a, b in zip(found, starts, ends))


@pytest.fixture(scope="module")
def assignment(tmp_path_factory):
    out = tmp_path_factory.mktemp("course") / "assignment"
    make(out)
    return out


def write(folder, name, body):
    file = folder / NAMED[name].file
    file.write_text(with_body(file.read_text(), name, body))


def body_of(key):
    """A solution's body as text."""
    source = (ROOT / "tests/solutions.py").read_text()
    return "\n".join(map(ast.unparse, find(source, key).body))


def test_an_assignment_lacks_the_bodies_and_what_gives_them_away(assignment):
    for e in EXERCISES:
        ours, theirs = (find((root / e.file).read_text(), e.name) for root in (ROOT, assignment))
        assert ast.unparse(ours.args) == ast.unparse(theirs.args)
        assert ast.get_docstring(ours) == ast.get_docstring(theirs)
        assert re.fullmatch(rf"raise NotImplementedError\('exercise {e.name}: .*'\)",
                            ast.unparse(theirs.body[-1])) and len(theirs.body) <= 2
        assert re.findall(rf"(?<=def {e.key}__)\w+", (assignment / "tests/mutants.py").read_text()
                          ) == ["left_out"]
    oracles = {n.name: ast.unparse(n.body[-1]) for n in ast.parse(
        (assignment / "tests/reference.py").read_text()).body if isinstance(n, ast.FunctionDef)}
    asked = {e.key for e in EXERCISES if hasattr(reference, e.key)}
    assert all(oracles[key].startswith(f"return recorded('{key}'") for key in asked) and asked
    assert not any((assignment / f"tests/{name}.py").exists()
                   for name in ("assignment", "solutions", "test_exercises"))
    assert not (assignment / ".git").exists()
    changed = {e.file for e in EXERCISES} | {"tests/mutants.py", "tests/reference.py"}
    for file in ("README.md", *changed, *(f"ease/{f.name}" for f in (ROOT / "ease").glob("*.py"))):
        same = (ROOT / file).read_bytes() == (assignment / file).read_bytes()
        assert same != (file in changed), file
    told = (assignment / "EXERCISES.md").read_text()
    assert all(f"`{e.name}`" in told and e.hint in told for e in EXERCISES)


def test_in_an_assignment_the_checks_of_the_gaps_fail_and_no_other(assignment, tmp_path):
    """There a solution is graded by recorded values: cross_entropy is written, the others not."""
    folder = tmp_path / "student"
    shutil.copytree(assignment, folder)
    write(folder, "cross_entropy", body_of("cross_entropy__by_logsumexp"))
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", "tests/test_losses.py::test_losses",
         "tests/test_method.py::test_method", "tests/test_policies.py::test_policies"],
        cwd=folder, capture_output=True, text=True, check=False).stdout
    failed = set(re.findall(r"^FAILED tests/test_\w+\.py::test_\w+\[(\w+)\]", found, re.MULTILINE))
    wanted = {e.name for e in EXERCISES if e.module in ("losses", "method", "policies")}
    calls_one = {"safety_kl"}  # topk_kl
    assert failed == wanted - {"cross_entropy"} | calls_one, found
    assert "exercise kl_divergence: write its body here" in found
    done = subprocess.run([sys.executable, "-m", "tests.exercises", "--make", "x"], cwd=folder,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is an assignment itself" in done.stderr


WRITTEN = {  # body, and what is said of it
    "response_pieces": (body_of("response_pieces__filtered"), ""),
    "select_vulnerable": ("import sys\nsys.exit()", "SystemExit, at: .*, in: assert ids"),
    "select_region": ("import os\nos._exit(0)", "ends the process, status 0"),
    "mix": ("print('x' * 10**6)\nreturn []", "prints more than 64 KiB"),
    "wilson_interval": ("while True:\n    pass", "was ended: more than 3 s of CPU time"),
    "overhead_reduction": ("return [0] * 10**10", "MemoryError, at: return"),
    "not_opening": ("return logits + unknown", "NameError: name 'unknown' is not defined, at: .*"),
    "rotate": ("return x", "AssertionError, in: assert found.shape == x.shape and torch.allclose"),
}


def test_a_wrong_solution_costs_its_own_points_only(assignment, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(assignment, folder)
    for name, (body, _) in WRITTEN.items():
        write(folder, name, body)
    with open(folder / "ease/losses.py", "a") as f:
        f.write("\n\ndef helper(:\n")
    (folder / "ease/lora.py").unlink()
    said = {name: why for name, (_, why) in WRITTEN.items()} | {
        "RMSNorm.forward": "NotImplementedError: exercise RMSNorm.forward: write its body here",
        "cross_entropy": r"ease/losses.py:\d+: invalid syntax",
        "LoRALinear.forward": "ease/lora.py: .*No such file"}
    found = grade(folder, [NAMED[name] for name in said], seconds=3)
    assert (found["points"], found["of"]) == (4, sum(NAMED[name].points for name in said))
    for row, (name, why) in zip(found["exercises"], said.items(), strict=True):
        assert row["name"] == name and row["points"] == (0 if why else row["of"])
        assert re.match(why or "$", row["why"]) and "\n" not in row["why"], row


def test_grades_as_text_and_as_json(assignment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tests.exercises.EXERCISES", EXERCISES[:1])
    monkeypatch.setattr(grade, "__defaults__", (EXERCISES[:1], 20))
    assert main(["--grade", str(ROOT)]) == 0
    first, total = capsys.readouterr().out.strip().split("\n")
    assert first == "Phase 1.2  response_pieces       4 / 4" and total.split() == ["total", *"4/4"]
    assert main(["--grade", str(assignment), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["points"], found["of"]) == (0, 4)
    assert "write its body here" in found["exercises"][0]["why"]


@pytest.mark.parametrize("flags, message", [
    (["--grade", "nowhere"], "nowhere is no copy of the project"),
    (["--grade", str(ROOT / "tests")], "is no copy of the project: it has no folder ease"),
    (["--make", str(ROOT)], "exists already")])
def test_errors_are_one_line(flags, message, capsys):
    assert main(flags) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out

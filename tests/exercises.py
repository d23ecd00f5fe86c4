"""Exercises: functions with their bodies taken out, graded by tests/checks.py. A teacher's tool:

    python -m tests.exercises --list
    python -m tests.exercises --make OUT_DIR           an assignment: the project with the gaps
    python -m tests.exercises --grade DIR [--json]     points of a student's folder

Each exercise is graded alone: the student's body in a copy of this project, its check in a process
with limits. That stops mistakes, not malice: students' code runs as you. It needs Linux.
"""

import argparse
import ast
import contextlib
import importlib
import json
import linecache
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from ease.records import UserError

ROOT = Path(__file__).parent.parent
FILES = ("*.py", "*.md", "*.txt", "LICENSE", ".gitignore", ".ci/*", "ease/*.py", "data/*.py",
         "data/*.md", "tests/*.py", "tests/*.md", "tests/*.txt", "tests/recorded.json")
ANSWERS = ("tests/solutions.py", "tests/test_exercises.py")  # no part of an assignment
SECONDS = 20  # of CPU time for one check, imports not counted
MEMORY, OUTPUT = 4 * 2**30, 2**16  # bytes


class Exercise(NamedTuple):
    """One function, or method "Class.method", whose body the student writes."""

    name: str
    module: str
    section: str  # as in the README's table
    points: int
    minutes: int
    hint: str = ""  # what the docstring leaves open

    @property
    def file(self) -> str:
        return f"ease/{self.module}.py"

    @property
    def key(self) -> str:
        """As check_KEY, KEY__mistake and the oracle are called."""
        return self.name.replace(".", "_")

    def parts(self) -> tuple[Callable, Callable]:
        """(check, function)."""
        module = importlib.import_module(f"ease.{self.module}")
        checks = importlib.import_module("tests.checks")
        return getattr(checks, f"check_{self.key}"), attrgetter(self.name)(module)


EXERCISES = [  # in the paper's order; an exercise may call those above it
    Exercise("response_pieces", "method", "Phase 1.2", 4, 15, "The close marker's role is REASONING."),
    Exercise("split_reasoning", "method", "Phase 1.2", 8, 40, "Parts are stripped; the first close "
             "marker counts; markers are <think> and </think>, whatever white space is around."),
    Exercise("accept_trace", "policies", "Phase 1.2", 8, 40, "The reasons, the first that holds: "
             "'cut off', 'think block unclosed', 'no think block', 'empty reasoning', 'empty "
             "answer', 'repetition loop' (is_loop), 'names no category and no rule' (the record has "
             "categories but BENIGN, and the reasoning cites none of them), 'harmful request, answer "
             "judged VERDICT' (of a harmful record, unless SAFE), 'benign request refused'."),
    Exercise("cross_entropy", "losses", "Phase 1.3", 4, 10, "Any dtype of logits, computed in fp32."),
    Exercise("kl_divergence", "losses", "Phase 1.3", 8, 40),
    Exercise("topk_kl", "losses", "Phase 1.3", 8, 50, "Finite gradients also where k = V, and there "
             "those of the full KL."),
    Exercise("select_vulnerable", "method", "Phase 2.1", 4, 10, "Another number of verdicts than of "
             "records is an error."),
    Exercise("select_region", "method", "Phase 2.1", 5, 20, "The draw repeats for a seed."),
    Exercise("mix", "method", "Phase 2.2", 5, 20, "The error is a UserError that names the count and "
             "the group."),
    Exercise("gated_cross_entropy", "losses", "Phase 2.2", 3, 10),
    Exercise("RMSNorm.forward", "model", "The model", 4, 15, "Returns x's dtype."),
    Exercise("rotate", "model", "The model", 6, 30, "cos and sin are rope_tables'; x stays."),
    Exercise("LoRALinear.forward", "lora", "The model", 6, 30),
    Exercise("prefill", "generate", "The gate", 7, 40, "See CausalLM.last_logits and hidden; prompts "
             "and marker stay."),
    Exercise("not_opening", "generate", "The gate", 8, 45, "The caller's logits stay."),
    Exercise("wilson_interval", "scoring", "Results", 5, 20),
    Exercise("overhead_reduction", "scoring", "Results", 7, 45, "Keys: value, low, high, n (prompts), "
             "raw. With x_g, y_g the sums over group g of tok - tok_refusal and tok_deliberative - "
             "tok_refusal, ratio = sum x_g / sum y_g and e_g = x_g - ratio y_g, the interval is value "
             "-+ t_quantile(G - 1) sqrt(G / (G - 1) sum e_g^2) / sum y_g."),
]


# ---- functions as text
def find(source: str, name: str) -> ast.FunctionDef:
    """The function's node; LookupError where there is none."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", "") == part), None)
        if node is None:
            break
    if not isinstance(node, ast.FunctionDef):
        raise LookupError(f"there is no function {name}")
    return node


def documented(node: ast.FunctionDef) -> bool:
    return ast.get_docstring(node, clean=False) is not None


def body_of(source: str, name: str) -> str:
    """A function's statements, docstring and comments left out."""
    node = find(source, name)
    return "\n".join(map(ast.unparse, node.body[documented(node) :])) or "pass"


def with_body(source: str, name: str, body: str) -> str:
    """The source with another body in a function; signature and docstring stay."""
    node, lines = find(source, name), source.split("\n")
    first = node.body[0]
    start = first.end_lineno if documented(node) else first.lineno - 1
    lines[start : node.end_lineno] = [textwrap.indent(body, " " * first.col_offset)]
    return "\n".join(lines)


# ---- an assignment
def copy_project(to: Path, leave_out: tuple[str, ...] = ()) -> None:
    for file in (f for pattern in FILES for f in ROOT.glob(pattern) if f.is_file()):
        name = file.relative_to(ROOT).as_posix()
        if name not in leave_out:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to / name)


def without_mutants(source: str, keys: list[str]) -> str:
    """mutants.py, with one that says nothing in the place of all mutants of each key."""
    lines, seen = source.split("\n"), set()
    for node in reversed(ast.parse(source).body):
        key = getattr(node, "name", "").partition("__")[0]
        if key in keys:
            lines[node.lineno - 1 : node.end_lineno + 2] = [] if key in seen else [
                f"def {key}__left_out(*arguments):", "    raise AssertionError", "", ""]
            seen.add(key)
    return "\n".join(lines)


def oracle_values(exercise: Exercise) -> list:
    """[arguments, value] of every call of the exercise's oracle in its check; none: []."""
    reference, found = importlib.import_module("tests.reference"), []
    oracle = getattr(reference, exercise.key, None)
    if oracle is None:
        return []

    def recording(*arguments):
        found.append([arguments, oracle(*arguments)])
        return found[-1][1]

    check, function = exercise.parts()
    setattr(reference, exercise.key, recording)
    try:
        check(function)
    finally:
        setattr(reference, exercise.key, oracle)
    return found


def recorded(name: str, *arguments) -> list:
    """What the oracle gave for these numbers when the assignment was made, which lacks it."""
    def flat(x) -> list:
        return [v for item in x for v in flat(item)] if isinstance(x, list | tuple) else [x]

    mine = flat(arguments)
    for theirs, value in json.loads((ROOT / "tests/recorded.json").read_text())[name]:
        theirs = flat(theirs)
        if len(mine) == len(theirs) and all(abs(a - b) < 1e-3 for a, b in zip(mine, theirs)):
            return value
    raise LookupError(f"tests/recorded.json has no {name} of these numbers: a changed check, or a "
                      "torch that draws other ones than the teacher's")


def as_text() -> str:
    """EXERCISES.md."""
    rows = [f"| `{e.name}` | {e.section} | {e.points} | {e.minutes} | `{e.file}` | "
            f"`tests/test_{e.module}.py -k {e.name}` | {e.hint} |" for e in EXERCISES]
    return "\n".join([
        "# Exercises", "",
        f"{len(rows)} functions have lost their bodies. Write them from their docstrings, README.md "
        "and the last column.", "A body stands alone: signature and docstring stay, imports and "
        "helpers go inside. It may call the", "functions above it in the table, and then needs "
        "them here. Your points, and what is wrong:", "", "```sh",
        "python -m tests.exercises --grade .", "python -m pytest tests/test_losses.py -k topk_kl  "
        "# one, with the values", "```", "",
        "| function | paper | points | minutes | file | test | beyond the docstring |",
        "|---|---|---|---|---|---|---|", *rows, ""])


def make(out: Path) -> None:
    if (ROOT / "EXERCISES.md").exists():
        raise UserError(f"{ROOT} is an assignment itself")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already")
    values = {e.key: found for e in EXERCISES if (found := oracle_values(e))}
    copy_project(out, leave_out=ANSWERS)

    def edit(name: str, change: Callable[[str], str]) -> None:
        (out / name).write_text(change((out / name).read_text()))

    for e in EXERCISES:
        gap = f'raise NotImplementedError("exercise {e.name}: write its body here")'
        edit(e.file, lambda source: with_body(source, e.name, gap))
    for key in values:
        names = [a.arg for a in find((ROOT / "tests/reference.py").read_text(), key).args.args]
        body = ("from tests.exercises import recorded\n\n"
                f"return recorded({key!r}, {', '.join(names)})")
        edit("tests/reference.py", lambda source: with_body(source, key, body))
    edit("tests/mutants.py", lambda source: without_mutants(source, [e.key for e in EXERCISES]))
    (out / "tests/recorded.json").write_text(json.dumps(values))
    (out / "EXERCISES.md").write_text(as_text())


# ---- grading
def limit(what: int, soft: int) -> None:
    """The hard limit lies above: a signal that the code handles is followed by SIGKILL."""
    hard = resource.getrlimit(what)[1]
    top = soft + 2 if what == resource.RLIMIT_CPU else soft
    resource.setrlimit(what, (soft, top if hard < 0 else min(top, hard)))


def explain(e: BaseException) -> str:
    """One line: the error, and where: the statement of the check, and of the solution."""
    places = {}
    for frame in traceback.extract_tb(e.__traceback__):
        for folder in ("tests/checks.py", "ease/"):
            if str(ROOT / folder) in frame.filename and not (folder[0] == "t" and folder in places):
                lines = linecache.getlines(frame.filename)[frame.lineno - 1 : frame.end_lineno]
                places[folder] = " ".join(line.strip() for line in lines)[:200]
    what = [] if type(e) is AssertionError else [f"{type(e).__name__}: {e}".partition("\n")[0][:200]]
    return "  ".join(what + [f"[{folder}: {line}]" for folder, line in places.items()])


def check_here(name: str, seconds: int) -> None:
    """In the process of one check. Its end is proved by a word from standard input: a solution that
    exits does not know it.
    """
    token = sys.stdin.readline().strip()
    limit(resource.RLIMIT_CORE, 0), limit(resource.RLIMIT_FSIZE, OUTPUT)
    limit(resource.RLIMIT_DATA, MEMORY)
    try:
        check, function = next(e for e in EXERCISES if e.name == name).parts()
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
        check(function)
        print(flush=True)
    except BaseException as e:
        token = explain(e)
    with contextlib.suppress(OSError):
        os.write(1, f"\n{token}".encode(errors="replace"))
    os._exit(0)  # whatever threads or exit handlers there are


def run_check(exercise: Exercise, folder: Path, seconds: int) -> str:
    """The check in a project: "" if it passes, else why not."""
    token = secrets.token_hex(16)
    command = [sys.executable, "-c", "from tests.exercises import check_here; "
               f"check_here({exercise.name!r}, {seconds})"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile() as output:  # no pipe: a grandchild could hold it open
        child = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.PIPE,
                                 stdout=output, stderr=output, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(token.encode(), timeout=100 + 5 * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        status, said = child.wait(), b""
        output.seek(0)
        said = output.read().decode(errors="replace")
    last = said.rpartition("\n")[2]
    if len(said) >= OUTPUT:
        return f"prints more than {OUTPUT // 1024} KiB"
    if last == token:
        return ""
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"not done after {seconds} s of CPU time"
    return last if status == 0 and last else f"ends the process (status {status}): {last[:100]}"


def mistake(exercise: Exercise, folder: Path, seconds: int) -> str:
    """What is wrong with a student's solution; "" if nothing is."""
    try:
        body = body_of((folder / exercise.file).read_text(), exercise.name)
    except SyntaxError as e:
        return f"{exercise.file}:{e.lineno}: {e.msg}"
    except (OSError, ValueError, LookupError, RecursionError, MemoryError) as e:
        return f"{exercise.file}: {e}"
    with tempfile.TemporaryDirectory() as project:
        copy_project(Path(project))
        file = Path(project, exercise.file)
        file.write_text(with_body(file.read_text(), exercise.name, body))
        return run_check(exercise, Path(project), seconds)


def grade(folder: Path, exercises: list[Exercise] = EXERCISES, seconds: int = SECONDS) -> dict:
    """{"points", "of", "exercises": [{"name", "section", "points", "of", "why"}]}."""
    if not (folder / "ease").is_dir():
        raise UserError(f"{folder} is no copy of the project: it has no folder ease")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(lambda e: mistake(e, folder, seconds), exercises))
    rows = [{"name": e.name, "section": e.section, "points": 0 if why else e.points, "of": e.points,
             "why": why} for e, why in zip(exercises, found)]
    return {"points": sum(r["points"] for r in rows), "of": sum(r["of"] for r in rows),
            "exercises": rows}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.exercises",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="the exercises")
    what.add_argument("--make", type=Path, metavar="OUT_DIR", help="write an assignment")
    what.add_argument("--grade", type=Path, metavar="DIR", help="grade a student's folder")
    parser.add_argument("--json", action="store_true", help="the grades as JSON")
    flags = parser.parse_args(arguments)
    try:
        if flags.make:
            make(flags.make)
            print(f"{flags.make}: {len(EXERCISES)} exercises; EXERCISES.md tells the student")
        elif flags.list:
            print(f"{'section':10} {'points':>6} {'minutes':>7}  {'function':39} check")
            for e in EXERCISES:
                print(f"{e.section:10} {e.points:6} {e.minutes:7}  {e.file + ': ' + e.name:39} "
                      f"check_{e.key}")
            print(f"{'total':10} {sum(e.points for e in EXERCISES):6} "
                  f"{sum(e.minutes for e in EXERCISES):7}")
        else:
            found = grade(flags.grade)
            for row in found["exercises"] if not flags.json else []:
                print(f"{row['section']:10} {row['name']:20} {row['points']:3} / {row['of']}"
                      f"  {row['why']}".rstrip())
            print(json.dumps(found, indent=1) if flags.json else
                  f"{'total':10} {'':20} {found['points']:3} / {found['of']}")
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

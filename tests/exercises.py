"""Exercises: functions with their bodies taken out, graded by tests/checks.py.

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
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from ease.records import UserError

ROOT = Path(__file__).parent.parent
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
    def key(self) -> str:  # as in check_KEY, KEY__mistake and reference.KEY
        return self.name.replace(".", "_")

    def parts(self) -> tuple:
        """(check, function)."""
        module, checks = map(importlib.import_module, (f"ease.{self.module}", "tests.checks"))
        return getattr(checks, f"check_{self.key}"), attrgetter(self.name)(module)


EXERCISES = [  # in the paper's order; a check needs no function below its own
    Exercise("response_pieces", "method", "Phase 1.2", 4, 15, "The close marker is REASONING."),
    Exercise("split_reasoning", "method", "Phase 1.2", 8, 40, "Parts are stripped; the first "
             "close counts; markers are `<think>` and `</think>`, with any white space around."),
    Exercise("accept_trace", "policies", "Phase 1.2", 8, 40, "The first that holds: 'cut off'; "
             "'think block unclosed'; 'no think block'; 'empty reasoning'; 'empty answer'; "
             "'repetition loop' (is_loop of the text); 'names no category and no rule' (by "
             "cites, where it has categories other than BENIGN); 'harmful request, answer judged "
             "VERDICT' (all but SAFE); 'benign request refused'."),
    Exercise("cross_entropy", "losses", "Phase 1.3", 4, 10, "Computed in fp32."),
    Exercise("kl_divergence", "losses", "Phase 1.3", 8, 40),
    Exercise("topk_kl", "losses", "Phase 1.3", 8, 50, "At k = V the gradient is the full KL's."),
    Exercise("select_vulnerable", "method", "Phase 2.1", 4, 10, "Unequal lengths are an error."),
    Exercise("select_region", "method", "Phase 2.1", 5, 20, "The same seed, the same draw."),
    Exercise("mix", "method", "Phase 2.2", 5, 20, "A UserError with the count and the name."),
    Exercise("gated_cross_entropy", "losses", "Phase 2.2", 3, 10, "Computed in fp32."),
    Exercise("RMSNorm.forward", "model", "The model", 4, 15, "The result has x's dtype."),
    Exercise("rotate", "model", "The model", 6, 30, "cos, sin: see rope_tables. x stays."),
    Exercise("LoRALinear.forward", "lora", "The model", 6, 30, "x has the dtype of weight."),
    Exercise("prefill", "generate", "The gate", 7, 40, "See CausalLM.last_logits. prompts stay."),
    Exercise("not_opening", "generate", "The gate", 8, 45, "The caller's logits stay; log(0) "
             "raises."),
    Exercise("wilson_interval", "scoring", "Results", 5, 20),
    Exercise("overhead_reduction", "scoring", "Results", 7, 45, "Keys: value, low, high, n "
             "(prompts), raw. x_g, y_g: sums over group g of tok - tok_refusal and of "
             "tok_deliberative - tok_refusal; ratio = sum x_g / sum y_g; e_g = x_g - ratio y_g; "
             "interval = value -+ t_quantile(G - 1) sqrt(G / (G - 1) sum e_g^2) / sum y_g."),
]


def copy_project(to: Path, leave_out: tuple[str, ...] = ()) -> None:
    for pattern in ("*.py", "*.md", "*.txt", "LICENSE", ".gitignore", ".ci/*", "ease/*.py",
                    "data/*.py", "data/*.md", "tests/*.[pmt]*", "tests/recorded.json"):
        for file in ROOT.glob(pattern):
            copy = to / file.relative_to(ROOT)
            if file.is_file() and file.name not in leave_out:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)


def find(source: str | ast.Module, name: str) -> ast.FunctionDef:
    """The function's node; LookupError where there is none."""
    node = ast.parse(source) if isinstance(source, str) else source
    for part in name.split("."):
        node = next((n for n in getattr(node, "body", ()) if getattr(n, "name", "") == part), None)
    if not isinstance(node, ast.FunctionDef):
        raise LookupError(f"there is no function {name}")
    return node


def documented(node: ast.FunctionDef) -> bool:
    return ast.get_docstring(node, clean=False) is not None


# ---- the process of one check
def limit(what: int, soft: int, grace: int = 0) -> None:
    hard = resource.getrlimit(what)[1] % 2**63  # -1: none
    resource.setrlimit(what, (min(soft, hard), min(soft + grace, hard)))


def explain(e: BaseException) -> str:
    """One line: the error, the solution's line, and the statement of the check."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename.startswith(str(ROOT))]
    said = f"{type(e).__name__}: {e}".strip(": ").partition("\n")[0][:200]
    if isinstance(e, NotImplementedError) or not frames:
        return said
    if f"{ROOT}/ease/" in frames[-1].filename:
        said += f", at: {frames[-1].line}"
    for frame in frames:
        if frame.filename == str(ROOT / "tests/checks.py"):
            source = Path(frame.filename).read_text()
            at = max((n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt) and
                      n.lineno <= frame.lineno <= n.end_lineno), key=attrgetter("lineno"))
            lines = source.split("\n")[at.lineno - 1 : at.end_lineno]
            return f"{said}, in: {' '.join(map(str.strip, lines))[:300]}"
    return said


def check_here(name: str, seconds: int) -> None:
    """A check in a process of its own. A word from standard input, said last, proves its end."""
    said = sys.stdin.readline().strip()
    limit(resource.RLIMIT_CORE, 0), limit(resource.RLIMIT_FSIZE, OUTPUT)
    limit(resource.RLIMIT_DATA, MEMORY)
    try:
        check, function = next(e for e in EXERCISES if e.name == name).parts()
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds, grace=2)
        check(function)
        sys.stdout.flush()
    except BaseException as e:
        said = explain(e)
    with contextlib.suppress(OSError):  # more than OUTPUT was printed
        os.write(1, f"\n{said}".encode(errors="replace"))
    os._exit(0)  # whatever threads and exit handlers there are


# ---- the grader
def run_check(exercise: Exercise, project: Path, seconds: int) -> str:
    """The check in a project: "" if it passes, else why not."""
    token = secrets.token_hex(16)
    program = f"from tests.exercises import check_here\ncheck_here({exercise.name!r}, {seconds})"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile() as output:  # no pipe: a grandchild could hold it open
        child = subprocess.Popen([sys.executable, "-c", program], cwd=project, env=environment,
                                 stdin=subprocess.PIPE, stdout=output, stderr=output,
                                 start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(token.encode(), timeout=60 + 10 * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        status = child.wait()
        output.seek(0)
        said = output.read().decode(errors="replace")
    last = said.rpartition("\n")[2]
    if len(said) >= OUTPUT:
        return f"prints more than {OUTPUT // 1024} KiB"
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"was ended: more than {seconds} s of CPU time, or {60 + 10 * seconds} s in all"
    if last == token:
        return ""
    return last if status == 0 and last else f"ends the process, status {status}"


def mistake(exercise: Exercise, folder: Path, seconds: int) -> str:
    """What is wrong with a student's solution; "" if nothing is."""
    try:
        theirs = find((folder / exercise.file).read_text(), exercise.name)
        tree = ast.parse((ROOT / exercise.file).read_text())
        ours = find(tree, exercise.name)
        ours.body[documented(ours) :] = theirs.body[documented(theirs) :] or [ast.Pass()]
        source = ast.unparse(tree)
    except SyntaxError as e:
        return f"{exercise.file}:{e.lineno}: {e.msg}"
    except Exception as e:  # no file, no function, no UTF-8, nested too deeply
        return f"{exercise.file}: {e}"
    with tempfile.TemporaryDirectory() as project:
        copy_project(Path(project))
        Path(project, exercise.file).write_text(source)
        return run_check(exercise, Path(project), seconds)


def grade(folder: Path, exercises: list[Exercise] = EXERCISES, seconds: int = SECONDS) -> dict:
    """{"points", "of", "exercises": [{"name", "section", "points", "of", "why"}]}."""
    if not (folder / "ease").is_dir():
        raise UserError(f"{folder} is no copy of the project: it has no folder ease")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(lambda e: mistake(e, folder, seconds), exercises))
    rows = [{"name": e.name, "section": e.section, "points": 0 if why else e.points, "of": e.points,
             "why": why} for e, why in zip(exercises, found)]
    return {k: sum(r[k] for r in rows) for k in ("points", "of")} | {"exercises": rows}


def show(flags: argparse.Namespace) -> None:
    if flags.list:
        print(f"{'paper':10} {'points':>6} {'minutes':>7}  {'function':38} check")
        for e in EXERCISES:
            print(f"{e.section:10} {e.points:6} {e.minutes:7}  {f'{e.file}: {e.name}':38} "
                  f"check_{e.key}")
        print("total      {:6} {:7}".format(*map(sum, list(zip(*EXERCISES))[3:5])))
    elif flags.make:
        if (ROOT / "EXERCISES.md").exists():
            raise UserError(f"{ROOT} is an assignment itself")
        importlib.import_module("tests.assignment").make(flags.make)
        print(f"{flags.make}: {len(EXERCISES)} exercises; EXERCISES.md tells the student")
    elif flags.json:
        print(json.dumps(grade(flags.grade), indent=1))
    else:
        found = grade(flags.grade)
        for r in [*found["exercises"], {**found, "section": "total", "name": "", "why": ""}]:
            line = f"{r['section']:10} {r['name']:19} {r['points']:3} / {r['of']}  {r['why']}"
            print(line.rstrip())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.exercises",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="the exercises")
    what.add_argument("--make", type=Path, metavar="OUT_DIR", help="write an assignment")
    what.add_argument("--grade", type=Path, metavar="DIR", help="grade a student's folder")
    parser.add_argument("--json", action="store_true", help="the grades as JSON")
    try:
        show(parser.parse_args(arguments))
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

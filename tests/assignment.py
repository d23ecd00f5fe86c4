"""Writes an assignment: the project with the exercises' bodies taken out, and without what would
give them away: their mutants, and their oracles, of which only the values for the checks' own
numbers are kept (tests/recorded.json), so that the checks run there too.
"""

import ast
import importlib
import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

from ease.records import UserError
from tests.exercises import EXERCISES, Exercise, copy_project, documented, find

ANSWERS = ("assignment.py", "solutions.py", "test_exercises.py")
TEXT = """# Exercises

{count} functions have lost their bodies. Write each from its docstring, README.md and the last
column. A body stands alone: signature and docstring stay, imports and helpers go inside. It may
call the functions above it in the table, which it then needs here too; so does `prefill`'s check,
which runs a model (RMSNorm, rotate). Your points, and what is
wrong:

```sh
python -m tests.exercises --grade .
python -m pytest tests/test_losses.py -k topk_kl  # one of them, with the values
```

| function | paper | points | minutes | file | test | beyond the docstring |
|---|---|---|---|---|---|---|
"""


def make(out: Path) -> None:
    """The assignment, in a new folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already")
    values = {e.key: found for e in EXERCISES if (found := oracle_values(e))}
    copy_project(out, ANSWERS)

    def edit(name: str, change: Callable[..., str], *arguments) -> None:
        (out / name).write_text(change((out / name).read_text(), *arguments))

    for e in EXERCISES:
        gap = f'raise NotImplementedError("exercise {e.name}: write its body here")'
        edit(e.file, with_body, e.name, gap)
    for key in values:
        edit("tests/reference.py", with_recorded_values, key)
    edit("tests/reference.py", lambda source: f"{source}\n\n{inspect.getsource(recorded)}")
    edit("tests/mutants.py", without_mutants, [e.key for e in EXERCISES])
    (out / "tests/recorded.json").write_text(json.dumps(values))
    rows = [f"| `{e.name}` | {e.section} | {e.points} | {e.minutes} | `{e.file}` | "
            f"`tests/test_{e.module}.py -k {e.name}` | {e.hint} |\n" for e in EXERCISES]
    (out / "EXERCISES.md").write_text(TEXT.format(count=len(rows)) + "".join(rows))


def with_body(source: str, name: str, body: str) -> str:
    """The source with another body in a function, signature and docstring kept."""
    node, lines = find(source, name), source.split("\n")
    first = node.body[0]
    start = first.end_lineno if documented(node) else first.lineno - 1
    lines[start : node.end_lineno] = [textwrap.indent(body, " " * first.col_offset)]
    return "\n".join(lines)


def with_recorded_values(source: str, name: str) -> str:
    names = ", ".join(a.arg for a in find(source, name).args.args)
    return with_body(source, name, f'return recorded("{name}", {names})')


def without_mutants(source: str, keys: list[str]) -> str:
    """mutants.py, with one that shows nothing in the place of all mutants of each key."""
    lines, seen = source.split("\n"), set()
    for node in reversed(ast.parse(source).body):
        key = getattr(node, "name", "").partition("__")[0]
        if key in keys:  # and the two empty lines behind it
            lines[node.lineno - 1 : node.end_lineno + 2] = [] if key in seen else [
                f"def {key}__left_out(*arguments):", "    raise AssertionError", "", ""]
            seen.add(key)
    return "\n".join(lines)


def oracle_values(exercise: Exercise) -> list:
    """[arguments, value] of every call of the exercise's oracle in its check; [] without one."""
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
    """What the oracle, which is left out, gave for these numbers."""
    import json
    from pathlib import Path

    def flat(x) -> list:
        return [v for item in x for v in flat(item)] if isinstance(x, list | tuple) else [x]

    mine = flat(arguments)
    for theirs, value in json.loads(Path(__file__).with_name("recorded.json").read_text())[name]:
        theirs = flat(theirs)
        if len(mine) == len(theirs) and all(abs(a - b) < 1e-3 for a, b in zip(mine, theirs)):
            return value
    raise LookupError(f"recorded.json has no {name} of these numbers: the check was changed, or "
                      "this torch draws other numbers than that which made the assignment")

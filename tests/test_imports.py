"""The house rules that a machine can check: who imports whom, and nothing outside the five
packages.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A file imports only files above it. The first eight are the method in plain Python: standard
# library only.
METHOD = ["records", "method", "policies", "readers", "attacks", "scoring", "report", "compare"]
MACHINERY = [
    "ranks",
    "tokenizer_files",
    "tokenizer",
    "config",
    "model",
    "lora",
    "losses",
    "memory",
    "optim",
    "run",
    "loading",
    "checkpoint",
    "batching",
    "generate",
    "respond",
    "outputs",
    "systems",
    "tasks",
    "judge",
    "categories",
    "traces",
    "teacher",
]
# a first reading skips them
EXTRAS = ["contest", "sweep", "prefill", "page", "adaptive", "stability", "topk", "anchor",
          "stations", "__main__"]
PACKAGES = {"torch", "safetensors", "tokenizers", "numpy", "tqdm", "jinja2", "huggingface_hub"}
ORDER = METHOD + MACHINERY + EXTRAS
FILES = [ROOT / "ease" / f"{name}.py" for name in ORDER]
FILES += [ROOT / f"{name}.py" for name in ("distill", "train", "evaluate")]
FILES += sorted((ROOT / "data").glob("[a-z]*.py"))


def imports(file: Path) -> set[str]:
    out = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports only"
            out |= {
                f"{node.module}.{alias.name}" if node.module in ("ease", "data") else node.module
                for alias in node.names
            }
    return out


def test_every_file_is_listed():
    assert {f.stem for f in (ROOT / "ease").glob("*.py")} == {*ORDER, "__init__"}
    for name in set(ORDER) - {"__main__", "topk"}:  # test_main, test_teacher
        assert (ROOT / "tests" / f"test_{name}.py").exists(), f"no tests for {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_imports(file):
    for name in imports(file):
        top = name.split(".")[0]
        if top == "ease":
            used = name.split(".")[1]
            above = file.parent != ROOT / "ease" or ORDER.index(used) < ORDER.index(file.stem)
            assert above, f"{file.stem} imports {used}"
        elif top == "data":
            assert file.parent != ROOT / "ease", "ease knows nothing of data"
        else:
            assert top in sys.stdlib_module_names or top in PACKAGES, f"{file.stem} imports {name}"
            assert top in sys.stdlib_module_names or file.stem not in METHOD, (
                f"{file.stem} is plain Python"
            )


def test_scripts_are_safe_to_import_and_small():
    for file in FILES:
        tree = ast.parse(file.read_text())
        for node in tree.body:
            allowed = (
                ast.Import,
                ast.ImportFrom,
                ast.FunctionDef,
                ast.ClassDef,
                ast.Assign,
                ast.AnnAssign,
                ast.If,
            )
            assert (
                isinstance(node, allowed)
                or isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
            ), f"{file.stem}:{node.lineno}"
        assert ast.get_docstring(tree), file
    for name in ("distill", "train", "evaluate"):
        assert (
            (ROOT / f"{name}.py")
            .read_text()
            .endswith('if __name__ == "__main__":\n    command_line(main, Config)\n')
        )


def test_lines_are_at_most_100_columns_wide():
    wide = [f"{file.relative_to(ROOT)}:{number}" for folder in ("", "ease", "data", "tests")
            for file in (ROOT / folder).glob("*.py")
            if file.name != "templates.py"  # a template's lines are what it says
            for number, line in enumerate(file.read_text().split("\n"), start=1) if len(line) > 100]
    assert not wide


def test_no_function_is_longer_than_50_lines():
    long = [f"{file.stem}.{node.name}" for file in FILES if file.parent != ROOT / "data"
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50]
    assert not long

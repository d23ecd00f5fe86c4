"""The house rules that a machine can check: who imports whom, and nothing outside the five packages."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A file imports only files above it. The first seven are the method in plain Python: standard library only.
METHOD = ["records", "method", "policies", "readers", "attacks", "scoring", "report"]
MACHINERY = ["tokenizer", "model", "lora", "losses", "run", "loading", "batching", "generate", "judge", "traces", "teacher", "__main__"]
PACKAGES = {"torch", "safetensors", "tokenizers", "numpy", "tqdm", "jinja2", "huggingface_hub"}
FILES = [ROOT / "ease" / f"{name}.py" for name in METHOD + MACHINERY] + [ROOT / f"{n}.py" for n in ("distill", "train", "evaluate")] + sorted((ROOT / "data").glob("[a-z]*.py"))


def imports(file: Path) -> set[str]:
    out = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports only"
            out |= {f"{node.module}.{alias.name}" if node.module in ("ease", "data") else node.module for alias in node.names}
    return out


def test_every_file_is_listed():
    assert {f.stem for f in (ROOT / "ease").glob("*.py")} == {*METHOD, *MACHINERY, "__init__"}
    for name in METHOD + [m for m in MACHINERY if m != "__main__"]:
        assert (ROOT / "tests" / f"test_{name}.py").exists(), f"no tests for {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_imports(file):
    order = METHOD + MACHINERY
    for name in imports(file):
        top = name.split(".")[0]
        if top == "ease":
            used = name.split(".")[1]
            assert file.parent.name != "ease" or order.index(used) < order.index(file.stem), f"{file.stem} imports {used}"
        elif top == "data":
            assert file.parent.name != "ease", "ease knows nothing of data"
        else:
            assert top in sys.stdlib_module_names or top in PACKAGES, f"{file.stem} imports {name}"
            assert top in sys.stdlib_module_names or file.stem not in METHOD, f"{file.stem} is plain Python"


def test_scripts_are_safe_to_import_and_small():
    for file in FILES:
        tree = ast.parse(file.read_text())
        for node in tree.body:
            allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If)
            assert isinstance(node, allowed) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant), f"{file.stem}:{node.lineno}"
        assert ast.get_docstring(tree), file
    for name in ("distill", "train", "evaluate"):
        assert (ROOT / f"{name}.py").read_text().endswith('if __name__ == "__main__":\n    command_line(main, Config)\n')

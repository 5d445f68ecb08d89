"""The house rules that a machine can check: sizes of files, functions and constructors; layers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import paceline

SOURCE = Path(paceline.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, DEFINITION):
                yield f"{path.relative_to(SOURCE)}:{node.name}", node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = (node.end_lineno or 0) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


def test_files_are_short() -> None:
    long = {str(p.relative_to(SOURCE)): len(p.read_text().splitlines()) for p in FILES}
    assert {name: lines for name, lines in long.items() if lines > 500} == {}
    assert long["trainer/trainer.py"] <= 400


def test_functions_are_short() -> None:
    lengths = {
        name: length(node) for name, node in functions() if name != "trainer/trainer.py:__init__"
    }
    assert {name: n for name, n in lengths.items() if n > 80} == {}
    assert sum(n > 40 for n in lengths.values()) <= len(lengths) / 10


def test_constructors_take_few_arguments() -> None:
    """All but the Trainer's, whose list is the design's."""
    many = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name != "Trainer":
                for item in node.body:
                    if isinstance(item, DEFINITION) and item.name == "__init__":
                        count = len(item.args.args) - 1 + len(item.args.kwonlyargs)
                        if count > 12:
                            many[node.name] = count
    assert many == {}


def test_public_functions_have_docstrings() -> None:
    missing = []
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if (
                isinstance(node, (*DEFINITION, ast.ClassDef))
                and not node.name.startswith("_")
                and ast.get_docstring(node) is None
            ):
                missing.append(f"{path.relative_to(SOURCE)}:{node.name}")
    assert missing == []


def test_rooms_import_only_what_is_below_them() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter], capture_output=True, text=True, cwd=SOURCE.parents[1], timeout=60
    )
    assert done.returncode == 0, done.stdout

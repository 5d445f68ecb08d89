"""The house rules that a machine can check: constructors, docstrings, layers."""

from __future__ import annotations

import ast
from pathlib import Path

import paceline

SOURCE = Path(paceline.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef)


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

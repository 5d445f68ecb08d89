"""Public functions say what their arguments are, whatever their room.

Public is a function at the top of a module, or a method of a public class, whose name has no
leading underscore. What a base class documents is not repeated: overridden methods and the events
(`on_*`) are left out, and so are commands, whose options carry their help.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import paceline

SOURCE = Path(paceline.__file__).parent
DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef)
COMMANDS = SOURCE / "cli"


@dataclass
class Function:
    """A public function or method in the source."""

    path: Path
    node: ast.FunctionDef | ast.AsyncFunctionDef
    owner: str = ""

    @cached_property
    def module(self) -> str:
        return ".".join(self.path.relative_to(SOURCE.parent).with_suffix("").parts)

    @cached_property
    def name(self) -> str:
        return f"{self.module}:{self.owner and self.owner + '.'}{self.node.name}"

    @cached_property
    def parameters(self) -> list[str]:
        """Names of its parameters, without `self` and `cls`."""
        given = self.node.args
        plain = [*given.posonlyargs, *given.args]
        decorators = {getattr(d, "id", "") for d in self.node.decorator_list}
        plain = plain[1:] if self.owner and "staticmethod" not in decorators else plain
        stars = [star for star in (given.vararg, given.kwarg) if star is not None]
        return [a.arg for a in [*plain, *given.kwonlyargs, *stars]]

    def overrides(self) -> bool:
        """Whether a base class has a method of this name, here or in another package."""
        if not self.owner:
            return False
        cls = getattr(importlib.import_module(self.module), self.owner)
        return any(self.node.name in vars(base) for base in cls.__mro__[1:])


def public_functions() -> Iterator[Function]:
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, DEFINITION):
                yield Function(path, node)
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for item in node.body:
                    if isinstance(item, DEFINITION):
                        yield Function(path, item, node.name)


def documented(docstring: str) -> list[str]:
    """Names in a docstring's `Args:`; settings that belong together may share an entry."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", docstring, flags=re.M)
    entries = re.findall(r"^    (\*{0,2}\w[^:\n]*):", section[1], flags=re.M) if section else []
    return [name.strip("* ") for entry in entries for name in entry.split(",")]


def test_public_functions_describe_their_arguments() -> None:
    wanting = {}
    for function in public_functions():
        if (
            function.node.name.startswith(("_", "on_"))
            or len(function.parameters) < 2
            or function.path.is_relative_to(COMMANDS)
            or function.overrides()
        ):
            continue
        names = documented(ast.get_docstring(function.node) or "")
        missing = [name for name in function.parameters if name not in names]
        unknown = [name for name in names if name not in function.parameters]
        if missing or unknown:
            wanting[function.name] = {"missing": missing, "unknown": unknown}
    assert wanting == {}

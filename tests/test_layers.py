"""No module imports itself by way of others, and nothing but the Trainer reaches into a Trainer.

Read from the syntax trees, so that imports inside functions and those for annotations alone count
like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import paceline

SOURCE = Path(paceline.__file__).parent
# A callback's methods take the Trainer, and readers want to see its type. Nothing else may.
ALLOWED = {("paceline.trainer.callback", "paceline.trainer.trainer")}


def name_of(path: Path, root: Path) -> str:
    """A module's dotted name; a package's is that of its folder."""
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, modules: set[str]) -> Iterator[str]:
    """The modules among these that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                part = f"{node.module}.{alias.name}"
                yield part if part in modules else node.module


def imports(root: Path) -> dict[str, set[str]]:
    """Which modules of a package each of them imports."""
    files = {name_of(path, root): path for path in sorted(root.rglob("*.py"))}
    found = {name: set(imported(path, {*files})) - {name} for name, path in files.items()}
    for importer, module in ALLOWED:
        found.get(importer, set()).discard(module)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules each of which imports all the others in the end."""
    below: dict[str, set[str]] = {}
    for start in graph:
        reached: set[str] = set()
        ahead = [*graph[start]]
        while ahead:
            if (name := ahead.pop()) not in reached:
                reached.add(name)
                ahead += graph[name]
        below[start] = reached
    knots = {
        tuple(sorted(name for name in below[start] if start in below[name]))
        for start in graph
        if start in below[start]
    }
    return [list(knot) for knot in sorted(knots)]


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(imports(SOURCE)) == []


def private_fields_of_a_trainer(path: Path) -> list[str]:
    """Where a file reaches into a Trainer: `trainer._x`, or `self._trainer._x`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
            continue
        owner = node.value
        name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
        if name.lstrip("_") == "trainer" and not node.attr.endswith("__"):
            found.append(f"{path.name}:{node.lineno}: {name}.{node.attr}")
    return found


def test_only_the_trainer_touches_its_private_fields() -> None:
    own = {SOURCE / "trainer" / name for name in ("trainer.py", "base.py", "run.py")}
    files = [path for path in SOURCE.rglob("*.py") if path not in own]
    assert [line for path in files for line in private_fields_of_a_trainer(path)] == []


def test_the_parts_of_a_run_and_the_placement_know_no_trainer() -> None:
    """What a window, a step and a placement need is given to them, by narrower types."""
    graph = imports(SOURCE)
    trainers = {"paceline.trainer.trainer", "paceline.trainer.base"}
    parts = ("run", "window", "optimization", "nonfinite", "recorder", "replica_groups", "stop")
    for name in graph:
        if name.startswith("paceline.parallel.") or name in {
            f"paceline.trainer.{p}" for p in parts
        }:
            assert not graph[name] & trainers, name


def test_a_circle_is_found_wherever_its_imports_stand(tmp_path: Path) -> None:
    root = tmp_path / "house"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "cellar.py").write_text("def stairs():\n    from house.attic import roof\n")
    (root / "hall.py").write_text("from house import cellar\n")
    (root / "attic.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.hall import door\n"
    )
    assert circles(imports(root)) == [["house.attic", "house.cellar", "house.hall"]]


def test_losses_import_torch_alone() -> None:
    """Of other packages; of ours the errors."""
    roots, ours = set(), set()
    for path in (SOURCE / "losses").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            roots |= {name.split(".")[0] for name in names}
            ours |= {name for name in names if name.startswith("paceline.")}
    assert roots - sys.stdlib_module_names == {"torch", "paceline"}
    assert {name for name in ours if not name.startswith("paceline.losses.")} == {"paceline.errors"}

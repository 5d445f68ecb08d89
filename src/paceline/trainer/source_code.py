"""The user's own code that a run depends on, as syntax trees: comments and layout do not count.

From the definition of a class or function this follows every name that it uses, through the user's
own files: helpers, constants, base classes, what is imported inside a function. What none of them
uses is left out, so a script may be edited where it only sets how long a run is. Files in
site-packages, the standard library, torch and Paceline are not the user's own. Nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import symtable
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

_MAIN = "__main__"
_FOREIGN = ("torch", "paceline")
_STANDARD = Path(sysconfig.get_paths()["stdlib"]).resolve()


@dataclass(frozen=True)
class OwnCode:
    """What a run depends on.

    Attributes:
        digests: a hash of the definitions that are used, by module.
        files: where those modules are.
        unread: names of modules without a source to compare.
    """

    digests: dict[str, str]
    files: dict[str, Path]
    unread: list[str]


def own_code(roots: Iterable[Any]) -> OwnCode:
    """The user's code that classes and functions depend on.

    Args:
        roots: the classes and functions; others' are skipped.
    """
    closure = _Closure()
    for root in roots:
        closure.add(root)
    digests, files = {}, {}
    for name, used in sorted(closure.used.items()):
        module, text = _read(name), "\n".join(f"{key}\n{used[key]}" for key in sorted(used))
        assert module is not None
        digests[module.shown] = hashlib.sha256(text.encode()).hexdigest()[:16]
        if module.file is not None:
            files[name if name != _MAIN else module.shown] = module.file
    return OwnCode(digests, files, sorted(closure.unread))


def own_file(name: str) -> Path | None:
    """The file of a module of the user's own; None for any other module.

    Args:
        name: the module's full name; it need not have been imported, and is not.
    """
    root = name.split(".")[0]
    if not root or root in sys.stdlib_module_names or root in _FOREIGN:
        return None
    held = sys.modules.get(name)
    text = getattr(held, "__file__", None) if held is not None else _origin(name)
    if not isinstance(text, str) or not text.endswith(".py"):
        return None
    path = Path(text).resolve()
    if {"site-packages", "dist-packages"}.intersection(path.parts) or _STANDARD in path.parents:
        return None
    return path


def imported_by(name: str) -> dict[str, Path]:
    """The user's own modules that a module imports, and those that these import, with their files.

    Args:
        name: the module's full name; itself and the packages above it are among them.
    """
    found: dict[str, Path] = {}
    left = [name]
    while left:
        name = left.pop()
        file = None if name in found else own_file(name)
        if file is None:
            continue
        found[name] = file
        left += [name.rpartition(".")[0]] * ("." in name)
        module = _read(name)
        for node in ast.walk(module.tree) if module is not None else ():
            if isinstance(node, ast.Import):
                left += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert module is not None
                base = module.absolute(node)
                left += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return found


@dataclass(eq=False)
class _Module:
    """A module's source, by what each of its statements binds."""

    name: str
    shown: str
    file: Path | None
    package: str
    tree: ast.Module
    bound: dict[str, list[ast.stmt]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    effects: list[ast.stmt] = field(default_factory=list)  # what binds no name

    def absolute(self, node: ast.ImportFrom) -> str:
        """The full name of the module that `from ... import` names."""
        if not node.level:
            return node.module or ""
        package = self.package.split(".")
        kept = package[: len(package) - node.level + 1]
        return ".".join([*kept, *([node.module] if node.module else [])])


class _Closure:
    """Collects definitions, and what they use, by module."""

    def __init__(self) -> None:
        self.used: dict[str, dict[str, str]] = {}
        self.unread: set[str] = set()
        self._seen: set[tuple[str, str]] = set()

    def add(self, root: Any) -> None:
        while isinstance(root, partial):
            root = root.func
        root = inspect.unwrap(getattr(root, "__func__", root))
        for owner in root.__mro__ if inspect.isclass(root) else (root,):
            name = getattr(owner, "__module__", None)
            if not isinstance(name, str) or (name != _MAIN and own_file(name) is None):
                continue
            module = _read(name)
            try:
                if module is None:
                    self.unread.add(name)
                elif found := _definition(module, owner):
                    self._visit(module, *found)
            except (SyntaxError, ValueError, RecursionError):  # nested more deeply than can be read
                self.unread.add(name)

    def _visit(self, module: _Module, node: ast.AST, enclosing: list[ast.AST]) -> None:
        """Takes in a definition or statement, and all that it uses."""
        text = ast.unparse(node)
        if (module.name, text) in self._seen:
            return
        self._seen.add((module.name, text))
        self._touch(module)[f"{type(node).__name__} {getattr(node, 'name', '')} {text}"] = text
        attributes = _attributes(node)
        for name in _globals(text):
            self._name(module, name, attributes.get(name, ()), enclosing)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                for bound in inner.names:
                    self._imported(module, inner, bound, ())

    def _touch(self, module: _Module) -> dict[str, str]:
        if module.name not in self.used:
            self.used[module.name] = {}
            for effect in module.effects if module.name != _MAIN else ():
                self._visit(module, effect, [])
        return self.used[module.name]

    def _name(
        self, module: _Module, name: str, chains: Iterable[tuple[str, ...]], within: list[ast.AST]
    ) -> bool:
        """Follows a name, first to the functions around its use, then to the module."""
        for i, function in enumerate(within):
            local = [s for s in getattr(function, "body", []) if name in _binds(s)]
            for statement in local:
                self._statement(module, statement, name, chains, within[i:])
            if local:
                return True
        for statement in module.bound.get(name, []):
            self._statement(module, statement, name, chains, [])
        if name in module.bound:
            return True
        return any(self._of(star, name) for star in module.stars)

    def _statement(
        self,
        module: _Module,
        statement: ast.stmt,
        name: str,
        chains: Iterable[tuple[str, ...]],
        within: list[ast.AST],
    ) -> None:
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            self._visit(module, statement, within)
            return
        for alias in statement.names:
            if (alias.asname or alias.name.split(".")[0]) == name:
                self._imported(module, statement, alias, chains)

    def _imported(
        self,
        module: _Module,
        node: ast.Import | ast.ImportFrom,
        alias: ast.alias,
        chains: Iterable[tuple[str, ...]],
    ) -> None:
        if isinstance(node, ast.ImportFrom):
            base = module.absolute(node)
            if alias.name == "*":
                self._whole(base)
            elif not self._of(base, alias.name):
                self._parts(f"{base}.{alias.name}", chains)
        else:
            self._parts(alias.name if alias.asname else alias.name.split(".")[0], chains)
            if not alias.asname and "." in alias.name and not chains:
                self._whole(alias.name)

    def _of(self, name: str, attribute: str) -> bool:
        """Follows a name that another module defines; whether it does."""
        module = _read(name) if own_file(name) else None
        return module is not None and self._name(module, attribute, (), [])

    def _parts(self, name: str, chains: Iterable[tuple[str, ...]]) -> None:
        """Follows what is used of a module; all of it, if that cannot be told."""
        chains = list(chains)
        if not chains:
            self._whole(name)
        for first, *rest in chains:
            if not self._of(name, first):
                self._parts(f"{name}.{first}", [tuple(rest)] if rest else [])

    def _whole(self, name: str) -> None:
        module = _read(name) if own_file(name) else None
        for statement in module.tree.body if module is not None else ():
            assert module is not None
            self._visit(module, statement, [])


def _read(name: str) -> _Module | None:
    """A module's source; None if there is none."""
    held = sys.modules.get(name)
    if name == _MAIN and getattr(held, "__file__", None) is None:
        cells = vars(held).get("In") if held is not None else None
        return (
            _parsed(name, "notebook", None, "", tuple(cells)) if isinstance(cells, list) else None
        )
    path = Path(str(getattr(held, "__file__", None))) if name == _MAIN else own_file(name)
    try:
        text = None if path is None else path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    if path is None or text is None:
        return None
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    if name == _MAIN:  # `python -m package.module`, too
        return _parsed(name, path.stem, path, getattr(held, "__package__", None) or "", (text,))
    return _parsed(name, name, path, package, (text,))


@lru_cache(maxsize=256)
def _parsed(
    name: str, shown: str, file: Path | None, package: str, texts: tuple[str, ...]
) -> _Module | None:
    body: list[ast.stmt] = []
    for text in texts:
        try:
            body += ast.parse(text).body
        except (SyntaxError, ValueError, RecursionError):  # a cell that failed, too
            if file is not None:
                return None
    tree = ast.Module(body, [])
    _drop_docstrings(tree)
    module = _Module(name, shown, file, package, tree)
    for statement in tree.body:
        names = _binds(statement)
        for one in names:
            module.bound.setdefault(one, []).append(statement)
        if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
            module.stars.append(module.absolute(statement))
        elif not names and not isinstance(statement, ast.Pass) and not _is_main_block(statement):
            module.effects.append(statement)
    for one, statements in module.bound.items():  # a cell that was run again, a redefinition
        if isinstance(statements[-1], ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            module.bound[one] = statements[-1:]
    return module


def _definition(module: _Module, owner: Any) -> tuple[ast.AST, list[ast.AST]] | None:
    """The node that defines a class or function, and the functions around it, innermost first."""
    line = getattr(getattr(owner, "__code__", None), "co_firstlineno", None)
    node: ast.AST = module.tree
    around: list[ast.AST] = []
    for part in str(getattr(owner, "__qualname__", "")).split("."):
        if part == "<locals>":
            around.insert(0, node)
        elif part == "<lambda>":
            made = [n for n in ast.walk(node) if isinstance(n, ast.Lambda) and n.lineno == line]
            return (ast.Module([ast.Expr(n) for n in made], []), around) if made else None
        else:
            named = [n for n in _within(node) if getattr(n, "name", None) == part]
            if not named:
                return None
            node = named[-1]
    return node, around


def _within(node: ast.AST) -> Iterator[ast.AST]:
    """The definitions in a body, also under `if` and `try`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _within(child)


def _binds(statement: ast.stmt) -> set[str]:
    """The names that a statement gives a value, or changes; those in its inner scopes are not."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {statement.name}
    if _is_main_block(statement):
        return set()
    names: set[str] = set()
    left: list[ast.AST] = [statement]
    while left:
        node = left.pop()
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {a.asname or a.name.split(".")[0] for a in node.names if a.name != "*"}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            root: ast.AST = node
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            names |= {root.id} if isinstance(root, ast.Name) else set()
        left += ast.iter_child_nodes(node)
    return names


def _is_main_block(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)


def _globals(text: str) -> set[str]:
    """The names that some source uses and does not bind in a scope of its own."""
    found: set[str] = set()
    left = [symtable.symtable(text, "<code>", "exec")]
    while left:
        table = left.pop()
        is_top = table.get_type() == "module"
        found |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (is_top or symbol.is_global())
        }
        left += table.get_children()
    return found


def _attributes(node: ast.AST) -> dict[str, list[tuple[str, ...]]]:
    """`helper.inner.WIDTH` and the like, by its first name; a name used by itself is left out."""
    chains: dict[str, list[tuple[str, ...]]] = {}
    alone: set[str] = set()
    left: list[ast.AST] = [node]
    while left:
        node, parts = left.pop(), []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and parts:
            chains.setdefault(inner.id, []).append(tuple(parts))
            continue
        if isinstance(inner, ast.Name):
            alone.add(inner.id)
        left += ast.iter_child_nodes(node)
    return {name: found for name, found in chains.items() if name not in alone}


def _drop_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]


def _origin(name: str) -> str | None:
    """The file that an import of a module would read."""
    path: list[str] | None = None
    origin: str | None = None
    parts = name.split(".")
    for i in range(len(parts)):
        try:
            spec = PathFinder.find_spec(".".join(parts[: i + 1]), path)
        except (ImportError, ValueError, AttributeError):
            return None
        if spec is None:
            return None
        found = spec.submodule_search_locations
        origin, path = spec.origin, None if found is None else list(found)
        if path is None and i < len(parts) - 1:
            return None
    return origin

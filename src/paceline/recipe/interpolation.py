"""What a recipe's interpolations depend on, without resolving them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Resolvers whose answer depends on their arguments and the recipe alone.
PURE = frozenset(
    ("len", "multiply", "oc.select", "oc.create", "oc.decode", "oc.dict.keys", "oc.dict.values")
)
_INTERPOLATION = re.compile(r"\$\{\s*([^${}:]*?)\s*(:[^{}]*)?\}")
_REFERENCE = re.compile(r"\$\{\s*(?:oc\.[\w.]+:)?\s*([\w.\[\]-]+)\s*[},]")
_DEEP = 20


def expanded(tree: Mapping[str, Any], path: list[str]) -> Any:
    """What stands at a path of a recipe, with the values that it refers to put in as written.

    Args:
        tree: the recipe, interpolations unresolved.
        path: the keys.

    Returns:
        The value; of a text, only the resolvers' interpolations are left.
    """
    value = _written(tree, path)
    return _expanded(value, path[:-1], tree, 0) if isinstance(value, str) else value


def resolvers_in(text: Any) -> set[str]:
    """The names of the resolvers that an expanded text calls, without those of `PURE`."""
    if not isinstance(text, str):
        return set()
    return {name for name, after in _INTERPOLATION.findall(text) if after} - PURE


def size(tree: Mapping[str, Any]) -> int:
    """The values and characters of a recipe once its references are put in; none are put in here.

    Args:
        tree: the recipe, interpolations unresolved.
    """
    return _size(tree, tree, [], {})


def _size(value: Any, tree: Any, path: list[str], known: dict[tuple[str, ...], int]) -> int:
    here = tuple(path)
    if here in known:
        return known[here]
    known[here] = 0  # within itself
    found = 1
    if isinstance(value, Mapping):
        found += sum(_size(inner, tree, [*path, str(key)], known) for key, inner in value.items())
    elif isinstance(value, list):
        found += sum(_size(inner, tree, [*path, str(i)], known) for i, inner in enumerate(value))
    elif isinstance(value, str):
        found += len(value)
        for name in _REFERENCE.findall(value):
            place = _place(name, path[:-1])
            found += _size(_written(tree, place), tree, place, known)
    known[here] = found
    return found


def _place(name: str, parent: list[str]) -> list[str]:
    """The keys that a reference names; it may begin with dots, for those around it."""
    path = [part for part in re.split(r"[.\[\]]+", name.lstrip(".")) if part]
    dots = len(name) - len(name.lstrip("."))
    return [*(parent[: len(parent) - dots + 1] if dots else []), *path]


def _written(tree: Any, path: list[str]) -> Any:
    """What the recipe has at a path; the interpolation above it, if there is one."""
    for part in path:
        if isinstance(tree, Mapping):
            tree = tree.get(part, tree.get(int(part)) if part.isdecimal() else None)
        elif isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            break
    return tree


def _expanded(text: str, parent: list[str], tree: Mapping[str, Any], depth: int) -> str:
    def put_in(match: re.Match[str]) -> str:
        name, after = match.groups()
        if after:
            return match.group()
        place = _place(name, parent)
        inner = str(_written(tree, place))
        if depth > _DEEP or "${" not in inner:
            return inner
        return _expanded(inner, place[:-1], tree, depth + 1)

    return _INTERPOLATION.sub(put_in, text)

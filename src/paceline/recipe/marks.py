"""The text of a YAML file: the line of each value, duplicate keys, and anchors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path as FilePath

import yaml

from paceline.recipe.mistakes import Path

# Deeper than any recipe; an alias that contains itself would never end.
MAX_DEPTH = 60
MOST_BYTES = 4 << 20
_MOST_VALUES = 50_000
_YAML_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_YAML_TAG}merge"  # `<<: *anchor`
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map", "merge", "timestamp", "value")
_TAGS = frozenset(_YAML_TAG + kind for kind in _KINDS)


def read_node(file: FilePath) -> yaml.Node | None:
    """A file's YAML as nodes that know their lines; None if it is empty.

    Raises:
        yaml.YAMLError, UnicodeDecodeError: the file is not YAML, no recipe has that many values, or
            it has a value or a key of a kind that recipes lack.
    """
    if file.stat().st_size > MOST_BYTES:
        raise yaml.YAMLError(f"it has more than {MOST_BYTES} bytes; no recipe is that long.")
    with file.open(encoding="utf-8") as text:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is not None and _count(node, {}) > _MOST_VALUES:
        raise yaml.YAMLError(
            f"its aliases (`*name`) make more than {_MOST_VALUES} values of it; no recipe has that "
            "many."
        )
    for each in () if node is None else _nodes(node):
        if each.tag not in _TAGS:
            written = each.tag.replace(_YAML_TAG, "!!")
            problem = f"{written} is no kind of value in a recipe: write a list or a mapping."
            raise yaml.constructor.ConstructorError(None, None, problem, each.start_mark)
        keys = [key for key, _ in each.value] if isinstance(each, yaml.MappingNode) else ()
        for key in keys:
            if key.tag == f"{_YAML_TAG}null":
                problem = "a key is empty or null: write it in quotes, or give it a name."
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
    return node


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """The values of a node with its aliases written out."""
    if id(node) not in known:
        known[id(node)] = 0  # within itself
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_count(one, known) for one in inner)
    return known[id(node)]


def mark(node: yaml.Node, path: Path, file: FilePath, marks: dict[Path, str]) -> None:
    """Records `file:line` for every value of a node.

    Args:
        node: the node.
        path: its place in the recipe.
        file: the file that it is in.
        marks: `file:line` by place; the values are added to it.
    """
    if len(path) > MAX_DEPTH:
        return
    if isinstance(node, yaml.MappingNode):
        # The mapping's own keys override merged ones.
        here: set[str] = set()
        for key, value in sorted(node.value, key=lambda pair: pair[0].tag != _MERGE):
            name = str(key.value)
            if key.tag == _MERGE:
                mark(value, path, file, marks)
            elif name not in here:  # the first of duplicate keys counts
                here.add(name)
                marks[(*path, name)] = f"{file}:{key.start_mark.line + 1}"
                mark(value, (*path, name), file, marks)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            below = (*path, str(i))
            marks[below] = f"{file}:{value.start_mark.line + 1}"
            mark(value, below, file, marks)


def drop_duplicates(node: yaml.Node, note: Callable[[Path, int, int], None]) -> None:
    """Removes duplicate keys of a mapping, except the first.

    Args:
        node: the file's root, which is changed.
        note: called with the key's path, its line and the line of the first.
    """
    seen: set[int] = set()

    def visit(node: yaml.Node, path: Path) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            kept = []
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines and key.tag != _MERGE:
                    note((*path, name), line, lines[name])
                    continue
                lines[name] = line
                kept.append((key, value))
                visit(value, (*path, name))
            node.value = kept
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                visit(value, (*path, str(i)))

    visit(node, ())


def shared_keys(root: yaml.Node | None) -> set[str]:
    """Top-level keys with an anchor that another top-level key refers to (`<<: *base`)."""
    first: dict[int, str] = {}
    shared: set[str] = set()
    if not isinstance(root, yaml.MappingNode):
        return shared
    for key, value in root.value:
        name = str(key.value)
        for node in _nodes(value):
            if first.setdefault(id(node), name) != name:
                shared.add(first[id(node)])
    return shared


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    seen: set[int] = set()
    left = [root]
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            left += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value

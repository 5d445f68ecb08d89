"""The key of processed data: everything that decides what the samples are, readable.

Two runs with equal keys have equal samples. The key is kept beside them, so that a later run whose
key differs can say what changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from paceline.errors import ConfigError, some
from paceline.runs.text import printable

_NAME_LENGTH = 16  # hexadecimal digits
NAME = re.compile(rf"[0-9a-f]{{{_NAME_LENGTH}}}")
_DIGEST = re.compile(r"(\w+:)?[0-9a-f]{16,}")
_LONGEST = 40  # characters of a value that a message shows
_MOST = 4  # changes that a message names
_MISSING = object()


def plain(value: Any, where: str = "key") -> Any:
    """A copy of nested settings as JSON has them, so that equal ones compare equal.

    Args:
        value: mappings with names as keys, lists, numbers, strings and None.
        where: the dotted path to it, for messages.

    Raises:
        ConfigError: something in it is not of these, at a path that the message names.
    """
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{where} has the key {name!r:.60}: keys are strings.")
        return {name: plain(each, f"{where}.{name}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, f"{where}.{i}") for i, each in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise ConfigError(
        f"{where} is {value!r:.60}, a {type(value).__name__}: give a finite number, a string, "
        "None, a list or a mapping of them; of anything else a digest."
    )


def name_of(key: Mapping[str, Any], form: str) -> str:
    """The name of the folder for a key.

    Args:
        key: from `plain`. The order of its names does not count, the order of lists does.
        form: the version of the files' format.
    """
    text = json.dumps([form, key], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_NAME_LENGTH]


def flat(key: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """The key's values by path; lists and empty mappings are values."""
    found: dict[tuple[str, ...], Any] = {}
    for name, value in key.items():
        if isinstance(value, Mapping) and value:
            found |= {(name, *path): each for path, each in flat(value).items()}
        else:
            found[name,] = value
    return found


def nearest(key: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one of some keys that differs in the fewest values; the first, if several do.

    Args:
        key: the key that is asked for.
        others: at least one.
    """
    wanted = flat(key)

    def distance(other: Mapping[str, Any]) -> int:
        theirs = flat(other)
        return sum(
            _differ(wanted.get(path, _MISSING), theirs.get(path, _MISSING))
            for path in {*wanted, *theirs}
        )

    return min(others, key=distance)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two keys, in one line: `template changed, max_length: 512 -> 1024`.

    Args:
        old, new: from `plain`. In "sources", each name is a source; names in "settings" are shown
            without that prefix.
    """
    return some(_differences(old, new), _MOST)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    theirs, ours = old.get("sources"), new.get("sources")
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        found += [f"source {printable(n, _LONGEST)}: new" for n in ours if n not in theirs]
        found += [f"source {printable(n, _LONGEST)}: removed" for n in theirs if n not in ours]
        both = [name for name in ours if name in theirs]
        old = {**old, "sources": {name: theirs[name] for name in both}}
        new = {**new, "sources": {name: ours[name] for name in both}}
    before, after = flat(old), flat(new)
    for path in [*after, *(path for path in before if path not in after)]:
        one, other = before.get(path, _MISSING), after.get(path, _MISSING)
        if _differ(one, other):
            found.append(_difference(path, one, other))
    return found


def _differ(one: Any, other: Any) -> bool:
    """Whether two values make different names: 1 and 1.0 do."""
    if one is _MISSING or other is _MISSING:
        return one is not other
    return json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True)


def _difference(path: tuple[str, ...], old: Any, new: Any) -> str:
    section, inside = path[0], path[1:]
    if section == "sources" and inside:
        where = f"source {inside[0]}: {'.'.join(inside[1:])}".removesuffix(": ")
    else:
        where = ".".join(inside if section == "settings" and inside else path)
    where = printable(where)
    if _is_short(old) and _is_short(new):
        return f"{where}: {_shown(old)} -> {_shown(new)}"
    return f"{where} changed"


def _is_short(value: Any) -> bool:
    """Whether people can read it at a glance."""
    if isinstance(value, str):
        return len(value) <= _LONGEST and "\n" not in value and not _DIGEST.fullmatch(value)
    return not isinstance(value, list | Mapping)


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "not set"
    return printable(value) if isinstance(value, str) else json.dumps(value)

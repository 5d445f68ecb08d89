"""Filters runs, e.g. with `val/accuracy>0.9`, and sorts them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any

from paceline.errors import ConfigError
from paceline.runs.listing import RunFolder, Value
from paceline.runs.text import printable

_FILTER = re.compile(
    r"([^=!<>~\s](?:[^=!<>~]*[^=!<>~\s])?)\s*(!=|<=|>=|=|<|>|~)\s*([^=!<>~].*|)", re.DOTALL
)
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {"<": lt, "<=": le, ">": gt, ">=": ge}
_CONSTANTS: dict[str, Value] = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Filter:
    """One condition on a run.

    Numbers are compared as numbers, anything else as text; `~` tests whether the text contains
    another, ignoring case. A run without the key does not match, whatever the operator.

    Args:
        key: a name of `RunFolder.get`.
        operator: one of = != < <= > >= ~
        wanted: the right-hand side.
    """

    key: str
    operator: str
    wanted: str

    @staticmethod
    def parse(text: str) -> Filter:
        """Parses `KEY OPERATOR VALUE`.

        Raises:
            ConfigError: the text has another form.
        """
        match = _FILTER.fullmatch(text.strip())
        if match is None:
            raise ConfigError(
                f"{printable(text)!r} is not a filter. A filter is KEY, one of = != < <= > >= ~, "
                "and a value: 'val/accuracy>0.9' (in quotes, or the shell interprets the >)."
            )
        return Filter(*match.groups())

    def matches(self, run: RunFolder) -> bool:
        """Whether a run meets the condition."""
        if self.key not in run:
            return False
        value = run.get(self.key)
        if self.operator == "~":
            return self.wanted.lower() in str(value).lower()
        if self.operator in ("=", "!="):
            return _equal(value, self.wanted) == (self.operator == "=")
        number = _number(self.wanted)
        if _is_number(value) and number is not None:
            return _ORDERS[self.operator](value, number)
        return isinstance(value, str) and _ORDERS[self.operator](value, self.wanted)


def select(
    runs: Sequence[RunFolder],
    filters: Iterable[str | Filter] = (),
    *,
    sort: str | None = None,
    reverse: bool = False,
    limit: int | None = None,
) -> list[RunFolder]:
    """The runs that meet all filters, in order.

    Args:
        runs: from `find_runs`.
        filters: e.g. `"val/accuracy>0.9"`, `"model.depth=4"`, `"name~digits"`.
        sort: a name of `RunFolder.get`, smallest first; runs without it come last. None keeps the
            order.
        reverse: reverse the order.
        limit: the most runs to return.

    Raises:
        ConfigError: a filter is malformed, or no run has its key; the message suggests the nearest
            names.
    """
    conditions = [Filter.parse(f) if isinstance(f, str) else f for f in filters]
    check_keys(runs, [c.key for c in conditions] + ([] if sort is None else [sort]))
    chosen = [run for run in runs if all(c.matches(run) for c in conditions)]
    if sort is not None:
        there = [run for run in chosen if _sortable(run.get(sort))]
        there.sort(key=lambda run: _order(run.get(sort)), reverse=reverse)
        chosen = there + [run for run in chosen if not _sortable(run.get(sort))]
    elif reverse:
        chosen.reverse()
    return chosen[:limit]


def check_keys(runs: Sequence[RunFolder], keys: Iterable[str]) -> None:
    """Checks that at least one run has each of the keys.

    Args:
        runs: the runs.
        keys: names of `RunFolder.get`.

    Raises:
        ConfigError: no run has a key; the message suggests the nearest ones.
    """
    for key in keys:
        if runs and not any(key in run for run in runs):
            known = {name for run in runs for name in (*run.values, *run.recipe)}
            near = [printable(name) for name in _nearest(key, known)]
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise ConfigError(
                f"no run here has {printable(key)!r}{hint} Names are those in run.json, of its "
                "metrics, and the recipe's dotted keys."
            )


def _nearest(key: str, known: Iterable[str]) -> list[str]:
    """The three nearest names; parts of dotted names (`lr` of `optimizer.lr`) count too."""
    parts: dict[str, list[str]] = {}
    for name in sorted(known):
        for part in {name, re.split(r"[./]", name)[-1]}:
            parts.setdefault(part, []).append(name)
    close = difflib.get_close_matches(key, parts, n=3, cutoff=0.6)
    return list(dict.fromkeys(name for part in close for name in parts[part]))[:3]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _equal(value: Value, wanted: str) -> bool:
    if wanted in _CONSTANTS:
        return value is _CONSTANTS[wanted] or value == wanted
    number = _number(wanted)
    if _is_number(value) and number is not None:
        return value == number or (math.isnan(number) and value != value)
    return str(value) == wanted


def _sortable(value: Value) -> bool:
    return value is not None and value == value


def _order(value: Any) -> tuple[bool, Any]:
    """Sorts numbers before text, which cannot be compared."""
    return (True, value) if isinstance(value, str) else (False, value)

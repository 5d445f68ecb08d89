"""The differences of two runs: settings, versions, code, seed and results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paceline.log.secrets import MASK, is_credential, mask_text
from paceline.runs.listing import RunFolder, Value, flat

_TOLD = ("seed", "world_size", "versions", "git", "hardware", "environment")


@dataclass(frozen=True)
class Difference:
    """One line of a comparison.

    Attributes:
        part: "recipe", "run" (of run.json) or "result".
        key: dotted, as in a filter.
        left, right: the two values; None also if a run does not have the key.
    """

    part: str
    key: str
    left: Value
    right: Value


def differences(left: RunFolder, right: RunFolder) -> list[Difference]:
    """Compares two runs: recipe keys and facts in `run.json` that differ, then all results.

    Results are listed even if they are equal, which is worth knowing.

    Args:
        left: a run.
        right: another run.
    """
    lines = list(_differing("recipe", left.recipe, right.recipe))
    lines += _differing("run", _facts(left), _facts(right))
    results = [{**_outcome(run), **run.metrics} for run in (left, right)]
    for key in {**results[0], **results[1]}:
        lines.append(Difference("result", key, results[0].get(key), results[1].get(key)))
    return lines


def _differing(part: str, left: dict[str, Value], right: dict[str, Value]) -> Iterator[Difference]:
    for key in {**left, **right}:
        one, other = left.get(key), right.get(key)
        if one != other or (key in left) != (key in right):
            yield Difference(part, key, _shown(key, one), _shown(key, other))


def _shown(key: str, value: Value) -> Value:
    if not isinstance(value, str):
        return value
    return MASK if is_credential(key.rpartition(".")[2]) else mask_text(value)


def _facts(run: RunFolder) -> dict[str, Value]:
    return flat({key: run.record[key] for key in _TOLD if key in run.record})


def _outcome(run: RunFolder) -> dict[str, Value]:
    named = ("status", "stopped_by", "step", "epoch", "monitor", "best", "duration")
    return {key: run.values[key] for key in named if run.values.get(key) is not None}

"""Nested settings as one level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted keys; what is no number, text or truth value as text.

    Args:
        values: mappings of any depth; None is left out.
        prefix: before each key.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            found[f"{prefix}{key}"] = value
        elif value is not None:
            found[f"{prefix}{key}"] = str(value)
    return found

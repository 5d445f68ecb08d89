"""Batches: tensors in containers of any depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def each_leaf(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The batch with what is no list, tuple or dictionary replaced by `change` of it."""
    if isinstance(batch, dict):
        return type(batch)((key, each_leaf(value, change)) for key, value in batch.items())
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(each_leaf(value, change) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(each_leaf(value, change) for value in batch)
    return change(batch)

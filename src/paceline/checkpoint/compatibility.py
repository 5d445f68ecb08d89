"""Checks that a stored state fits a model: lists every difference, casts nothing silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paceline.errors import MismatchError, counted


def check_fits(
    expected: Mapping[str, Any], stored: Mapping[str, Any], what: str = "the model"
) -> None:
    """Compares names, shapes and dtypes of two state dictionaries; other values are not compared.

    Args:
        expected: the state to load into, e.g. `model.state_dict()`.
        stored: the state about to be loaded.
        what: the name of what is being loaded, for the message.

    Raises:
        MismatchError: lists every missing or unexpected name and every different shape or dtype.
    """
    lines = [f"missing from the checkpoint: {name}" for name in expected if name not in stored]
    lines += [f"only in the checkpoint: {name}" for name in stored if name not in expected]
    for name, there in expected.items():
        got = stored.get(name, there)
        compared = isinstance(there, torch.Tensor) or isinstance(got, torch.Tensor)
        if compared and _kind(got) != _kind(there):
            lines.append(f"{name}: {_kind(got)} in the checkpoint, {_kind(there)} here")
    if lines:
        count = counted(len(lines), "difference")
        raise MismatchError(
            f"the checkpoint does not fit {what} ({count}):\n  " + "\n  ".join(lines)
        )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"a {type(value).__name__}"

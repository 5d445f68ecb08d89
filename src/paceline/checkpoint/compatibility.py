"""Checks that a stored state fits a model: lists every difference, casts nothing silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

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
    check_forms(forms_of(expected), forms_of(stored), what)


def check_forms(expected: Mapping[str, str], stored: Mapping[str, str], what: str) -> None:
    """The same of the forms that `forms_of` gives.

    Args:
        expected: of the state to load into.
        stored: of the state about to be loaded.
        what: the name of what is being loaded, for the message.

    Raises:
        MismatchError: lists every missing or unexpected name and every different shape or dtype.
    """
    lines = [f"missing from the checkpoint: {name}" for name in expected if name not in stored]
    lines += [f"only in the checkpoint: {name}" for name in stored if name not in expected]
    lines += [
        f"{name}: {stored[name]} in the checkpoint, {there} here"
        for name, there in expected.items()
        if stored.get(name, there) != there
    ]
    if lines:
        count = counted(len(lines), "difference")
        raise MismatchError(
            f"the checkpoint does not fit {what} ({count}):\n  " + "\n  ".join(lines)
        )


def forms_of(state: Mapping[str, Any]) -> dict[str, str]:
    """The form of each entry of a module's state dictionary."""
    return {name: _OWN if is_extra_state(name) else form_of(value) for name, value in state.items()}


def form_of(value: Any) -> str:
    """The dtype and shape of a tensor; of anything else, what does not change with its value."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return "no tensor"


_OWN = "the module's own"


def is_extra_state(name: str) -> bool:
    """Whether an entry is a module's extra state, whose form is for the module to judge."""
    return name.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX

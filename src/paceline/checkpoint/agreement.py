"""What the ranks of a save must agree on, and how many bytes they write together."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from paceline.errors import StateError
from paceline.world.dtensors import local_part

_ROOM = 1 << 20
"""Bytes asked for beyond the tensors, for the JSON files and the file system's own needs."""


def forms(tensors: dict[str, torch.Tensor], *, staged: bool = False) -> dict[str, str]:
    """All that a plan of who writes what depends on.

    Args:
        tensors: by name.
        staged: whether some stand for what only other ranks hold, and so know how it is spread.
    """
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)} "
        f"{'' if staged else getattr(tensor, 'placements', '')}"
        for name, tensor in tensors.items()
    }


def shared(forms_here: dict[str, str]) -> dict[str, str]:
    """The forms that must be the same on every rank."""
    return {name: form for name, form in forms_here.items() if not name.startswith("rank/")}


def digest(forms_here: dict[str, str], skeleton: Any) -> str:
    """A short text that is the same wherever the shared state looks the same."""
    return hashlib.sha256(json.dumps([shared(forms_here), skeleton]).encode()).hexdigest()


def raise_difference(parts: list[Any]) -> None:
    """Names the first place in the state where a rank differs from rank 0.

    Raises:
        StateError: there is one.
    """
    for rank, part in enumerate(parts):
        where = _difference(parts[0], part, "")
        if where is not None:
            raise StateError(
                f"rank {rank} and rank 0 differ in the state at {where.strip('.') or 'the top'}; "
                "what differs by rank belongs under the key 'rank'"
            )


def _difference(one: Any, other: Any, path: str) -> str | None:
    """The path to the first difference between two skeletons, or None."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(f"{path}.{key}", one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)) and type(one) is type(other) and len(one) == len(other):
        inside = path if isinstance(one, tuple) else f"{path}."
        pairs = [(inside, *both) for both in zip(one, other, strict=True)]
    else:
        # By repr, since a NaN is no difference.
        return None if repr(one) == repr(other) else path
    found = (_difference(a, b, where) for where, a, b in pairs)
    return next((where for where in found if where is not None), None)


def sizes(tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Bytes of what all ranks together write, and of what this one alone has to write."""
    shared = own = 0
    for name, tensor in tensors.items():
        if name.startswith("rank/"):
            own += local_part(tensor).nbytes
        else:
            shared += tensor.numel() * tensor.element_size()  # of a DTensor the whole
    return shared, own


def required_bytes(sizes: list[tuple[int, int]]) -> int:
    """Disk space for one checkpoint, from each rank's (shared, own) bytes."""
    return (sizes[0][0] + sum(own for _, own in sizes) + _ROOM) if sizes else 0


def readable_size(count: int) -> str:
    """Bytes in the largest unit that leaves a number above one."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1000:.1f} kB"

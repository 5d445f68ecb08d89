"""What the ranks of a save must agree on, and how many bytes they write together."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from paceline.errors import StateError

_ROOM = 1 << 20
"""Bytes asked for beyond the tensors, for the JSON files and the file system's own needs."""


def forms(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """What all ranks must agree on about the tensors that they share."""
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if not name.startswith("rank/")
    }


def digest(tensors: dict[str, torch.Tensor], skeleton: Any) -> str:
    return hashlib.sha256(json.dumps([forms(tensors), skeleton]).encode()).hexdigest()


def raise_difference(parts: list[Any]) -> None:
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
    """Bytes of what every rank has alike, and of what this one alone has to write."""
    shared = own = 0
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            own += tensor.to_local().nbytes
        elif name.startswith("rank/"):
            own += tensor.nbytes
        else:
            shared += tensor.nbytes
    return shared, own


def required_bytes(sizes: list[tuple[int, int]]) -> int:
    return (sizes[0][0] + sum(own for _, own in sizes) + _ROOM) if sizes else 0


def readable_size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1000:.1f} kB"

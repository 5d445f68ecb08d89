"""What the ranks of a save must agree on, and how many bytes they write in total."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from paceline.errors import StateError
from paceline.world.dtensors import local_part

_ROOM = 1 << 20
"""Bytes required beyond the tensors, for the JSON files and the file system's own needs."""


def forms(tensors: dict[str, torch.Tensor], *, staged: bool = False) -> dict[str, str]:
    """The dtype, shape and placements of each tensor, on which the plan of a save depends.

    Args:
        tensors: by name.
        staged: whether some tensors are placeholders for those of other pipeline stages; their
            placements are not known here, so none are compared.
    """
    return {
        name: f"{tensor.dtype} {tuple(tensor.shape)} "
        f"{'' if staged else getattr(tensor, 'placements', '')}"
        for name, tensor in tensors.items()
    }


def shared(forms_here: dict[str, str]) -> dict[str, str]:
    """The forms that must be equal on every rank."""
    return {name: form for name, form in forms_here.items() if not name.startswith("rank/")}


def digest(forms_here: dict[str, str], skeleton: Any) -> str:
    """A hash that is equal on ranks whose shared state has the same structure.

    Args:
        forms_here: `forms` of this rank's tensors.
        skeleton: the state without its tensors, as `encode` returns it.
    """
    return hashlib.sha256(json.dumps([shared(forms_here), skeleton]).encode()).hexdigest()


def raise_difference(parts: list[Any]) -> None:
    """Names the first place in the state where a rank differs from rank 0.

    Raises:
        StateError: a rank differs.
    """
    for rank, part in enumerate(parts):
        where = _difference(parts[0], part, "")
        if where is not None:
            raise StateError(
                f"rank {rank} and rank 0 differ in the state at {where.strip('.') or 'the top'}; "
                "what differs by rank is saved in on_save_checkpoint, under "
                'state["rank"][str(trainer.world.rank)].'
            )


def _difference(one: Any, other: Any, path: str) -> str | None:
    """The path to the first difference between two skeletons, or None."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(f"{path}.{key}", one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)) and type(one) is type(other) and len(one) == len(other):
        inside = path if isinstance(one, tuple) else f"{path}."
        pairs = [(inside, *both) for both in zip(one, other, strict=True)]
    else:
        # By repr, since two NaNs are equal here.
        return None if repr(one) == repr(other) else path
    found = (_difference(a, b, where) for where, a, b in pairs)
    return next((where for where in found if where is not None), None)


def sizes(tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Bytes that all ranks write together, and bytes that this rank writes for itself alone."""
    shared = own = 0
    for name, tensor in tensors.items():
        if name.startswith("rank/"):
            own += local_part(tensor).nbytes
        else:
            shared += tensor.numel() * tensor.element_size()  # for a DTensor, the whole tensor
    return shared, own


def required_bytes(sizes: list[tuple[int, int]]) -> int:
    """Disk space for one checkpoint, from each rank's (shared, own) bytes."""
    return (sizes[0][0] + sum(own for _, own in sizes) + _ROOM) if sizes else 0


def readable_size(count: int) -> str:
    """A number of bytes as text, in the largest unit that gives at least one."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1000:.1f} kB"

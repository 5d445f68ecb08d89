"""Exact comparison of state trees."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def differing(left: Any, right: Any, path: str) -> list[str]:
    """The paths at which two state trees are not the same, tensors and arrays compared by bytes.

    Args:
        left: containers of tensors of any shape and of plain values.
        right: the other tree; of a tensor that it has on the meta device, only dtype and shape
            count, since its values are on other ranks.
        path: of the two trees themselves.

    Returns:
        Paths with their keys separated by slashes, in the order of `left`.
    """
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        alike = (left.dtype, left.shape) == (right.dtype, right.shape)
        if alike and right.is_meta:
            return []
        return [] if alike and torch.equal(_bytes(left), _bytes(right)) else [path]
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [*left, *(key for key in right if key not in left)]
        return [
            found
            for key in keys
            for found in (
                differing(left[key], right[key], f"{path}/{key}")
                if key in left and key in right
                else [f"{path}/{key}"]
            )
        ]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            return [path]
        pairs = enumerate(zip(left, right, strict=True))
        return [found for i, (a, b) in pairs for found in differing(a, b, f"{path}/{i}")]
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        alike = (left.dtype, left.shape) == (right.dtype, right.shape)
        return [] if alike and left.tobytes() == right.tobytes() else [path]
    return [] if repr(left) == repr(right) else [path]  # NaN equals NaN, and 1 is not 1.0


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

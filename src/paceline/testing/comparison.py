"""Exact comparison of what runs leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.log.sinks import METRICS_FILE
from paceline.world.dtensors import local_part


def bits(tree: Any) -> Any:
    """A tree with each tensor or array replaced by dtype, shape and bytes: `==` is exact then.

    Args:
        tree: containers of tensors and arrays of any shape, e.g. `model.state_dict()`.

    Returns:
        Dictionaries and lists of the same form. Of a tensor that is sharded over ranks, the bytes
        are those of this rank's part; of one on the meta device there are none.
    """
    if isinstance(tree, torch.Tensor):
        part = local_part(tree.detach())
        known = part.numel() > 0 and not part.is_meta
        flat = part.cpu().contiguous().reshape(-1) if known else None
        raw = b"" if flat is None else flat.view(torch.uint8).numpy().tobytes()
        return (str(tree.dtype), tuple(tree.shape), raw)
    if isinstance(tree, np.ndarray):
        return (str(tree.dtype), tree.shape, tree.tobytes())
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [bits(value) for value in tree]
    return tree


def rows(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, in order.

    Args:
        run_dir: the run's folder.

    Raises:
        FileNotFoundError: the run has written none.
    """
    return [json.loads(line) for line in (Path(run_dir) / METRICS_FILE).read_text().splitlines()]


def first_difference(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> str | None:
    """The first row in which two runs' metrics differ, in words; None if all are equal.

    Args:
        left: the rows of one run, in order.
        right: those of the other.
    """
    for one, other in zip(left, right, strict=False):
        if repr(one) != repr(other):  # NaN is equal to NaN here
            names = [key for key in {**one, **other} if repr(one.get(key)) != repr(other.get(key))]
            pairs = (f"{key} {one.get(key)} != {other.get(key)}" for key in names)
            return f"step {one.get('step')}: " + ", ".join(pairs)
    if len(left) != len(right):
        return f"{len(left)} rows != {len(right)} rows"
    return None

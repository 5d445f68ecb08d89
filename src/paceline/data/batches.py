"""Batches: tensors in containers of any depth. Moving, counting and describing them."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from paceline.errors import DataError

_TARGETS = ("labels", "targets")


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """What a model takes of a batch, and what the loss compares its outputs with.

    Args:
        batch: a pair, or a mapping: its "labels" or "targets" are the targets, and what else is in
            it the inputs, a dictionary.

    Raises:
        DataError: it is neither.
    """
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[0], batch[1]
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        found = [key for key in _TARGETS if key in batch]
        if len(found) == 1:
            (name,) = found
            return {key: value for key, value in batch.items() if key != name}, batch[name]
        kind += f" with {', '.join(map(repr, batch)) or 'nothing in it'}"
    elif isinstance(batch, (list, tuple)):
        kind += f" of {len(batch)}"
    raise DataError(
        "a batch is a pair (inputs, targets), or a mapping with either 'labels' or 'targets'; this "
        f"one is a {kind}. Have collate_fn make such a batch, or, without parallel.pipeline, "
        "override loss(batch)."
    )


def inputs_of(batch: Any) -> Any:
    """What a model takes of a batch that may be without targets.

    Args:
        batch: as for `inputs_and_targets`; or inputs alone, also as a list of one.
    """
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        return batch[0]
    pair = isinstance(batch, (list, tuple)) and len(batch) == 2
    labelled = isinstance(batch, Mapping) and any(key in batch for key in _TARGETS)
    return inputs_and_targets(batch)[0] if pair or labelled else batch


def each_leaf(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Replaces what is no list, tuple, dictionary or dataclass in a batch.

    Args:
        batch: lists, tuples, dictionaries and dataclasses of any depth.
        change: gives what takes a leaf's place.

    Returns:
        The batch, in containers of the same types.
    """
    if isinstance(batch, dict) or (isinstance(batch, UserDict) and not hasattr(batch, "to")):
        changed = ((key, each_leaf(value, change)) for key, value in batch.items())
        if type(batch) is dict:
            return dict(changed)
        other = copy.copy(batch)  # with what its type has beside the items, as a default
        other.update(list(changed))
        return other
    if is_dataclass(batch) and not isinstance(batch, type) and not hasattr(batch, "to"):
        other = copy.copy(batch)
        for each in fields(batch):
            if hasattr(batch, each.name):
                value = each_leaf(getattr(batch, each.name), change)
                object.__setattr__(other, each.name, value)  # it may be frozen
        return other
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(each_leaf(value, change) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(each_leaf(value, change) for value in batch)
    return change(batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """Moves every tensor in a batch, and every object with a method `to`.

    Args:
        batch: tensors and other objects, in lists, tuples and dictionaries of any depth.
        device: where they go; nothing waits for the copies.

    Returns:
        The batch, in containers of the same types.
    """

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.to(device, non_blocking=True)
        return leaf.to(device) if hasattr(leaf, "to") else leaf

    return each_leaf(batch, move)


def samples_in(batch: Any) -> int:
    """The number of samples in a batch, as far as it can be told: what progress and rows show."""
    try:
        return count_first_dimension(batch)
    except DataError:
        if isinstance(batch, (list, tuple)) and _lists_samples(batch):
            return len(batch)
        found = next(_tensors(batch), None)
        return 1 if found is None else found.shape[0]


def count_first_dimension(batch: Any) -> int:
    """The leading dimension that the tensors of a batch share: its number of samples.

    Raises:
        DataError: they share none, or it is a list that may be one of samples.
    """
    if isinstance(batch, torch.Tensor) and batch.dim():
        return batch.shape[0]
    own = {tensor.shape[0] for tensor in _tensors(batch, below=False)}
    sizes = own or {tensor.shape[0] for tensor in _tensors(batch)}
    listed = type(batch) is list and _lists_samples(batch)
    if len(sizes) == 1 and not listed:
        return sizes.pop()
    if listed:
        what = f"may be a list of {len(batch)} samples, or of {len(batch)} tensors of a batch each"
    elif sizes:
        what = f"holds tensors with the leading dimensions {', '.join(map(str, sorted(sizes)))}"
    else:
        what = "holds no tensor with a leading dimension"
    raise DataError(
        f"cannot count the items of a batch of type {type(batch).__name__}, which {what}: override "
        "count_items(batch), e.g. to return its number of samples."
    )


def stacked_by_torch(loader: Any) -> bool:
    """Whether a loader makes its batches with torch's own `default_collate`.

    The leading dimension of each of their tensors is then the number of samples.
    """
    batched = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        batched = loader.batch_size is not None
    return batched and loader.collate_fn is default_collate


def first_dimension(batch: Any) -> int:
    """The leading dimension of the first tensor in a batch, or -1."""
    found = next(_tensors(batch), None)
    return -1 if found is None else found.shape[0]


def _lists_samples(batch: list[Any] | tuple[Any, ...]) -> bool:
    """Whether the parts of a batch are so much alike that each may be a sample."""
    if len(batch) < 2:
        return False
    if all(isinstance(part, torch.Tensor) for part in batch):
        return len({part.shape for part in batch}) == 1
    return all(isinstance(part, (Mapping, list, tuple)) or is_dataclass(part) for part in batch)


def _tensors(batch: Any, *, below: bool = True) -> Iterator[torch.Tensor]:
    """The tensors in a batch that have a leading dimension.

    Args:
        batch: tensors in containers of any depth.
        below: also those within a list or tuple that is itself part of the batch.
    """
    if isinstance(batch, torch.Tensor):
        if batch.dim():
            yield batch
        return
    values = batch.values() if isinstance(batch, Mapping) else batch
    if is_dataclass(batch) and not isinstance(batch, type):
        values = [getattr(batch, each.name) for each in fields(batch)]
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        return
    for value in values:
        if below or not isinstance(value, (list, tuple)):
            yield from _tensors(value, below=below)


def describe(batch: Any) -> str:
    """A batch in a few words: types, shapes and dtypes."""
    if isinstance(batch, torch.Tensor):
        return f"{tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        return f"{type(batch).__name__}[" + ", ".join(map(describe, batch[:8])) + "]"
    return type(batch).__name__

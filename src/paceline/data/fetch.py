"""From positions to a batch: each sample under its own random stream, then collation."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset, default_collate

from paceline.errors import DataError
from paceline.world.seeding import mix, random_state, same_state, seed_everything, stream

# What one micro-batch asks for: runs of units (sample indices) with the pass they belong to.
Request = Sequence[tuple[int, Sequence[Any]]]
_FEW = 64  # parts in a list; longer ones hold data


class Fetcher(Dataset):
    """Reads a request from a map-style dataset, in this process or in a loader's worker.

    Before each sample the generators of torch, numpy and `random` are seeded from (seed, pass,
    index), so that augmentation does not depend on the worker, the batch or what was read before.
    Collation gets one stream per batch. A plain TensorDataset draws nothing and is indexed a batch
    at a time. One with `__getitems__` is asked for a batch at a time as long as that draws nothing,
    then for one sample after the other. Its `set_epoch` is called once a pass in each worker.

    Args:
        dataset: the user's map-style dataset.
        collate: turns the list of samples into a batch.
        seed: the run's seed.
        label: the family of streams ("sample" for training, "val-sample" for validation).
        single: the dataset's items are already batches (a loader with batch_size=None).
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[Any], Any],
        seed: int,
        label: str,
        *,
        single: bool = False,
    ) -> None:
        self.dataset = dataset
        self._key = stream(seed, label)
        self._single = single
        self.take(collate)
        # Subset offers __getitems__ only as a loop over items, which would share one stream.
        self._many = callable(getattr(dataset, "__getitems__", None)) and not isinstance(
            dataset, torch.utils.data.Subset
        )
        self._draws = False  # random numbers, within `__getitems__`
        self._told = -1  # the pass that the dataset was told last
        self._by_pass = told_of_passes(dataset, Dataset) if label == "sample" else []

    def take(self, collate: Callable[[Any], Any]) -> None:
        """Collates with a function from now on: a loader's may be replaced between passes."""
        self._collate = collate
        self._whole = type(self.dataset) is TensorDataset and collate is default_collate

    def __call__(self, request: Request) -> Any:
        """The batch, in this process."""
        if self._whole:
            return self._index_whole(request)
        return self.collate(self.__getitems__(request))

    def __getitems__(self, request: Request) -> Any:
        """The samples; torch's DataLoader calls this method to get a batch from a dataset."""
        samples: Any = []
        first = None
        for pass_, units in request:
            if self._by_pass and pass_ != self._told:
                self._told = tell_pass(self._by_pass, pass_)
            indices = plain(units)
            key = mix(self._key, pass_)
            if self._many and not self._single:
                several = self._several(key, list(indices))
                samples = several if len(request) == 1 else samples + _listed(several)
            else:
                for index in indices:
                    seed_sample(key, index)
                    samples.append(self.dataset[index])
            first = mix(key, _number(indices[0])) if first is None else first
        if self._collate is not default_collate:  # which draws nothing
            seed_everything(mix(first or 0, 1))
        return samples

    def _several(self, key: int, indices: list[Any]) -> Any:
        """What the dataset's `__getitems__` gives, with a stream for each sample if it draws."""
        if not self._draws:
            seed_everything(mix(key, _number(indices[0])))
            before = random_state()
            samples = self.dataset.__getitems__(indices)
            # What is no list of samples is a batch already, whose streams nobody can tell apart.
            alone = len(indices) == 1 or not isinstance(samples, list)
            if alone or len(samples) != len(indices) or same_state(before, random_state()):
                return samples
            self._draws = True
        samples = []
        for index in indices:
            seed_everything(mix(key, _number(index)))
            samples += self.dataset.__getitems__([index])
        return samples

    def collate(self, samples: Any) -> Any:
        """Collates samples into a batch."""
        return self._collate(samples[0] if self._single else samples)

    def _index_whole(self, request: Request) -> list[torch.Tensor]:
        # By way of numpy, which turns a list of numbers into an array 4 times as fast as torch.
        if len(request) == 1:
            index = torch.from_numpy(np.asarray(request[0][1]))
        else:
            index = torch.from_numpy(np.concatenate([run for _, run in request]))
        return [tensor.index_select(0, index) for tensor in self.dataset.tensors]


def _listed(samples: Any) -> list[Any]:
    """Samples that share a batch with others, of another pass."""
    if isinstance(samples, list):
        return samples
    raise DataError(
        f"__getitems__ of the dataset gives a {type(samples).__name__}, and this batch has samples "
        "of two passes (epoch_length): give a list of samples, and join them in collate_fn."
    )


def told_of_passes(thing: Any, kind: type) -> list[Any]:
    """What has a `set_epoch` among a thing and what it is made of: a sampler in a batch sampler.

    Args:
        thing: a dataset or sampler.
        kind: of its parts; those of another kind count if they have a `set_epoch` themselves.
    """
    return [part for part in parts_of(thing, kind) if callable(getattr(part, "set_epoch", None))]


def tell_pass(listeners: Iterable[Any], pass_: int) -> int:
    """Calls `set_epoch` of each.

    Args:
        listeners: from `told_of_passes`.
        pass_: the pass that begins, which is returned.
    """
    for listener in listeners:
        listener.set_epoch(pass_)
    return pass_


def parts_of(thing: Any, kind: type) -> list[Any]:
    """A thing, and what of a kind is among its attributes, theirs and so on; the innermost last.

    Args:
        thing: a dataset or sampler.
        kind: of its parts. Attributes may hold them in lists, tuples or dictionaries.
    """
    found: list[Any] = []
    ahead = [thing]
    while ahead:
        part = ahead.pop()
        if any(part is other for other in found):
            continue
        found.append(part)
        for value in vars(part).values() if hasattr(part, "__dict__") else ():
            held = value.values() if isinstance(value, dict) else value
            several = isinstance(value, (list, tuple, dict)) and len(value) <= _FEW
            ahead += [each for each in (held if several else (value,)) if _is_part(each, kind)]
    return found


def _is_part(value: Any, kind: type) -> bool:
    if kind is not Dataset and isinstance(value, Dataset):
        return False  # a sampler's view of the data, which their own reader tells
    return isinstance(value, kind) or callable(getattr(type(value), "set_epoch", None))


def plain(units: Sequence[Any]) -> Sequence[Any]:
    """Units as they are handed to a dataset and shown to a user: indices as Python's integers."""
    return units.tolist() if isinstance(units, np.ndarray) else units


def seed_sample(key: int, index: Any) -> None:
    """Seeds the CPU generators for one sample.

    Args:
        key: a hash of the seed, the family of streams and the pass.
        index: the sample's index.
    """
    seed = mix(key, index if type(index) is int else _number(index))
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def _number(index: Any) -> int:
    """An integer for a sample's index; for keys of other types, a hash of their text."""
    if hasattr(index, "__index__"):
        return operator.index(index)
    text = hashlib.blake2b(str(index).encode(), digest_size=8)
    return int.from_bytes(text.digest(), "little")

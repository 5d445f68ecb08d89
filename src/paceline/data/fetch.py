"""From positions to a batch: each sample under its own random stream, then collation."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset, default_collate

from paceline.world.seeding import mix, seed_everything, stream

# What one micro-batch asks for: runs of units (sample indices) with the pass they belong to.
Request = Sequence[tuple[int, Sequence[Any]]]


class Fetcher(Dataset):
    """Reads a request from a map-style dataset, in this process or in a loader's worker.

    Before each sample the generators of torch, numpy and `random` are seeded from (seed, pass,
    index), so that augmentation does not depend on the worker, the batch or what was read before.
    Collation gets one stream per batch. A plain TensorDataset draws nothing and is indexed a batch
    at a time.

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
        self._dataset = dataset
        self._collate = collate
        self._key = stream(seed, label)
        self._single = single
        self._whole = type(dataset) is TensorDataset and collate is default_collate
        # Subset offers __getitems__ only as a loop over items, which would share one stream.
        self._many = hasattr(dataset, "__getitems__") and not isinstance(
            dataset, torch.utils.data.Subset
        )

    def __call__(self, request: Request) -> Any:
        """The batch, in this process."""
        if self._whole:
            return self._index_whole(request)
        return self.collate(self.__getitems__(request))

    def __getitems__(self, request: Request) -> list[Any]:
        """The samples; torch's DataLoader calls this method to get a batch from a dataset."""
        samples: list[Any] = []
        first = None
        for pass_, units in request:
            indices = plain(units)
            key = mix(self._key, pass_)
            if self._many and not self._single:
                seed_everything(mix(key, _number(indices[0])))
                samples.extend(self._dataset.__getitems__(list(indices)))
            else:
                for index in indices:
                    seed_sample(key, index)
                    samples.append(self._dataset[index])
            first = mix(key, _number(indices[0])) if first is None else first
        if self._collate is not default_collate:  # which draws nothing
            seed_everything(mix(first or 0, 1))
        return samples

    def collate(self, samples: list[Any]) -> Any:
        """Collates samples into a batch."""
        return self._collate(samples[0] if self._single else samples)

    def _index_whole(self, request: Request) -> list[torch.Tensor]:
        # By way of numpy, which turns a list of numbers into an array 4 times as fast as torch.
        if len(request) == 1:
            index = torch.from_numpy(np.asarray(request[0][1]))
        else:
            index = torch.from_numpy(np.concatenate([run for _, run in request]))
        return [tensor.index_select(0, index) for tensor in self._dataset.tensors]


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

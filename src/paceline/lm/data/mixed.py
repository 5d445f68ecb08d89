"""Samples of several stores, read as one."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from paceline.lm.data.mixing import mix
from paceline.lm.data.packing import lengths_of
from paceline.lm.data.sample import Sample


class MixedSamples(Sequence[Sample]):
    """The samples of several sources, each as often as its weight says, interleaved.

    Args:
        stores: the samples of each source, by its name.
        weights: of each source; 2 has each sample twice.
        seed: decides which samples a fraction of a weight takes.

    Attributes:
        lengths: tokens of each sample, [samples] int64.
    """

    def __init__(
        self, stores: Mapping[str, Sequence[Sample]], weights: Sequence[float], seed: int
    ) -> None:
        self.stores = dict(stores)
        self._weights, self._seed = list(weights), seed
        each = [lengths_of(store) for store in self.stores.values()]
        self._parts = list(self.stores.values())
        self._ends = list(accumulate(map(len, each)))
        self._indices = mix([len(lengths) for lengths in each], weights, seed=seed)
        empty = np.zeros(0, np.int64)
        self.lengths = np.concatenate([empty, *each])[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = int(self._indices[index])
        part = bisect.bisect_right(self._ends, at)
        return self._parts[part][at - (self._ends[part - 1] if part else 0)]

    def run_identity(self) -> dict[str, Any]:
        """What each source says of itself, the weights and the seed."""
        said: dict[str, Any] = {"weights": list(self._weights), "seed": self._seed}
        for name, store in self.stores.items():
            say = getattr(store, "run_identity", None)
            if callable(say):
                found: Any = say()
                said |= {f"{name}.{key}": value for key, value in found.items()}
        return said

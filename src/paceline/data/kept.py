"""What a loader's objects keep from one pass over the data to the next.

These are random generators, and the states of samplers and datasets that have a `state_dict`.
Workers have copies of their own, which nobody can ask.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any

import numpy as np
import torch

_PARTS = ("dataset", "sampler", "batch_sampler", "collate_fn")
_INNER = ("dataset", "datasets", "sampler")
_MOST = 100  # longer containers are not searched
_LEFT_ALONE = (type, torch.Tensor, np.ndarray, str, bytes, int, float, ModuleType)


class Kept:
    """What some of a loader's objects keep.

    Args:
        loader: whose attributes are searched.
        parts: which of them: "loader" for its own generators, and those in `_PARTS`.
        depth: how far into what objects hold generators are looked for.
    """

    def __init__(
        self, loader: Any, parts: Collection[str] = ("loader", *_PARTS), depth: int = 3
    ) -> None:
        self._depth = depth
        self._takers: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {}
        self._seen: set[int] = set()
        self._searched: dict[int, int] = {}  # the least depth at which an object was searched
        if "loader" in parts:
            self._add_generators("loader", loader, depth)
        for part in _PARTS:
            if part in parts:
                self._add(part, getattr(loader, part, None))

    @property
    def names(self) -> list[str]:
        """Where each of them is, e.g. "dataset.rng"."""
        return list(self._takers)

    def state(self) -> dict[str, Any]:
        """A copy of what they keep now, by name."""
        return {name: copy.deepcopy(give()) for name, (give, _) in self._takers.items()}

    def load(self, state: dict[str, Any], *, generators_only: bool = False) -> None:
        """Gives it back.

        Args:
            state: as `state` gave it; what is no longer there is passed over.
            generators_only: leave out objects with a `state_dict`.
        """
        for name, (_, take) in self._takers.items():
            if name in state and not (generators_only and name.endswith(_OWN)):
                take(copy.deepcopy(state[name]))

    def _add(self, name: str, thing: Any) -> None:
        if thing is None or id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        if hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict"):
            self._takers[name + _OWN] = (thing.state_dict, thing.load_state_dict)
            return
        self._add_generators(name, thing)
        for part in _INNER:
            inner = getattr(thing, part, None)
            for i, each in enumerate(inner if isinstance(inner, (list, tuple)) else [inner]):
                self._add(f"{name}.{part}.{i}" if each is not inner else f"{name}.{part}", each)

    def _add_generators(self, name: str, thing: Any, depth: int = 0) -> None:
        """Those among an object's attributes, and in what these hold, such as transforms."""
        held = getattr(thing, "__dict__", {})
        if isinstance(thing, (list, tuple, dict)):
            items = thing.items() if isinstance(thing, dict) else enumerate(thing)
            held = {str(key): value for key, value in items} if len(thing) <= _MOST else {}
        for attribute, value in held.items():
            takers = _generator(value)
            if id(value) in self._seen:
                continue
            if takers is not None:
                self._seen.add(id(value))
                self._takers[f"{name}.{attribute}"] = takers
            elif isinstance(value, _LEFT_ALONE):
                continue
            elif depth < self._searched.get(id(value), self._depth):
                self._searched[id(value)] = depth
                self._add_generators(f"{name}.{attribute}", value, depth + 1)


_OWN = " state_dict"


def _generator(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How a random generator gives its state, and takes it back; None for anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, np.random.Generator):
        bits: Any = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    if isinstance(value, np.random.RandomState):
        return lambda: value.get_state(legacy=False), value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    return None


def generators_in(thing: Any) -> Kept:
    """The random generators among an object's own attributes."""
    return Kept(thing, ("loader",), 0)


def alike(one: Any, other: Any) -> bool:
    """Whether two states are equal, tensors and arrays by their values.

    Args:
        one, other: dictionaries, lists and tuples of tensors, arrays and plain values.
    """
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return type(one) is type(other) and np.array_equal(np.asarray(one), np.asarray(other))
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(alike(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return (
            isinstance(other, (list, tuple))
            and len(one) == len(other)
            and all(map(alike, one, other))
        )
    return one == other

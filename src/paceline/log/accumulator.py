"""Means over items, kept on the device until a row is due."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch

from paceline.errors import MetricError

_PACK = 1024  # separate values per name on a device, each of which takes an allocator block


class Accumulator:
    """Sums of value x weight and of weight, by name; a metric is their quotient.

    Sums are sequential and in double precision, so that neither a checkpoint nor the number of
    steps per row changes a bit of them. On a CPU each value is read at once, which is free there;
    on an accelerator values stay on the device until `sums` reads all of them together.

    Args:
        reads_are_free: whether reading a tensor does not wait for a device.
    """

    def __init__(self, *, reads_are_free: bool) -> None:
        self._reads_are_free = reads_are_free
        self._sums: dict[str, list[float]] = {}
        self._held: dict[str, Held] = {}

    def add(self, name: str, value: Any, weight: Any = 1.0) -> None:
        """Adds one value.

        Args:
            name: the metric's name.
            value: a number or a tensor of one element: a mean over `weight` items.
            weight: the number of items, a number or a tensor of one element.

        Raises:
            MetricError: the value is not a real number, or the weight no number of items.
        """
        if isinstance(value, torch.Tensor):
            if value.numel() != 1 or value.is_complex():
                raise MetricError(
                    f"log({name!r}, ...) got a tensor of shape {tuple(value.shape)} and dtype "
                    f"{value.dtype}; a logged value is one real number. Take its mean() first."
                )
            if not self._reads_are_free:
                self._hold(name, value, weight)
                return
            value = value.item()
        elif not isinstance(value, numbers.Real):
            raise MetricError(
                f"log({name!r}, ...) got {value!r} of type {type(value).__name__}; a logged value "
                "is a number or a tensor of one element."
            )
        if isinstance(weight, torch.Tensor):
            if not self._reads_are_free:
                self._hold(name, value, weight)
                return
            weight = weight.item()
        try:
            self._add(name, float(value), float(weight))
        except (TypeError, ValueError, OverflowError) as error:
            raise MetricError(
                f"log({name!r}, ...) got {value!r:.40} with the weight {weight!r:.40}: each is a "
                "number that a float can hold."
            ) from error

    def sums(self) -> dict[str, tuple[float, float]]:
        """(sum of value x weight, sum of weight) by name. Waits for the device."""
        for name in list(self._held):
            self._read(name)
        return {name: (total, weight) for name, (total, weight) in self._sums.items()}

    def reset(self) -> None:
        """Clears all sums, after a row."""
        self._sums.clear()
        self._held.clear()

    def state_dict(self) -> dict[str, Any]:
        """The open sums, for a checkpoint between two rows."""
        return {name: list(pair) for name, pair in self.sums().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.reset()
        self._sums.update({name: list(pair) for name, pair in state.items()})

    def _add(self, name: str, value: float, weight: float) -> None:
        if weight == 0:
            return
        if not 0 < weight < math.inf:
            raise MetricError(
                f"log({name!r}, ...) got the weight {weight}: it is a number of items, not below 0."
            )
        pair = self._sums.get(name)
        if pair is None:
            self._sums[name] = [value * weight, weight]
        else:
            pair[0] += value * weight
            pair[1] += weight

    def _hold(self, name: str, value: Any, weight: Any) -> None:
        held = self._held.get(name)
        if held is None:
            held = self._held[name] = Held()
        held.add(value, weight)

    def _read(self, name: str) -> None:
        for value, weight in self._held.pop(name).read():
            self._add(name, float(value), float(weight))


class Held:
    """Values and weights in the order in which they were added, until the device is read."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._weights: list[Any] = []
        self._loose = 0

    def add(self, value: Any, weight: Any) -> None:
        """Adds a value and its weight.

        Args:
            value: a number, or a tensor of one element, which is copied.
            weight: likewise.
        """
        self._values.append(_own(value))
        self._weights.append(_own(weight))
        self._loose += 1
        if self._loose == _PACK:
            self._values, self._weights = _packed(self._values), _packed(self._weights)
            self._loose = 0

    def read(self) -> Iterator[tuple[Any, Any]]:
        """All pairs as numbers; they are kept. Waits for the device."""
        return zip(_numbers(self._values), _numbers(self._weights), strict=True)


def _own(value: Any) -> Any:
    """A number as it is, or a copy of a tensor with one dimension, which nothing else changes."""
    return value.detach().reshape(1).clone() if isinstance(value, torch.Tensor) else value


def _packed(values: list[Any]) -> list[Any]:
    """The same values with neighbouring tensors of one dtype concatenated."""
    packed: list[Any] = []
    for dtype, run in groupby(values, key=lambda value: getattr(value, "dtype", None)):
        same = list(run)
        packed += same if dtype is None else [torch.cat(same)]
    return packed


def _numbers(values: list[Any]) -> list[Any]:
    """The values on the host; waits for the device once, not once per value."""
    numbers: list[Any] = []
    for value in _packed(values):
        numbers += value.tolist() if isinstance(value, torch.Tensor) else [value]
    return numbers


def merge(parts: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Each name's mean over the items of all parts (ranks), in rank order.

    Args:
        parts: `Accumulator.sums` of each rank; a rank that logged no value of a name has no entry.
    """
    totals: dict[str, list[float]] = {}
    for part in parts:
        for name, (total, weight) in part.items():
            pair = totals.setdefault(name, [0.0, 0.0])
            pair[0] += total
            pair[1] += weight
    return {name: total / weight for name, (total, weight) in sorted(totals.items())}

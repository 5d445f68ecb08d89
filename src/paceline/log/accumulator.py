"""Means over items, kept on the device until a row is due."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch

from paceline.errors import MetricError

_PACK = 1024  # values a name that stand alone on a device, where each takes a block of its own


class Accumulator:
    """Sums of value x weight and of weight, by name; a metric is their quotient.

    Sums are sequential and in double precision, so that neither saving in between nor the number
    of steps a row spans changes a bit of it. On a CPU each value is read as it comes, which is
    free there; on an accelerator values stay where they are until `sums` reads them all at once.

    Args:
        reads_are_free: whether reading a tensor waits for no device.
    """

    def __init__(self, *, reads_are_free: bool) -> None:
        self._reads_are_free = reads_are_free
        self._sums: dict[str, list[float]] = {}
        self._held: dict[str, Held] = {}

    def add(self, name: str, value: Any, weight: Any = 1.0) -> None:
        """Adds one value.

        Args:
            name: of the metric.
            value: a number or a tensor of one element: a mean over `weight` items.
            weight: items behind the value, a number or a tensor of one element.

        Raises:
            MetricError: the value is not a real number.
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
        except (TypeError, ValueError) as error:
            raise MetricError(
                f"log({name!r}, ...) got the weight {weight!r}: no number."
            ) from error

    def sums(self) -> dict[str, tuple[float, float]]:
        """(sum of value x weight, sum of weight) by name; this is where a device is waited for."""
        for name in list(self._held):
            self._read(name)
        return {name: (total, weight) for name, (total, weight) in self._sums.items()}

    def reset(self) -> None:
        """Starts anew, after a row."""
        self._sums.clear()
        self._held.clear()

    def state_dict(self) -> dict[str, Any]:
        """The open sums, for a checkpoint between two rows."""
        return {name: list(pair) for name, pair in self.sums().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.reset()
        self._sums.update({name: list(pair) for name, pair in state.items()})

    def _add(self, name: str, value: float, weight: float) -> None:
        if weight == 0:
            return
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
    """Values and weights in the order in which they came, until a device is read.

    Either may be numbers or tensors of one element, which are copied.
    """

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._weights: list[Any] = []
        self._loose = 0

    def add(self, value: Any, weight: Any) -> None:
        """Holds one more of each."""
        self._values.append(_own(value))
        self._weights.append(_own(weight))
        self._loose += 1
        if self._loose == _PACK:
            self._values, self._weights = _packed(self._values), _packed(self._weights)
            self._loose = 0

    def read(self) -> Iterator[tuple[Any, Any]]:
        """All of them as numbers; they stay held. Waits for the device."""
        return zip(_numbers(self._values), _numbers(self._weights), strict=True)


def _own(value: Any) -> Any:
    """A copy of a tensor, as one of one dimension, which may be changed by nobody; or a number."""
    return value.detach().reshape(1).clone() if isinstance(value, torch.Tensor) else value


def _packed(values: list[Any]) -> list[Any]:
    """The same with neighbouring tensors of one dtype joined into one."""
    packed: list[Any] = []
    for dtype, run in groupby(values, key=lambda value: getattr(value, "dtype", None)):
        same = list(run)
        packed += same if dtype is None else [torch.cat(same)]
    return packed


def _numbers(values: list[Any]) -> list[Any]:
    """The values on the host; one wait for the device, not one a value."""
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

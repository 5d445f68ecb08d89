"""Means over items, kept on the device until a row is due."""

from __future__ import annotations

import numbers
from typing import Any

import torch

from paceline.errors import MetricError

_FOLD = 1024  # values held a name on a device, so that memory stays bounded without reading it


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
        self._held: dict[str, list[tuple[Any, Any]]] = {}

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
                self._hold(name, value.detach().clone(), weight)
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
        self._add(name, float(value), float(weight))

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
        held = self._held.setdefault(name, [])
        held.append((value, weight))
        if len(held) >= _FOLD:
            self._fold(held)

    def _fold(self, held: list[tuple[Any, Any]]) -> None:
        values, weights = _stack([v for v, _ in held]), _stack([w for _, w in held])
        weight = weights.sum()
        held[:] = [((values * weights).sum() / weight, weight)]

    def _read(self, name: str) -> None:
        held = self._held.pop(name)
        values = _stack([value for value, _ in held]).tolist()
        weights = _stack([weight for _, weight in held]).tolist()
        for value, weight in zip(values, weights, strict=True):
            self._add(name, value, weight)


def _stack(values: list[Any]) -> torch.Tensor:
    """One double tensor of numbers and one-element tensors."""
    device = next((v.device for v in values if isinstance(v, torch.Tensor)), None)
    return torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=device).reshape(()) for v in values]
    )


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

"""How far a run is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch


def as_number(count: Any) -> Any:
    """A count as a plain number: an int if it is whole. Waits for the device of a tensor."""
    number = count.item() if isinstance(count, torch.Tensor) else count
    return int(number) if number == int(number) else number


_PASSING = frozenset({"local_batches", "epoch_ends"})  # what is no part of the state


@dataclass
class Progress:
    """The counters of a run; they move only between windows.

    Attributes:
        epoch: epochs done.
        global_step: windows (optimizer steps) done.
        begun: whether `on_train_epoch_start` has been called for the present epoch.
        batch: micro-batches of this rank done in the present epoch.
        samples: samples of all ranks seen.
        items: items of all ranks seen (samples, label tokens, ... as `count_items` counts).
        validated_at: `global_step` at the last validation.
        pending: parts of the boundary after the last window that a stop left undone.
        ended_by: why training is over, or None while it is not.
        skips: global steps whose windows are passed over (after a rewind).
        empty_epochs: epochs done that had no window.
        metrics: the last validation's metrics.
        rates: the learning rates of the last window, one a parameter group, by optimizer.
        local_batches: batches this process has trained on since it started; no part of the state.
        epoch_ends: whether the boundary at hand is the epoch's last; no part of the state.
    """

    epoch: int = 0
    global_step: int = 0
    begun: bool = False
    batch: int = 0
    samples: Any = 0
    items: Any = 0
    validated_at: int = -1
    pending: list[str] = field(default_factory=list)
    ended_by: str | None = None
    skips: list[int] = field(default_factory=list)
    empty_epochs: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    rates: dict[str, list[Any]] = field(default_factory=dict)
    local_batches: int = 0
    epoch_ends: bool = False

    @property
    def place(self) -> int:
        """Windows and empty epochs done: by it `stop.py` numbers where a run can stop."""
        return self.global_step + self.empty_epochs

    def state_dict(self) -> dict[str, Any]:
        """Every counter, as plain numbers."""
        rates = {name: list(map(float, rates)) for name, rates in self.rates.items()}
        counts = {"samples": int(self.samples), "items": as_number(self.items)}
        state = {**asdict(self), **counts, "rates": rates}
        return {name: value for name, value in state.items() if name not in _PASSING}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        # Older checkpoints do not say all of it.
        state = {"begun": state["batch"] > 0, "empty_epochs": 0, **state}
        for name in {*self.__dataclass_fields__} - _PASSING:
            setattr(self, name, state[name])

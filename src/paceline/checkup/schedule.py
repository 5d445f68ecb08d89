"""The learning rates that a run will have, and a plot of them in characters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.trainer.optimization import takes_metric

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

_MOST = 1_000_000  # the most steps of a schedule to compute: about ten seconds
_HEIGHT = 9
_LABEL = 9  # characters of "1.00e-03" and a space


@dataclass(frozen=True)
class Schedule:
    """An optimizer's learning rates over the run.

    Attributes:
        optimizer: its name.
        unit: the unit of the index, "optimizer steps" or "epochs".
        rates: of the first parameter group, one per unit, beginning with the first step.
        note: why `rates` is shorter than the run, or empty.
    """

    optimizer: str
    unit: str
    rates: list[float]
    note: str = ""

    @property
    def peak(self) -> int:
        """The first index of the highest rate."""
        return max(range(len(self.rates)), key=self.rates.__getitem__)


def schedules_of(trainer: Trainer) -> list[Schedule]:
    """The rates of each optimizer, computed by stepping copies of its schedulers.

    Args:
        trainer: one whose run has been started, so that its length is known.
    """
    unit = "epochs" if trainer.lr_scheduler_interval == "epoch" else "optimizer steps"
    length = trainer.epochs if unit == "epochs" else trainer.training_horizon
    found = []
    for name, optimizer in trainer.named_optimizers().items():
        own = [s for s in (trainer.named_schedulers() or {}).values() if s.optimizer is optimizer]
        start = float(optimizer.param_groups[0]["lr"])
        if any(takes_metric(s) for s in own):
            found.append(Schedule(name, unit, [start], "it follows a metric"))
        elif length is None:
            found.append(Schedule(name, unit, [start], "the run's length is not known in advance"))
        else:
            note = f"the first {_MOST:,} of {length:,}" if length > _MOST else ""
            found.append(Schedule(name, unit, _stepped(optimizer, own, min(length, _MOST)), note))
    return found


def _stepped(optimizer: Any, schedulers: list[Any], length: int) -> list[float]:
    if not schedulers:
        return [float(optimizer.param_groups[0]["lr"])] * length
    # The copies share the parameters, which do not change.
    shared = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    schedulers = copy.deepcopy(schedulers, shared)
    group = schedulers[0].optimizer.param_groups[0]
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer steps in between
        for step in range(length):
            rates.append(float(group["lr"]))
            if step < length - 1:
                for scheduler in schedulers:
                    scheduler.step()
    return rates


def plot(rates: Sequence[float], unit: str, *, width: int = 80, ascii: bool = False) -> list[str]:
    """The lines of a plot of learning rates, from zero to the highest.

    Args:
        rates: at least one.
        unit: written below the axis.
        width: characters per line.
        ascii: use ASCII characters only.
    """
    dot, wall, corner, floor = ("*", "|", "+", "-") if ascii else ("•", "│", "└", "─")
    columns = min(width - _LABEL - 1, max(len(rates), 2))
    top = max(rates) or 1.0
    rows = [[" "] * columns for _ in range(_HEIGHT)]
    for column in range(columns):
        first = column * len(rates) // columns
        last = max(first + 1, (column + 1) * len(rates) // columns)
        levels = [round(rate / top * (_HEIGHT - 1)) for rate in rates[first:last]]
        for level in range(max(0, min(levels)), max(levels) + 1):
            rows[_HEIGHT - 1 - level][column] = dot
    labels = {0: top, _HEIGHT // 2: top / 2, _HEIGHT - 1: 0.0}
    lines = [
        f"{f'{labels[i]:.2e} ' if i in labels else '':>{_LABEL}}{wall}{''.join(row).rstrip()}"
        for i, row in enumerate(rows)
    ]
    lines.append(f"{'':>{_LABEL}}{corner}{floor * columns}")
    end = f"{len(rates):,} {unit}"
    lines.append(f"{'':>{_LABEL}} 0{end:>{max(columns - 1, len(end) + 1)}}")
    return lines

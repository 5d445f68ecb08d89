"""OverfitDetection: warns when the training loss falls while the validation loss rises."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.errors import ConfigError
from paceline.trainer.callback import Callback
from paceline.trainer.monitor import metric_of

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

_CLEAR = 2.0  # a slope has to exceed this many of its standard errors


class OverfitDetection(Callback):
    """Warns, once per episode, when the training loss falls while the validation loss rises.

    Each validation gives a point: its loss, and the mean training loss over the items of the rows
    since the previous validation. Over the last `window` points a line is fitted to each loss by
    least squares. The model overfits while the training line falls and the validation line rises,
    each by more than two standard errors of its slope. (A stricter rule, that the losses fall and
    rise from every point to the next, is broken by any noise; the signs of the slopes alone are
    right by chance in one of four windows of losses that do not change.)

    Validation rows get `overfit/gap_ratio`, the validation loss divided by the training loss, if
    the latter is positive. The callback never stops a run; `EarlyStopping` does.

    Args:
        window: validations to which the lines are fitted, at least 3.
        warmup: validations before the first possible warning.
        train: the training loss's name in the rows.
        val: the validation loss's name.

    Raises:
        ConfigError: an argument is out of range.
        MetricError: a validation lacks the loss; the message lists the metrics it has.
    """

    # Before callbacks that only read rows, e.g. the progress display.
    priority = 50

    def __init__(
        self,
        window: int = 5,
        warmup: int = 5,
        *,
        train: str = "train/loss",
        val: str = "val/loss",
    ) -> None:
        if window < 3 or warmup < 0:
            raise ConfigError(
                f"OverfitDetection(window={window}, warmup={warmup}): expected at least 3 and 0"
            )
        self.window = window
        self.warmup = warmup
        self.train = train
        self.val = val
        self._forget()

    def _forget(self) -> None:
        self._points: list[list[float]] = []  # training and validation loss of each validation
        self._validations = 0
        self._sum = self._items = 0.0  # of the rows since the last validation
        self._counted = 0.0  # the run's items at the last row
        self._warned = False  # of this episode, or of a loss that is missing

    def on_setup(self, trainer: Trainer) -> None:
        """Resets the points."""
        self._forget()

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Adds a row's training loss to the open mean."""
        if not metrics:
            return
        items, self._counted = metrics["items"] - self._counted, metrics["items"]
        if self.train in metrics:
            self._sum += metrics[self.train] * items
            self._items += items

    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Adds the gap to the row, and checks the window."""
        val = metric_of(metrics, self.val)
        self._validations += 1
        if not self._items:
            if not self._warned:
                trainer.say(
                    f"OverfitDetection: no row with {self.train!r} comes before the validation: "
                    "have rows at least as often as validations (log_every)."
                )
            self._warned = True
            return
        train = self._sum / self._items
        self._sum = self._items = 0.0
        if train > 0:
            metrics["overfit/gap_ratio"] = val / train
        if not (math.isfinite(train) and math.isfinite(val)):
            return
        self._points = [*self._points, [train, val]][-self.window :]
        overfits = self._overfits()
        if overfits and not self._warned:
            (first, before), (last, now) = self._points[0], self._points[-1]
            trainer.say(
                f"overfitting: over the last {self.window} validations the training loss fell "
                f"({first:.4g} to {last:.4g}) while {self.val} rose ({before:.4g} to {now:.4g})."
            )
        self._warned = overfits

    def _overfits(self) -> bool:
        if len(self._points) < self.window or self._validations <= self.warmup:
            return False
        train, val = zip(*self._points, strict=True)
        return trend(train) == -1 and trend(val) == 1

    def state_dict(self) -> dict[str, Any]:
        """The window's points, the open sums and whether it has warned."""
        return {
            "points": [list(point) for point in self._points],
            "validations": self._validations,
            "open": [self._sum, self._items, self._counted],
            "warned": self._warned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._points = [list(point) for point in state["points"]]
        self._validations, self._warned = state["validations"], state["warned"]
        self._sum, self._items, self._counted = state["open"]


def trend(values: Any) -> int:
    """Whether the least-squares line through the values rises or falls clearly.

    Clearly means by more than two standard errors of the slope, which are
    sqrt(sum of squared residuals / (n - 2) / sum of squared x).

    Args:
        values: at least 3, equally spaced.

    Returns:
        1 if the line rises, -1 if it falls, else 0.
    """
    y = np.asarray(values, float)
    y = y - y[0]  # so that constant values are exactly zero
    x = np.arange(len(y)) - (len(y) - 1) / 2
    y = y - y.mean()
    slope = float((x * y).sum() / (x * x).sum())
    residuals = y - slope * x
    error = math.sqrt(float((residuals**2).sum() / (len(y) - 2) / (x * x).sum()))
    return 0 if abs(slope) <= _CLEAR * error else (1 if slope > 0 else -1)

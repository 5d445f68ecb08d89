"""OverfitDetection: says when training still improves and validation gets worse."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.errors import ConfigError
from paceline.trainer.callback import Callback
from paceline.trainer.monitor import metric_of

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

_CLEAR = 2.0  # standard errors from which on a slope is one


class OverfitDetection(Callback):
    """Warns, once an episode, of a training loss that falls while the validation loss rises.

    Each validation gives a point: its loss, and the mean training loss over the items of the rows
    since the validation before. A line is fitted to either by least squares over the last `window`
    points. It is overfitting while the training line falls and the validation line rises, each by
    more than two standard errors of its slope. (Losses that fall and rise strictly from point to
    point, as some define it, are interrupted by any noise; signs of slopes alone are right by
    chance in every fourth window of losses that stand still.)

    Rows of validations get `overfit/gap_ratio`, the validation loss over the training loss, where
    that is positive. It never stops a run; `EarlyStopping` does.

    Args:
        window: validations to which the lines are fitted, at least 3.
        warmup: validations before the first that may be warned of.
        train: the training loss's name in the rows.
        val: the validation loss's name.

    Raises:
        ConfigError: an argument is out of its range.
        MetricError: a validation has no such loss; those that it has are listed.
    """

    # Before those that only watch, e.g. the progress display.
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
        """Forgets an earlier run."""
        self._forget()

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Takes a row's training loss."""
        if not metrics:
            return
        items, self._counted = metrics["items"] - self._counted, metrics["items"]
        if self.train in metrics:
            self._sum += metrics[self.train] * items
            self._items += items

    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Adds the gap to the row, and looks at the window."""
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
        """The window's points, the open sums and what has been said."""
        return {
            "points": [list(point) for point in self._points],
            "validations": self._validations,
            "open": [self._sum, self._items, self._counted],
            "warned": self._warned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._points = [list(point) for point in state["points"]]
        self._validations, self._warned = state["validations"], state["warned"]
        self._sum, self._items, self._counted = state["open"]


def trend(values: Any) -> int:
    """1 if the least-squares line through the values clearly rises, -1 if it falls, or else 0.

    Clearly is by more than two standard errors of the slope, which is
    sqrt(sum of squared residuals / (n - 2) / sum of squared x).

    Args:
        values: at least 3, at equal distances.
    """
    y = np.asarray(values, float)
    y = y - y[0]  # so that what stands still is zero exactly
    x = np.arange(len(y)) - (len(y) - 1) / 2
    y = y - y.mean()
    slope = float((x * y).sum() / (x * x).sum())
    residuals = y - slope * x
    error = math.sqrt(float((residuals**2).sum() / (len(y) - 2) / (x * x).sum()))
    return 0 if abs(slope) <= _CLEAR * error else (1 if slope > 0 else -1)

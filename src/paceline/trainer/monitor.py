"""Which validation was the best, and how long ago that was."""

from __future__ import annotations

import math
from typing import Any, Literal

from paceline.errors import ConfigError, MetricError, nearest


class MetricMonitor:
    """Watches one validation metric.

    Args:
        metric_name: the metric's key among the validation's metrics.
        mode: whether lower ("min") or higher ("max") is better.
        min_delta: by how much a value must beat the best to count, in the metric's own unit.
        relative: `min_delta` is a fraction of the best's magnitude instead: the margin is
            min_delta * |best|, which has the right sign for negative values, and is none at zero.

    Attributes:
        best_value: the best so far, None before the first.
        worse_count: validations since the best.
    """

    def __init__(
        self,
        metric_name: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        min_delta: float = 0.0,
        relative: bool = False,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"MetricMonitor(mode={mode!r}): mode is 'min' or 'max'.")
        if not min_delta >= 0:
            raise ConfigError(f"MetricMonitor(min_delta={min_delta!r}): it may not be negative.")
        self.metric_name = metric_name
        self.mode = mode
        self.min_delta = min_delta
        self.relative = relative
        self.reset()

    def reset(self) -> None:
        """Forgets every validation: a run begins."""
        self.best_value: float | None = None
        self.worse_count = 0

    def __call__(self, metrics: dict[str, float]) -> bool:
        """Takes a validation's metrics; returns whether it is the best so far. NaN never is.

        Raises:
            MetricError: the metric is not among them, nor was it ever; those that are get listed.
        """
        if self.is_left_out(metrics):
            return False
        value = metric_of(metrics, self.metric_name)
        improved = not math.isnan(value) and (
            self.best_value is None
            or (self.mode == "min" and value < self.best_value - self._margin(self.best_value))
            or (self.mode == "max" and value > self.best_value + self._margin(self.best_value))
        )
        if improved:
            self.best_value, self.worse_count = value, 0
        else:
            self.worse_count += 1
        return improved

    def score(self, metrics: dict[str, float]) -> dict[str, Any] | None:
        """The metric, its mode and its value, by which checkpoints are ranked; None without one.

        Args:
            metrics: of a validation.
        """
        value = metrics.get(self.metric_name, math.nan)
        if math.isnan(value):
            return None
        return {"metric": self.metric_name, "mode": self.mode, "value": float(value)}

    def is_left_out(self, metrics: dict[str, float]) -> bool:
        """Whether this validation leaves out the metric that earlier ones measured.

        It then counts for nothing: neither as better nor as worse.
        """
        measured = self.best_value is not None or self.worse_count > 0
        return measured and self.metric_name not in metrics

    def _margin(self, best: float) -> float:
        if math.isinf(best):
            return 0.0  # whatever is finite beats it
        return self.min_delta * abs(best) if self.relative else self.min_delta

    def state_dict(self) -> dict[str, Any]:
        """The best value and the count since."""
        return {"best_value": self.best_value, "worse_count": self.worse_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.best_value, self.worse_count = state["best_value"], state["worse_count"]


def watched_by(monitor: MetricMonitor) -> str:
    """What a monitor watches, in words: another metric's best says nothing of this one's."""
    return f"{monitor.metric_name} ({monitor.mode})"


def metric_of(metrics: dict[str, float], name: str) -> float:
    """A validation's metric by its name.

    Args:
        metrics: the validation's metrics.
        name: the metric's name.

    Raises:
        MetricError: there is no such metric; the message lists those that there are.
    """
    if name not in metrics:
        raise MetricError(
            f"the monitored metric {name!r} is not among the validation's metrics"
            f"{nearest(name, metrics) or '.'} There is: {', '.join(sorted(metrics)) or 'none'}. "
            "Log it in validation_step, return it from get_val_metrics, or monitor another "
            "(MetricMonitor(metric_name=...), EarlyStopping(monitor=...))."
        )
    return float(metrics[name])

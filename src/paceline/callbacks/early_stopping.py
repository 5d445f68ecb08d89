"""EarlyStopping: ends training when a validation metric has stopped to improve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from paceline.errors import ConfigError
from paceline.trainer.callback import Callback
from paceline.trainer.monitor import MetricMonitor

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class EarlyStopping(Callback):
    """Ends training after `patience` validations in a row that bring nothing better.

    It is the Trainer's own `early_stop=patience` for a metric of its own: there the metric is the
    one that also chooses the best checkpoint (`metric_monitor`); here it may be any, and several of
    these may watch several metrics, the first to run out of patience ending the run. Both compare
    with the same `MetricMonitor` and both end a run as complete, with `stopped_by="early stop"`.
    Use `early_stop` where one metric does for both.

    The count and the best value are saved. A run that has ended and is started again with more
    patience goes on. NaN is never better. The metric is reduced over all ranks before it comes
    here, so that every rank decides the same.

    Args:
        monitor: the metric's key among the validation's metrics.
        mode: whether lower ("min") or higher ("max") is better.
        patience: validations, not epochs.
        min_delta: by how much a value must beat the best to count, in the metric's own unit.
        relative: `min_delta` is a fraction of the best value's magnitude (see `MetricMonitor`).

    Raises:
        ConfigError: an argument is out of its range; or, as the run starts, nothing is validated.
        MetricError: at the first validation without the metric; those that it has are listed.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 10,
        min_delta: float = 0.0,
        relative: bool = False,
    ) -> None:
        if patience < 1:
            raise ConfigError(f"EarlyStopping(patience={patience!r}): must be at least 1")
        self.patience = patience
        self._monitor = MetricMonitor(monitor, mode, min_delta, relative)

    @property
    def out_of_patience(self) -> bool:
        """Whether `patience` validations have brought nothing better."""
        return self._monitor.worse_count >= self.patience

    def on_setup(self, trainer: Trainer) -> None:
        """Forgets an earlier run's validations."""
        if not trainer.has_validation:
            raise ConfigError(
                "EarlyStopping: nothing is ever validated without a val_dataloader or an "
                "evaluate() of the trainer's own."
            )
        self._monitor.reset()

    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Counts the validation, and says so if it was one too many."""
        monitor = self._monitor
        monitor(metrics)
        if self.out_of_patience:
            trainer.say(
                f"early stop: {monitor.metric_name} has not improved in {monitor.worse_count} "
                f"validations; the best was {monitor.best_value}."
            )

    def state_dict(self) -> dict[str, Any]:
        """The best value and the validations since."""
        return self._monitor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._monitor.load_state_dict(state)

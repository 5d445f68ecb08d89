"""EarlyStopping: ends training when a validation metric no longer improves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from paceline.errors import ConfigError
from paceline.trainer.callback import Callback
from paceline.trainer.checks import never_measured
from paceline.trainer.monitor import MetricMonitor, watched_by

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


_PATIENCE = 10


class EarlyStopping(Callback):
    """Ends training after `patience` validations in a row without improvement.

    The Trainer's own `early_stop=patience` watches the metric that also chooses the best checkpoint
    (`metric_monitor`). This callback watches any metric; several of them may watch several metrics,
    and the first to run out of patience ends the run. Both compare with a `MetricMonitor` and both
    end a run as complete, with `stopped_by="early stop"`. Use `early_stop` if one metric serves
    both purposes.

    The count and the best value are saved. A finished run that is started again with more patience
    continues. NaN is never an improvement. The metric is already reduced over all ranks, so every
    rank decides the same.

    Args:
        monitor: the metric's key among the validation's metrics. A number here is the patience, and
            what follows the mode is `min_delta`: `EarlyStopping(3, "min", 1e-4)` watches
            "val/loss".
        mode: whether lower ("min") or higher ("max") is better.
        patience: validations, not epochs.
        min_delta: the least improvement on the best value that counts, in the metric's own unit.
        relative: `min_delta` is a fraction of the best value's magnitude (see `MetricMonitor`).

    Raises:
        ConfigError: an argument is out of range or, at the start of the run, there is no
            validation, or none that will measure the metric.
        MetricError: a validation lacks the metric; the message lists the metrics it has.
    """

    def __init__(
        self,
        monitor: str | int = "val/loss",
        mode: Literal["min", "max"] = "min",
        patience: int | float = _PATIENCE,
        min_delta: float = 0.0,
        relative: bool = False,
    ) -> None:
        if not isinstance(monitor, str):
            third = min_delta if patience == _PATIENCE else patience
            monitor, patience, min_delta = "val/loss", monitor, third
        if type(patience) is not int or patience < 1:
            raise ConfigError(
                f"EarlyStopping(patience={patience!r}): must be a whole number of at least 1"
            )
        self.patience = patience
        self._monitor = MetricMonitor(monitor, mode, min_delta, relative)
        # By it the checkpoint finds the state of the same metric again.
        self.name = self.name or f"{type(self).__name__} {watched_by(self._monitor)}"

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` validations brought no improvement."""
        return self._monitor.worse_count >= self.patience

    def on_setup(self, trainer: Trainer) -> None:
        """Resets the count and the best value."""
        if not trainer.has_validation:
            raise ConfigError(
                "EarlyStopping: nothing is ever validated without a val_dataloader or an "
                "evaluate() of the trainer's own."
            )
        if wrong := never_measured(trainer, self._monitor.metric_name):
            raise ConfigError(f"EarlyStopping: {wrong[0]}")
        self._monitor.reset()

    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Counts the validation, and prints a line when patience runs out."""
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
        """Restores what `state_dict` returned."""
        self._monitor.load_state_dict(state)

"""ExitStep: leaves a run after a step, saved, for whoever debugs or measures it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError
from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class ExitStep(Callback):
    """Stops the run after exactly this step; the next start resumes it.

    Unlike `max_steps` it is no part of the run's length: schedules do not see it, and a resumed run
    may have another one or none. A run that is started again at or behind `step` stops at once.

    Args:
        step: the last optimizer step, counted from the run's beginning.
        this_run: how many optimizer steps to take in this start.

    Raises:
        ConfigError: neither is given, or one is not positive.
    """

    def __init__(self, step: int | None = None, *, this_run: int | None = None) -> None:
        if not any((step, this_run)) or any(n is not None and n < 1 for n in (step, this_run)):
            raise ConfigError(
                f"ExitStep(step={step}, this_run={this_run}): give a number of steps, 1 or more, "
                "for one of them or both."
            )
        self.step, self.this_run = step, this_run
        self._began_at = 0

    def on_train_start(self, trainer: Trainer) -> None:
        """Stops at once if the run is there already."""
        self._began_at = trainer.global_step
        self._check(trainer)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Stops behind the step."""
        self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        done = trainer.global_step
        if self.step is not None and done >= self.step:
            reason = "exit_step"
        elif self.this_run is not None and done - self._began_at >= self.this_run:
            reason = "exit_step_this_run"
        else:
            return
        horizon = trainer.training_horizon
        if horizon is None or done < horizon:  # a run that is complete just ends
            # Every rank asks in this same window, so that all stop at this very step.
            trainer.stop_agreement.request(reason, everywhere=True)

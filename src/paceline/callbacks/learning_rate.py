"""LearningRate: puts the learning rate of each parameter group into every row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.trainer.callback import Callback
from paceline.trainer.recorder import group_rates

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class LearningRate(Callback):
    """Adds the rate of every parameter group to each row of training steps.

    Without it a row has the rate of an optimizer's first group, as `lr` (`lr/<optimizer>` if there
    are several optimizers), and those of all its groups where they differ, with the group's own
    `name`, or else its index, appended: `lr/backbone`, `lr/1`. With it they are in every row, for a
    column without gaps. They are the rates with which the row's step was taken.
    """

    # Before callbacks that only read rows, e.g. the progress display.
    priority = 50

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Adds the rates to the row, if there is one."""
        if not metrics:
            return
        optimizers = trainer.named_optimizers()
        for name, rates in trainer.progress.rates.items():
            if len(rates) > 1:
                metrics.update(group_rates(name, optimizers, rates))

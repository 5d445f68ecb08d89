"""LearningRate: puts the learning rate of each parameter group into the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.trainer.callback import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class LearningRate(Callback):
    """Adds the rate of every parameter group to the rows of training steps.

    Each row already has the rate of an optimizer's first group, as `lr` (`lr/<optimizer>` if there
    are several optimizers). For optimizers with several groups this adds one value per group, with
    the group's own `name`, or else its index, appended: `lr/backbone`, `lr/1`. Like `lr`, these are
    the rates with which the row's step was taken.
    """

    # Before callbacks that only read rows, e.g. the progress display.
    priority = 50

    def __init__(self) -> None:
        self._groups: list[tuple[str, str, int]] = []  # name in the row, optimizer, group

    def on_train_start(self, trainer: Trainer) -> None:
        """Names the groups."""
        optimizers = dict(trainer.named_optimizers())
        self._groups = [
            (f"lr/{name}/{label}" if len(optimizers) > 1 else f"lr/{label}", name, index)
            for name, optimizer in optimizers.items()
            if len(optimizer.param_groups) > 1
            for index, label in enumerate(_labels(optimizer.param_groups))
        ]

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Adds the rates to the row, if there is one."""
        if metrics:
            rates = trainer.progress.rates
            metrics.update((name, float(rates[of][index])) for name, of, index in self._groups)


def _labels(groups: list[dict[str, Any]]) -> list[str]:
    return [str(group.get("name", index)) for index, group in enumerate(groups)]

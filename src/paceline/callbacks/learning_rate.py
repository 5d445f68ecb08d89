"""LearningRate: puts the learning rate of each parameter group into the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.trainer.events import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class LearningRate(Callback):
    """Adds the rate of every parameter group to the rows of training steps.

    Each row has the rate of an optimizer's first group anyway, as `lr` (`lr/<optimizer>` if there
    are several). This adds, for optimizers with several groups, one value a group, with the
    group's own `name` or else its index appended: `lr/backbone`, `lr/1`. Like `lr` they are the
    rates as the schedulers have left them after the row's step.
    """

    # Before those that only watch, e.g. the progress display.
    priority = 50

    def __init__(self) -> None:
        self._groups: list[tuple[str, dict[str, Any]]] = []

    def on_train_start(self, trainer: Trainer) -> None:
        """Settles the names."""
        optimizers = dict(trainer.named_optimizers())
        self._groups = [
            (f"lr/{name}/{label}" if len(optimizers) > 1 else f"lr/{label}", group)
            for name, optimizer in optimizers.items()
            if len(optimizer.param_groups) > 1
            for label, group in _labelled(optimizer.param_groups)
        ]

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Adds the rates to the row, if there is one."""
        if metrics:
            metrics.update((name, float(group["lr"])) for name, group in self._groups)


def _labelled(groups: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(str(group.get("name", index)), group) for index, group in enumerate(groups)]

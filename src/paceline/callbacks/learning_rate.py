"""LearningRate: puts the learning rate of each optimizer and parameter group into the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.trainer.events import Callback

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class LearningRate(Callback):
    """Logs the rate which the step of each metrics row was taken with.

    The name is `lr`; with several optimizers `lr/<optimizer>`. An optimizer with several parameter
    groups has one rate a group: the group's own `name`, or else its index, is appended.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def on_train_start(self, trainer: Trainer) -> None:
        """Settles the names."""
        optimizers = dict(trainer.named_optimizers())
        self._names = {
            id(optimizer): "lr" if len(optimizers) == 1 else f"lr/{name}"
            for name, optimizer in optimizers.items()
        }

    def on_before_optimizer_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Logs the rates, if a row follows this step."""
        # Once a row: a row holds means over its steps, and a mean of rates is a rate nobody used.
        if (trainer.global_step + 1) % trainer.log_every:
            return
        stem, groups = self._names[id(optimizer)], optimizer.param_groups
        for index, group in enumerate(groups):
            name = stem if len(groups) == 1 else f"{stem}/{group.get('name', index)}"
            trainer.log(name, group["lr"])

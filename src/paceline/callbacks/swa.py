"""SWA: the plain mean of the weights over the last part of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from paceline.callbacks.exchanged_weights import note_batch_norm
from paceline.callbacks.weight_average import WeightAverage
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


class SWA(WeightAverage):
    """Stochastic weight averaging: the equal mean of weights taken from `start` on, every `every`.

    After n updates the average is the mean of n sets of weights, kept as
    `average <- average + (weights - average) / n`. Source: Izmailov et al., "Averaging Weights
    Leads to Wider Optima and Better Generalization", UAI 2018, algorithm 1. The learning rate of
    that phase (constant or cyclic in the paper) is left to the scheduler, e.g. torch's `SWALR` in a
    `SequentialLR`.

    See `WeightAverage` for what is averaged and where it is kept. Before the first update
    validations use the trained weights.

    BatchNorm's statistics are those of the trained weights, in validations too; the plan has a line
    about it. The paper recomputes them at the end by a pass over the data. Do so yourself, on a
    model that no run uses: `model.load_state_dict(swa.averaged_state_dict())`, then
    `update_bn(loader, model)` of `torch.optim.swa_utils`.

    Args:
        start: the first step or epoch whose weights enter the mean.
        every: steps or epochs between updates.
        unit: what `start` and `every` count: "step" (optimizer steps) or "epoch" (each as long
            as its pass over the data turns out to be).
        evaluate: validate with the averaged weights (and so choose the best checkpoint by them).

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        start: int,
        every: int = 1,
        *,
        unit: Literal["step", "epoch"] = "step",
        evaluate: bool = True,
    ) -> None:
        if start < 1 or every < 1:
            raise ConfigError(f"SWA(start={start}, every={every}): each must be at least 1")
        if unit not in ("step", "epoch"):
            raise ConfigError(f"SWA(unit={unit!r}): expected 'step' or 'epoch'")
        super().__init__(evaluate=evaluate)
        self.start = start
        self.every = every
        self.unit = unit
        self._counted = 0  # epochs that have ended, the last of which may still be validated

    def on_setup(self, trainer: Trainer) -> None:
        """Allocates the average's tensors."""
        super().on_setup(trainer)
        self._counted = 0
        note_batch_norm(trainer, "the average")

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Updates the average, if it counts steps and an update is due."""
        if self.unit == "step":
            super().on_step_end(trainer, metrics)

    def on_validation_start(self, trainer: Trainer) -> None:
        """Updates the average at an epoch's end, and swaps it in."""
        self._count_epoch(trainer)
        super().on_validation_start(trainer)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Updates the average, unless the validation before has done so."""
        self._count_epoch(trainer)

    def _count_epoch(self, trainer: Trainer) -> None:
        done = trainer.current_epoch + 1
        if self.unit == "epoch" and trainer.progress.epoch_ends and done != self._counted:
            self._counted = done
            if self._is_due(done):
                self._update()

    def _is_due(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0

    def state_dict(self) -> dict[str, Any]:
        """What `WeightAverage` keeps, and the epochs counted."""
        return {**super().state_dict(), "epochs": self._counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        super().load_state_dict(state)
        self._counted = state.get("epochs", 0)

    def _share(self) -> float:
        return 1.0 / (self._updates + 1)

    def _is_of_use(self) -> bool:
        return self._updates > 0

"""SWA: the plain mean of the weights over the last part of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

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
        unit: what `start` and `every` count: "step" (optimizer steps) or "epoch".
        evaluate: validate with the averaged weights (and so choose the best checkpoint by them).

    Raises:
        ConfigError: an argument is out of range or, at the start of the run, `unit` is "epoch" but
            the length of an epoch is unknown until the data ends.
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
        self._steps_a_unit = 1

    def on_setup(self, trainer: Trainer) -> None:
        """Allocates the average's tensors and computes the steps of an epoch."""
        super().on_setup(trainer)
        note_batch_norm(trainer, "the average")
        if self.unit == "epoch":
            windows = trainer.source.windows_per_epoch
            if windows is None:
                raise ConfigError(
                    "SWA(unit='epoch'): the length of an epoch is not known in advance: count "
                    "steps (unit='step'), or give the trainer an epoch_length."
                )
            self._steps_a_unit = windows

    def _is_due(self, step: int) -> bool:
        done, within = divmod(step, self._steps_a_unit)
        return within == 0 and done >= self.start and (done - self.start) % self.every == 0

    def _share(self) -> float:
        return 1.0 / (self._updates + 1)

    def _is_of_use(self) -> bool:
        return self._updates > 0

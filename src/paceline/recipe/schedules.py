"""Learning-rate schedules that recipes need and torch does not have."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paceline.errors import ConfigError


class Warmup(LRScheduler, ABC):
    """Linear warm-up, then a curve down to a fraction of the base learning rate.

    Step t of T, with W warm-up steps, has the base rate times (t + 1) / W while t < W (Goyal et
    al., 2017, arXiv:1706.02677), then m + (1 - m) times the curve of (t - W) / (T - W). After T
    steps it stays at the curve's end.

    Args:
        optimizer: the optimizer whose learning rates to set.
        total_steps: T, in calls of `step` (optimizer steps, unless the trainer's
            `lr_scheduler_interval` says otherwise).
        warmup: W; an integer is a number of steps, a number below 1 a fraction of `total_steps`.
        min_ratio: m, from 0 to 1.

    Attributes:
        warmup_steps: W in steps.

    Raises:
        ConfigError: the numbers are out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: int | float = 0,
        min_ratio: float = 0.0,
    ) -> None:
        self.total_steps = total_steps
        self.warmup_steps = steps_of(warmup, total_steps, "warmup")
        self.min_ratio = min_ratio
        if total_steps < 1 or not 0 <= self.warmup_steps <= total_steps:
            raise ConfigError(f"{self.warmup_steps} warm-up steps do not fit {total_steps} steps.")
        if not 0 <= min_ratio <= 1:
            raise ConfigError(f"min_ratio={min_ratio} is not from 0 to 1.")
        super().__init__(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position. Its settings are not state: a longer run has a new curve."""
        return {name: getattr(self, name) for name in ("last_epoch", "base_lrs", "_last_lr")}

    @abstractmethod
    def curve(self, progress: float) -> float:
        """The curve after the warm-up.

        Args:
            progress: from 0 at its beginning to 1 at its end.

        Returns:
            From 1 down to 0.
        """

    def factor(self, step: int) -> float:
        """The fraction of the base learning rate at `step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_ratio + (1 - self.min_ratio) * self.curve(min(1.0, progress))

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each parameter group at the current step."""
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]


class WarmupCosine(Warmup):
    """Linear warm-up, then half a cosine: (1 + cos(pi x)) / 2.

    One cycle of Loshchilov and Hutter (2017), arXiv:1608.03983, eq. 5. Arguments as for `Warmup`.
    """

    def curve(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class WarmupLinear(Warmup):
    """Linear warm-up, then a straight line down. Arguments as for `Warmup`."""

    def curve(self, progress: float) -> float:
        return 1 - progress


class WarmupConstant(Warmup):
    """Linear warm-up, then the base learning rate. Arguments as for `Warmup`."""

    def curve(self, progress: float) -> float:
        return 1.0


class WarmupStableDecay(Warmup):
    """Linear warm-up, the base learning rate, then a straight line down over the last steps.

    The warmup-stable-decay schedule of Hu et al. (2024), arXiv:2404.06395.

    Args:
        optimizer, total_steps, warmup, min_ratio: as for `Warmup`.
        decay: the last steps; an integer is a number of steps, a number below 1 a fraction of
            `total_steps`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: int | float = 0,
        min_ratio: float = 0.0,
        decay: int | float = 0.1,
    ) -> None:
        self.decay_steps = steps_of(decay, total_steps, "decay")
        self._decays = self.decay_steps / max(
            1, total_steps - steps_of(warmup, total_steps, "warmup")
        )
        if not 0 <= self._decays <= 1:
            raise ConfigError(
                f"warm-up and {self.decay_steps} steps of decay do not fit {total_steps} steps."
            )
        super().__init__(optimizer, total_steps, warmup, min_ratio)

    def curve(self, progress: float) -> float:
        return 1.0 if self._decays == 0 else min(1.0, (1 - progress) / self._decays)


def steps_of(value: int | float, total_steps: int, name: str) -> int:
    """A number of steps that may be given as a fraction of the run.

    Args:
        value: an integer, or a number below 1.
        total_steps: of the run.
        name: of the setting, for the message.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(value, float):
        return value
    if not 0 <= value < 1:
        raise ConfigError(f"{name}={value}: give a number of steps, or a fraction below 1.")
    return round(value * total_steps)

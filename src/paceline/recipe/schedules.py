"""Learning-rate schedules that recipes need and torch does not have."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paceline.errors import ConfigError


class WarmupCosine(LRScheduler):
    """Linear warm-up, then half a cosine down to a fraction of the base learning rate.

    Step t of T, with W warm-up steps, has the base rate times (t + 1) / W while t < W, then
    m + (1 - m) (1 + cos(pi (t - W) / (T - W))) / 2: the warm-up of Goyal et al. (2017),
    arXiv:1706.02677, and one cycle of Loshchilov and Hutter (2017), arXiv:1608.03983, eq. 5.
    After T steps the rate stays at m times the base.

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
        if isinstance(warmup, float) and not 0 <= warmup < 1:
            raise ConfigError(f"warmup={warmup}: give a number of steps, or a fraction below 1.")
        self.total_steps = total_steps
        self.warmup_steps = round(warmup * total_steps) if isinstance(warmup, float) else warmup
        self.min_ratio = min_ratio
        if total_steps < 1 or not 0 <= self.warmup_steps <= total_steps:
            raise ConfigError(f"{self.warmup_steps} warm-up steps do not fit {total_steps} steps.")
        if not 0 <= min_ratio <= 1:
            raise ConfigError(f"min_ratio={min_ratio} is not from 0 to 1.")
        super().__init__(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position. Its settings are not state: a longer run has a new curve."""
        return {name: getattr(self, name) for name in ("last_epoch", "base_lrs", "_last_lr")}

    def factor(self, step: int) -> float:
        """The fraction of the base learning rate at `step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.min_ratio + (1 - self.min_ratio) * cosine

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each parameter group at the current step."""
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]

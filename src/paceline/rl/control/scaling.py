"""Scales observations by those that were seen, and keeps what was seen with the policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from paceline.errors import ConfigError


class ObservationScaling(nn.Module):
    """The mean and deviation of the observations that a policy has been trained on.

    It is a part of the policy, so that checkpoints, exports and loaded models have it: a policy
    that was trained on scaled observations takes what this module returns for raw ones.

    Args:
        space: gymnasium's, of the observations.
        clip: bound of what is returned.

    Raises:
        ConfigError: an observation is no array of numbers.
    """

    count: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor

    def __init__(self, space: Any, clip: float = 10.0) -> None:
        super().__init__()
        if type(space).__name__ != "Box":
            raise ConfigError(
                "environment.normalize_observations: an observation of "
                f"{type(space).__name__} cannot be normalized; normalize within the environment."
            )
        self.clip = clip
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(space.shape, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(space.shape, dtype=torch.float64))

    def add(self, count: float, total: np.ndarray, squares: np.ndarray) -> None:
        """Counts observations.

        Args:
            count: how many.
            total, squares: their sum, and that of their squares, [...].
        """
        for buffer, value in ((self.count, count), (self.total, total), (self.squares, squares)):
            buffer += torch.as_tensor(value, dtype=torch.float64, device=buffer.device)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Observations with mean 0 and deviation 1; as they are before any was counted.

        Args:
            values: [envs, ...].
        """
        if not self.count:
            return values.float()
        mean = self.total / self.count
        deviation = (self.squares / self.count - mean.square()).clamp(min=0).add(1e-8).sqrt()
        return ((values - mean) / deviation).clamp(-self.clip, self.clip).float()

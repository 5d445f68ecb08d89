"""REINFORCE (Williams, 1992), and leaving one out (RLOO; Ahmadian et al., 2024, 2402.14740)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from paceline.errors import ConfigError
from paceline.losses import ppo_policy_loss, reinforce_loss, rloo_advantages, sequence_logps
from paceline.losses.masked import check_choice
from paceline.rl.algorithms.policy_gradient import (
    PolicyGradient,
    Sample,
    groups_of,
    penalties,
    plain,
    rewards_of,
)


class REINFORCE(PolicyGradient):
    """The policy gradient of whole sequences, with or without a baseline.

    Args:
        system: whose policy is trained.
        baseline: what rewards are compared with: the "mean" over the experience, or "none".
        beta: of the divergence (k1) from the reference, which is taken from rewards; 0 needs none.
        **settings: `reference`, as of `Compared`; `minibatch` (of samples), as of `Algorithm`.

    Raises:
        ConfigError: a setting is out of its range.
    """

    name = "reinforce"

    def __init__(
        self,
        system: Any,
        *,
        baseline: str = "mean",
        beta: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(system, beta=beta, passes=1, **settings)
        check_choice("algorithm", "baseline", baseline, ("mean", "none"))
        self.baseline = baseline

    def advantages(self, samples: list[Sample]) -> list[np.ndarray]:
        rewards = rewards_of(samples) - penalties(samples, self.beta)
        if self.baseline == "mean":
            rewards = rewards - rewards.mean()
        return [np.full(len(s.old), float(a)) for s, a in zip(samples, rewards, strict=True)]

    def count_items(self, batch: Mapping[str, Any]) -> Any:
        return len(batch["mask"])

    def step(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of a batch of samples.

        Args:
            batch: from `collate_fn`.
        """
        logps = sequence_logps(self.logps(batch), batch["mask"])
        loss, stats = reinforce_loss(logps, batch["advantages"][:, 0], torch.ones_like(logps))
        return loss, plain(stats, "train/")


class RLOO(PolicyGradient):
    """A sample's advantage is over the mean of its siblings; the ratio is of whole sequences.

    Args:
        system: whose policy is trained.
        clip_low, clip_high: how far a sequence's ratio to its old one may go below and above 1.
        beta: of the divergence (k1) from the reference, which is taken from rewards; 0 needs none.
        **settings: `reference`, as of `Compared`; `passes` and `minibatch` (of samples), as of
            `Algorithm`.

    Raises:
        ConfigError: a setting is out of its range.
    """

    name = "rloo"
    grouped = True

    def __init__(
        self,
        system: Any,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        beta: float = 0.05,
        **settings: Any,
    ) -> None:
        super().__init__(system, beta=beta, **settings)
        if not (0 <= clip_low <= 1 and clip_high >= 0):
            raise ConfigError(
                f"algorithm.clip_low={clip_low}, clip_high={clip_high}: clip_low is from 0 to 1, "
                "clip_high at least 0."
            )
        self.clip_low, self.clip_high = clip_low, clip_high

    def advantages(self, samples: list[Sample]) -> list[np.ndarray]:
        rewards = rewards_of(samples) - penalties(samples, self.beta)
        whole = rloo_advantages(rewards, groups_of(samples))
        return [np.full(len(s.old), float(a)) for s, a in zip(samples, whole, strict=True)]

    def count_items(self, batch: Mapping[str, Any]) -> Any:
        return len(batch["mask"])

    def step(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of a batch of samples.

        Args:
            batch: from `collate_fn`.
        """
        mask = batch["mask"]
        logps = sequence_logps(self.logps(batch), mask)
        loss, stats = ppo_policy_loss(
            logps,
            sequence_logps(batch["old"], mask),
            batch["advantages"][:, 0],
            torch.ones_like(logps),
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )
        return loss, plain(stats, "train/")

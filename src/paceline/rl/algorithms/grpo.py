"""Group relative policy optimization (Shao et al., 2024, arXiv:2402.03300) and its corrections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from paceline.errors import ConfigError
from paceline.losses import group_advantages, grpo_items, grpo_loss, importance_weights
from paceline.losses.advantages import SCALES
from paceline.losses.masked import check_choice
from paceline.rl.algorithms.policy_gradient import (
    PolicyGradient,
    Sample,
    count,
    groups_of,
    padded,
    plain,
    rewards_of,
    usable,
)


class GRPO(PolicyGradient):
    """Group relative policy optimization: a sample's advantage is over its siblings.

    Args:
        system: whose policy is trained.
        aggregation: "dapo" and "bnpo" are the mean over all tokens of a minibatch, "grpo" that over
            samples of each one's mean, "dr_grpo" that of each one's sum over `max_length`.
        scale: of advantages: "group" and "batch" divide by the standard deviation of the group's or
            all rewards, "none" does not.
        clip_low, clip_high: how far a probability's ratio to its old one may go below and above 1.
        level: "token", or "sequence" for one ratio of all tokens (GSPO).
        ratio: "clip", or "cispo" for weights without a gradient, at most `cap`.
        cap: the largest ratio; "cispo" needs it.
        max_length: tokens by which "dr_grpo" divides: the longest completion allowed.
        equal_groups: groups of equal rewards: "keep" counts their tokens in the mean, "drop" leaves
            them out and counts them as skipped. {"redraw": 4} plays an episode that has no other
            group anew, with other random numbers, at most 4 times, which is counted too; a group
            that is equal even then is dropped.
        importance_weights: what corrects for a sampler that computes other probabilities than the
            trainer does, as {"kind": "truncate", "cap": 2.0, "level": "token"}: weights above `cap`
            are cut by "truncate" and 0 by "mask"; `level` is "token" or "sequence". None for no
            correction.
        **settings: `beta` (of k3, in the loss) as of `PolicyGradient`; `reference`, as of
            `Compared`; `passes` and `minibatch` (of samples), as of `Algorithm`.

    Raises:
        ConfigError: a setting is out of its range.
    """

    name = "grpo"
    grouped = True

    def __init__(
        self,
        system: Any,
        *,
        aggregation: str = "dapo",
        scale: str = "group",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        level: str = "token",
        ratio: str = "clip",
        cap: float | None = None,
        max_length: int | None = None,
        equal_groups: str | Mapping[str, int] = "keep",
        importance_weights: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(system, **settings)
        self.aggregation, self.scale = aggregation, scale
        self.clip_low, self.clip_high = clip_low, clip_high
        self.level, self.ratio, self.cap, self.max_length = level, ratio, cap, max_length
        self.equal_groups = equal_groups
        if importance_weights is not None and not isinstance(importance_weights, Mapping):
            raise ConfigError(
                f"algorithm.importance_weights={importance_weights!r}: expected such as "
                "{kind: truncate, cap: 2.0}, or null."
            )
        self.importance_weights = None if importance_weights is None else dict(importance_weights)
        if unknown := (self.importance_weights or {}).keys() - {"kind", "cap", "level"}:
            raise ConfigError(f"algorithm.importance_weights: there is no {min(unknown)!r} in it.")
        check_choice("algorithm", "scale", scale, SCALES)
        self.redraws = _redraws(equal_groups)
        nothing = torch.zeros(1, 1)
        self._loss(nothing, nothing, nothing, nothing, nothing)  # refuses what it cannot do
        self._weights(nothing, nothing, nothing)

    def kept(self, siblings: Sequence[Any], skipped: dict[str, int]) -> list[Any]:
        good = super().kept(siblings, skipped)
        if self.equal_groups != "keep" and len({float(node.reward) for node in good}) == 1:
            count(skipped, "a group of equal rewards")
            return []
        return good

    def teaches_nothing(self, graph: Any) -> bool:
        groups = [
            [float(node.reward) for node in siblings if usable(node, {})]
            for siblings in graph.siblings()
        ]
        compared = [rewards for rewards in groups if len(rewards) > 1]
        return bool(compared) and all(len(set(rewards)) == 1 for rewards in compared)

    def advantages(self, samples: list[Sample]) -> list[np.ndarray]:
        whole = group_advantages(rewards_of(samples), groups_of(samples), scale=self.scale)
        found = [np.full(len(s.old), float(a)) for s, a in zip(samples, whole, strict=True)]
        if self.importance_weights is None:
            return found
        for i, sample in enumerate(samples):
            if sample.sampled is None:
                raise ConfigError(
                    f"algorithm.importance_weights={self.importance_weights!r}: the sampler "
                    "records no log-probabilities (Node.logprobs)."
                )
            longest = len(sample.old)
            old, sampled = (padded([row], longest) for row in (sample.old, sample.sampled))
            found[i] = found[i] * self._weights(old, sampled, torch.ones(1, longest))[0].numpy()
        return found

    def _weights(
        self, old: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        return importance_weights(
            old,
            sampled,
            mask,
            **(self.importance_weights or {}),
        )

    def count_items(self, batch: Mapping[str, Any]) -> Any:
        return grpo_items(batch["mask"], self.aggregation)

    def _loss(
        self,
        logps: torch.Tensor,
        old: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        ref: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return grpo_loss(
            logps,
            old,
            advantages,
            mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            ref_logps=ref,
            beta=self.beta,
            ratio=self.ratio,
            cap=self.cap,
            aggregation=self.aggregation,
            max_length=self.max_length,
            level=self.level,
        )

    def step(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of a batch of samples.

        Args:
            batch: from `collate_fn`.
        """
        loss, stats = self._loss(
            self.logps(batch), batch["old"], batch["advantages"], batch["mask"], batch.get("ref")
        )
        return loss, plain(stats, "train/")


def _redraws(equal_groups: Any) -> int:
    """How often an episode may be drawn anew.

    Raises:
        ConfigError: the setting says nothing that there is.
    """
    if not isinstance(equal_groups, Mapping):
        check_choice("algorithm", "equal_groups", equal_groups, ("keep", "drop"))
        return 0
    tries = equal_groups.get("redraw")
    if set(equal_groups) != {"redraw"} or isinstance(tries, bool) or not isinstance(tries, int):
        tries = 0
    if tries < 1:
        raise ConfigError(
            f"algorithm.equal_groups={dict(equal_groups)!r}: expected keep, drop, or "
            "{redraw: TIMES} with at least 1."
        )
    return tries

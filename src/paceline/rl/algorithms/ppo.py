"""Proximal policy optimization (Schulman et al., 2017, arXiv:1707.06347)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paceline.rl.algorithm import Algorithm


class PPO(Algorithm):
    """Proximal policy optimization with a clipped ratio and a value function.

    Args:
        system: evaluates the actions of a batch: `evaluate(batch) -> (logp, entropy, value)`, each
            of [steps].
        gamma: the discount.
        lam: of the advantage estimate (GAE, arXiv:1506.02438).
        clip_range: how far a probability's ratio to its old one may go, on both sides of 1.
        clip_range_value: how far a value may move from its old one; None for no bound.
        vf_loss_coef: of the value's loss.
        entropy_coef: of the entropy, which is rewarded.
        normalize_advantages: whether they are whitened, over the whole experience.
        passes: over each experience.
        minibatch: steps of all ranks in an optimizer step.
    """

    name = "ppo"

    def __init__(
        self,
        system: Any,
        *,
        gamma: float = 0.99,
        lam: float = 0.95,
        clip_range: float = 0.2,
        clip_range_value: float | None = None,
        vf_loss_coef: float = 0.5,
        entropy_coef: float = 0.0,
        normalize_advantages: bool = True,
        passes: int = 10,
        minibatch: int | None = None,
    ) -> None:
        super().__init__(system, passes=passes, minibatch=minibatch)
        self.gamma, self.lam = gamma, lam
        self.clip_range, self.clip_range_value = clip_range, clip_range_value
        self.vf_loss_coef, self.entropy_coef = vf_loss_coef, entropy_coef
        self.normalize_advantages = normalize_advantages

    def prepare(self, steps: Any) -> Any:
        advantages = steps.get("advantages")
        if self.normalize_advantages and advantages is not None and len(advantages):
            steps = {**steps, "advantages": whitened(advantages)}
        return steps

    def step(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of a batch of transitions.

        Args:
            batch: `logp`, `value`, `advantages` and `returns` of [steps], and what the system
                evaluates.
        """
        logp, entropy, value = self.system.evaluate(batch)
        ratio = (logp - batch["logp"]).exp()
        advantages = batch["advantages"]
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        policy = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        error = (value - batch["returns"]).square()
        if self.clip_range_value is not None:
            near = batch["value"] + (value - batch["value"]).clamp(
                -self.clip_range_value, self.clip_range_value
            )
            error = torch.maximum(error, (near - batch["returns"]).square())
        value_loss = 0.5 * error.mean()
        loss = policy + self.vf_loss_coef * value_loss - self.entropy_coef * entropy.mean()
        with torch.no_grad():
            stats = {
                "train/policy_loss": policy,
                "train/value_loss": value_loss,
                "train/entropy": entropy.mean(),
                "train/approx_kl": ((ratio - 1) - (logp - batch["logp"])).mean(),
                "train/clip_fraction": ((ratio - 1).abs() > self.clip_range).float().mean(),
            }
        return loss, stats


def whitened(values: torch.Tensor) -> torch.Tensor:
    """Values with mean 0 and deviation 1; a single one, or a constant, is left as it is.

    Args:
        values: [steps].
    """
    if len(values) < 2 or bool((values == values[0]).all()):
        return values
    return (values - values.mean()) / (values.std() + 1e-8)

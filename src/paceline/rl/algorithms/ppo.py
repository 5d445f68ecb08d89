"""Proximal policy optimization (Schulman et al., 2017, arXiv:1707.06347)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from paceline.errors import ConfigError
from paceline.losses import gae, kl, moments, ppo_policy_loss, ppo_value_loss, whiten
from paceline.losses.masked import masked_mean
from paceline.rl.algorithm import Turn
from paceline.rl.algorithms.policy_gradient import PolicyGradient, Sample, plain, same_tokens
from paceline.rl.system import ValueFunctionSystem


class PPO(PolicyGradient):
    """Proximal policy optimization with a clipped ratio and a value function.

    In environments a sample is a transition. Of text it is a token: a `ValueFunctionSystem` gives
    the value before each; a turn's reward comes with its last one, and beta times the divergence
    (k1) from the reference is taken from every token's reward.

    Args:
        system: in environments evaluates the actions of a batch: `evaluate(batch) -> (logp,
            entropy, value)`, each of [steps]. Of text, a `ValueFunctionSystem`.
        gamma: the discount.
        lam: of the advantage estimate (GAE, arXiv:1506.02438).
        clip_range: how far a probability's ratio to its old one may go, on both sides of 1.
        clip_range_value: how far a value may move from its old one; None for no bound.
        vf_loss_coef: of the value's loss.
        entropy_coef: of the entropy, which is rewarded; of text, if the system gives it.
        normalize_advantages: whether they are whitened, over the whole experience.
        target_kl: no further pass over an experience is made once the policy has diverged so far
            from the one that collected it (k3, mean over its samples); None for all passes.
        beta: how much the policy is held to the reference, of text; 0 needs none.
        passes: over each experience.
        minibatch: transitions, or turns, of all ranks in an optimizer step.
        **settings: `reference`, as of `Compared`.

    Raises:
        ConfigError: a setting is out of its range.
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
        target_kl: float | None = None,
        beta: float = 0.0,
        passes: int = 10,
        minibatch: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(system, beta=beta, passes=passes, minibatch=minibatch, **settings)
        if target_kl is not None and not target_kl > 0:
            raise ConfigError(f"algorithm.target_kl={target_kl}: expected above 0, or null.")
        self.gamma, self.lam = gamma, lam
        self.clip_range, self.clip_range_value = clip_range, clip_range_value
        self.vf_loss_coef, self.entropy_coef = vf_loss_coef, entropy_coef
        self.normalize_advantages = normalize_advantages
        self.target_kl = target_kl
        self.ends_early = target_kl is not None
        self._checked = False

    def check(self, sampler: Any) -> None:
        if not isinstance(self.system, ValueFunctionSystem):
            raise ConfigError(
                f"algorithm: PPO needs a value function, and {type(self.system).__qualname__} is "
                "no ValueFunctionSystem. GRPO, RLOO and REINFORCE need none."
            )

    def scored(self, turns: Sequence[Turn]) -> tuple[Any, torch.Tensor | None]:
        if not self._checked:
            with torch.enable_grad():
                check_trained(self.system, self.system.auditor_logps_and_values(turns[:1])[1])
            self._checked = True
        return self.system.auditor_logps_and_values(turns)

    def prepare(self, steps: Any) -> Any:
        if isinstance(steps, Mapping):
            advantages = steps.get("advantages")
            if self.normalize_advantages and advantages is not None:
                steps = {**steps, "advantages": whiten(advantages, torch.ones_like(advantages))}
            return steps
        found = [self._estimated(sample) for sample in steps]
        if not self.normalize_advantages or not found:
            return found
        rows = [torch.as_tensor(sample.advantages) for sample in found]
        over = torch.stack([moments(row, torch.ones_like(row)) for row in rows]).sum(0)
        white = [whiten(row, torch.ones_like(row), over=over).numpy() for row in rows]
        return [
            dataclasses.replace(sample, advantages=row)
            for sample, row in zip(found, white, strict=True)
        ]

    def _estimated(self, sample: Sample) -> Sample:
        """A turn with the advantages and returns of its tokens."""
        if sample.values is None:
            raise ConfigError("algorithm: PPO needs values; the samples have none.")
        old, values = torch.as_tensor(sample.old), torch.as_tensor(sample.values)
        rewards = torch.zeros_like(old)
        if sample.ref is not None:
            rewards = -self.beta * kl(old, torch.as_tensor(sample.ref), "k1")
        rewards[-1] += sample.reward
        ended = torch.zeros_like(old)
        ended[-1] = 1
        following = torch.cat([values[1:], values.new_zeros(1)])
        advantages, returns = gae(
            rewards, values, following, ended, ended, torch.ones_like(old),
            gamma=self.gamma, lam=self.lam,
        )  # fmt: skip
        return dataclasses.replace(sample, advantages=advantages.numpy(), returns=returns.numpy())

    def count_items(self, batch: Mapping[str, Any]) -> Any:
        return batch["mask"].sum() if "mask" in batch else len(batch["logp"])

    def goes_on(self, steps: Any) -> bool:
        assert self.target_kl is not None
        total = torch.zeros((), dtype=torch.float64)
        items = 0.0
        for batch in self._batches(steps):
            new, _, _, *others = self._evaluated(batch)
            old, mask = others[0].to(new.device), others[2]
            mask = torch.ones_like(new) if mask is None else mask.to(new.device)
            number = float(mask.sum())
            total += masked_mean(kl(old, new, "k3", mask), mask).double().cpu() * number
            items += number
        return float(total) <= self.target_kl * items

    def _batches(self, steps: Any) -> Iterator[Mapping[str, Any]]:
        """An experience in minibatches, in order."""
        columns = isinstance(steps, Mapping)
        count = len(steps["logp"]) if columns else len(steps)
        size = self.minibatch or max(count, 1)
        for start in range(0, count, size):
            part = slice(start, start + size)
            if columns:
                yield {name: column[part] for name, column in steps.items()}
            else:
                yield self.collate_fn(steps[part])

    def _evaluated(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """Log-probabilities, entropies or None, values, the old two, and the mask or None."""
        if "turns" not in batch:
            logp, entropy, value = self.system.evaluate(batch)
            return logp, entropy, value, batch["logp"], batch["value"], None
        scored, values = self.system.auditor_logps_and_values(batch["turns"])
        same_tokens(scored, batch["mask"])
        return scored.logps, scored.entropy, values, batch["old"], batch["values"], batch["mask"]

    def step(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of a batch of transitions, or of turns.

        Args:
            batch: `logp`, `value`, `advantages` and `returns` of [steps], and what the system
                evaluates; or from `collate_fn`.
        """
        logp, entropy, value, old, old_value, mask = self._evaluated(batch)
        policy, of_policy = ppo_policy_loss(
            logp, old, batch["advantages"], mask,
            clip_low=min(self.clip_range, 1.0), clip_high=self.clip_range,
            stats=("approx_kl", "clip_low", "clip_high"),
        )  # fmt: skip
        value_loss, _ = ppo_value_loss(
            value, old_value, batch["returns"], mask, clip=self.clip_range_value, stats=()
        )
        loss = policy + self.vf_loss_coef * value_loss
        stats = {
            "train/policy_loss": policy,
            "train/value_loss": value_loss,
            "train/approx_kl": of_policy["approx_kl"],
            "train/clip_fraction": of_policy["clip_low"] + of_policy["clip_high"],
        }
        if entropy is not None:
            mean = masked_mean(entropy if self.entropy_coef else entropy.detach(), mask)
            if self.entropy_coef:  # else its backward pass would only add zeros
                loss = loss - self.entropy_coef * mean
            stats["train/entropy"] = mean
        elif self.entropy_coef:
            raise ConfigError(
                f"algorithm.entropy_coef={self.entropy_coef}: the system gives no entropy."
            )
        if "turns" not in batch:
            return loss, {name: stat.detach() for name, stat in stats.items()}
        reward = batch["reward"]
        stats |= {
            "training/loss": loss,
            "training/policy_loss": policy,
            "training/value_loss": value_loss,
            "reward/mean_reward": reward.mean(),
            "reward/std_reward": reward.std(correction=0),
            "policy/logprobs": masked_mean(logp.detach(), mask),
        }
        if "ref" in batch:
            stats["ref/logprobs"] = masked_mean(batch["ref"], mask)
        return loss, plain(stats)


def check_trained(system: Any, values: torch.Tensor) -> None:
    """Refuses a value function that nothing trains.

    Args:
        system: with `parameters()`.
        values: from its value function, with gradients.

    Raises:
        ConfigError: no gradient leads to it, or its parameters are not among the system's.
    """
    named = type(system).__qualname__
    if not values.requires_grad:
        raise ConfigError(f"{named}.value() returned values without a gradient.")
    trained = {id(parameter) for parameter in system.parameters()}
    seen: set[Any] = set()
    ahead: list[Any] = [values.grad_fn]
    left_out = 0
    while ahead:
        function = ahead.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        leaf = getattr(function, "variable", None)
        left_out += leaf is not None and id(leaf) not in trained
        ahead += [following for following, _ in function.next_functions]
    if left_out:
        raise ConfigError(
            f"{named}.parameters() lacks {left_out} of the parameters that value() computes with: "
            "the optimizer would never train them. Return those of the value head too."
        )

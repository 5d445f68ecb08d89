"""Advantages from rewards: by values over time, or by what others of a group got."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.errors import ConfigError
from paceline.losses.masked import check_choice, check_shapes, exact, only

SCALES = ("group", "batch", "none")


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    ended: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, in the shape of `rewards`; time comes last.

    An episode that terminated is worth nothing afterwards. One that ended otherwise, by a time
    limit say, is still worth the value of its last observation; no advantage goes back over either
    end. Where the mask is false, results are 0, and all others are as if the step did not exist: so
    are the steps of a vectorised environment that only reset, tokens of others, and padding.

    Args:
        rewards: [..., time].
        values: of the observations before each step, of the same shape.
        next_values: of the observations after each step, the last one of an episode for the step
            that ended it; not used where `terminated`.
        terminated: where an episode came to an end of its own.
        ended: where an episode ended for whatever reason; where `terminated` it did anyway.
        mask: true, or not 0, where a step is a sample.
        gamma: the discount of a step, from 0 to 1.
        lam: how far advantages look ahead, from 0 (one step) to 1 (to the end).

    Returns:
        advantages and returns (advantages plus values), without a gradient.
    """
    check_shapes(
        "gae", rewards=rewards, values=values, next_values=next_values, terminated=terminated,
        ended=ended, mask=mask,
    )  # fmt: skip
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ConfigError(f"gae: {name}={number}; it is from 0 to 1.")
    counts, terminated = mask.bool(), terminated.bool()
    rewards, values = only(exact(rewards), counts), only(exact(values), counts)
    ahead = only(exact(next_values), counts & ~terminated)
    errors = rewards + gamma * ahead - values
    # A step that is no sample hands on what comes after it, undiscounted.
    decays = torch.full_like(errors, gamma * lam).masked_fill(terminated | ended.bool(), 0.0)
    decays = decays.masked_fill(~counts, 1.0)
    if errors.shape[-1] == 0:
        return errors, errors.clone()
    running = torch.zeros_like(errors[..., 0])
    backwards = []
    for error, decay in zip(reversed(errors.unbind(-1)), reversed(decays.unbind(-1)), strict=True):
        running = torch.addcmul(error, decay, running)
        backwards.append(running)
    advantages = only(torch.stack(backwards[::-1], -1), counts)
    return advantages, advantages + values


@torch.no_grad()
def group_advantages(
    rewards: Tensor, groups: Tensor, *, scale: str = "group", mask: Tensor | None = None
) -> Tensor:
    """How much more reward each sample got than its group did on average, [samples].

    In a group of equal rewards, or of one sample, all advantages are exactly 0.

    Args:
        rewards: [samples].
        groups: to which group each belongs, such as the index of its prompt, [samples] integers in
            any order; groups may differ in size.
        scale: "group" divides by the standard deviation of each group, "batch" by that of all
            rewards, plus 1e-4 either way; "none" does not divide.
        mask: false, or 0, for samples without a reward, [samples]: they get 0, and the others
            nothing of theirs. None: all have one.
    """
    check_choice("group_advantages", "scale", scale, SCALES)
    counts, rewards, index = _grouped("group_advantages", rewards, groups, mask)
    lifts = rewards - _least(rewards, counts, index)
    sizes = _sums(counts.to(lifts.dtype), index).clamp(min=1)
    gaps = only(lifts - _sums(only(lifts, counts), index) / sizes, counts)
    if scale == "group":
        squares = _sums(gaps.square(), index)
        return gaps / ((squares / (sizes - 1).clamp(min=1)).sqrt() + 1e-4)
    if scale == "batch":
        size = counts.sum().clamp(min=1)
        off = only(rewards - only(rewards, counts).sum() / size, counts)
        return gaps / ((off.square().sum() / (size - 1).clamp(min=1)).sqrt() + 1e-4)
    return gaps


@torch.no_grad()
def rloo_advantages(rewards: Tensor, groups: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """How much more reward each sample got than the others of its group, [samples].

    In a group of equal rewards, or of one sample, all advantages are exactly 0.

    Args:
        rewards: [samples].
        groups: as for `group_advantages`.
        mask: as for `group_advantages`.
    """
    counts, rewards, index = _grouped("rloo_advantages", rewards, groups, mask)
    lifts = only(rewards - _least(rewards, counts, index), counts)
    sizes = _sums(counts.to(lifts.dtype), index)
    of_others = (_sums(lifts, index) - lifts) / (sizes - 1).clamp(min=1)
    return only(lifts - of_others, counts & (sizes > 1))


def _grouped(
    call: str, rewards: Tensor, groups: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The mask, rewards, and an index of groups from 0, below the number of samples.

    `torch.unique` would wait for the device to learn how many groups there are.
    """
    check_shapes(call, rewards=rewards, groups=groups, mask=mask)
    if rewards.ndim != 1:
        raise ConfigError(f"{call}: rewards has shape {list(rewards.shape)}; give [samples].")
    ordered, order = groups.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.long)
    new[1:] = ordered[1:] != ordered[:-1]
    index = torch.empty_like(new).scatter_(0, order, new.cumsum(0) - 1)
    counts = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    return counts, only(exact(rewards.detach()), counts), index


def _sums(values: Tensor, index: Tensor) -> Tensor:
    """The sum over each sample's group."""
    return torch.zeros_like(values).index_add_(0, index, values)[index]


def _least(values: Tensor, counts: Tensor, index: Tensor) -> Tensor:
    """The least of each sample's group: subtracted first, it keeps equal rewards exactly equal."""
    high = values.masked_fill(~counts, torch.inf)
    least = torch.full_like(values, torch.inf).scatter_reduce_(0, index, high, "amin")[index]
    return least.masked_fill(least == torch.inf, 0.0)

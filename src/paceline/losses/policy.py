"""Losses of policies and values, from advantages and returns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from paceline.errors import ConfigError
from paceline.losses.masked import check_choice, check_shapes, exact, mean_where, only
from paceline.losses.ratios import LEVELS, kl

RATIOS = ("clip", "cispo")
AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo")
_BY_SEQUENCE = ("grpo", "dr_grpo")
_OF_RATIOS = ("ratio", "approx_kl", "clip_low", "clip_high")
_OF_VALUES = ("value", "return", "clipped")


def grpo_items(mask: Tensor, aggregation: str = "grpo") -> Tensor:
    """The items over which `grpo_loss` is a mean: what a trainer's `count_items` returns.

    Sequences for "grpo" and "dr_grpo", those without a token too, as their number is the divisor;
    the tokens of the mask for "bnpo" and "dapo", which are equal, as the mean is always over the
    tokens of all micro-batches and ranks of an optimizer step.

    Args:
        mask: [sequences, length]; true, or not 0, where a token counts.
        aggregation: as for `grpo_loss`.
    """
    check_choice("grpo_items", "aggregation", aggregation, AGGREGATIONS)
    if aggregation in _BY_SEQUENCE:
        return torch.full((), len(mask), device=mask.device)
    return mask.bool().sum()


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    ratio: str = "clip",
    cap: float | None = None,
    aggregation: str = "grpo",
    max_length: int | None = None,
    level: str = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of GRPO and its corrections, a mean over `grpo_items`, and its statistics.

    With r = exp(logps - old_logps), a token's loss is -min(r A, clip(r) A), or with "cispo"
    -min(r, cap) A logp, where the weight before A has no gradient; plus beta times k3 of the
    reference. Aggregations: "grpo" is the mean over sequences of each one's mean over its tokens;
    "dr_grpo" of each one's sum, over `max_length`; "bnpo" and "dapo" the mean over all tokens.

    Statistics are means over tokens: log them with the weight `mask.sum()`. `ratio` is r before it
    is clipped, `approx_kl` k3 of the old policy, `clip_low` and `clip_high` the shares of tokens
    for which r is so far off that "clip" gives no gradient; with a reference, `kl` is k3 of it.

    Args:
        logps: of the sampled tokens under the policy, [sequences, length].
        old_logps: those under the policy that is corrected for, of the same shape, without a
            gradient; `logps.detach()` where samples are used once.
        advantages: [sequences], or [sequences, length].
        mask: of the shape of `logps`; true, or not 0, where a token counts.
        clip_low, clip_high: r is clipped to 1 - clip_low and 1 + clip_high; not by "cispo".
        ref_logps: those under the reference, of the shape of `logps`; None if there is none.
        beta: how much the policy is held to the reference; 0 is not at all.
        ratio: "clip" or "cispo".
        cap: the largest r; "cispo" needs it, "clip" may have it, for negative advantages.
        aggregation: "grpo", "bnpo", "dr_grpo" or "dapo".
        max_length: the constant by which "dr_grpo" divides, tokens: the longest completion allowed.
        level: "token", or "sequence" (GSPO), whose r is exp of its mean log-ratio over tokens.
    """
    check_choice("grpo_loss", "ratio", ratio, RATIOS)
    check_choice("grpo_loss", "aggregation", aggregation, AGGREGATIONS)
    check_choice("grpo_loss", "level", level, LEVELS)
    check_shapes("grpo_loss", logps=logps, old_logps=old_logps, mask=mask, ref_logps=ref_logps)
    if logps.ndim != 2:
        raise ConfigError(
            f"grpo_loss: logps has shape {list(logps.shape)}; give [sequences, length]."
        )
    if advantages.ndim == 1 and len(advantages) == len(logps):
        advantages = advantages.unsqueeze(-1).expand_as(logps)
    check_shapes("grpo_loss", logps=logps, advantages=advantages)
    if beta and ref_logps is None:
        raise ConfigError(
            f"grpo_loss: beta={beta} without a reference: give ref_logps, or beta=0.0."
        )
    if ratio == "cispo" and cap is None:
        raise ConfigError("grpo_loss: ratio='cispo' needs cap, the largest weight, such as 5.0.")
    if (aggregation == "dr_grpo") != (max_length is not None):
        raise ConfigError(
            f"grpo_loss: max_length={max_length} with aggregation={aggregation!r}: give the "
            "longest completion allowed, in tokens, for 'dr_grpo', and None for the others."
        )
    _check_clips("grpo_loss", clip_low, clip_high)
    if cap is not None and not cap > (1 + clip_high if ratio == "clip" else 0):
        raise ConfigError(
            f"grpo_loss: cap={cap} with ratio={ratio!r}; it is above "
            + ("1 + clip_high, or clipping would never act." if ratio == "clip" else "0.")
        )
    counts = mask.bool()
    logps = only(exact(logps), counts)
    advantages = only(exact(advantages.detach()), counts)
    shifts = logps - only(exact(old_logps.detach()), counts)
    if level == "sequence":
        lengths = counts.sum(-1, keepdim=True).clamp(min=1)
        shifts = only((shifts.sum(-1, keepdim=True) / lengths).expand_as(logps), counts)
    if ratio == "clip":
        losses = _clipped(shifts, advantages, clip_low, clip_high, cap)
    else:
        losses = -shifts.detach().exp().clamp(max=cap) * advantages * logps
    stats = _statistics(shifts, advantages, counts, clip_low, clip_high)
    if ref_logps is not None:
        divergence = kl(logps, ref_logps, "k3", counts)
        stats["kl"] = mean_where(divergence.detach(), counts)
        if beta:
            losses = losses + beta * divergence
    return _aggregated(losses, counts, aggregation, max_length), stats


def reinforce_loss(
    logps: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A logp, the mean over the mask's elements, and its statistics.

    An item is an element: a token, an action, or, with the sums of `sequence_logps`, a sequence.

    Args:
        logps: of what was sampled, under the policy, any shape.
        advantages: of the same shape, without a gradient.
        mask: of the same shape; true, or not 0, where an element counts.
    """
    check_shapes("reinforce_loss", logps=logps, advantages=advantages, mask=mask)
    counts = mask.bool()
    logps = only(exact(logps), counts)
    advantages = only(exact(advantages.detach()), counts)
    stats = {"logp": mean_where(logps.detach(), counts)}
    return mean_where(-advantages * logps, counts), stats


def ppo_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    stats: Collection[str] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss, the mean over the mask's elements, and its statistics.

    An item is an element: a token, an action, or, with the sums of `sequence_logps`, a sequence, as
    RLOO has it. Statistics are those of `grpo_loss`, means over the elements.

    Args:
        logps: of what was sampled, under the policy, any shape.
        old_logps: those under the policy that sampled, of the same shape, without a gradient.
        advantages: of the same shape, without a gradient.
        mask: of the same shape; true, or not 0, where an element counts. None if all do.
        clip_low, clip_high: the ratio is clipped to 1 - clip_low and 1 + clip_high.
        stats: names of the statistics to compute; None for all. Of small batches they cost as much
            as the loss.
    """
    check_shapes(
        "ppo_policy_loss", logps=logps, old_logps=old_logps, advantages=advantages, mask=mask
    )
    _check_clips("ppo_policy_loss", clip_low, clip_high)
    _check_stats("ppo_policy_loss", stats, _OF_RATIOS)
    counts = None if mask is None else mask.bool()
    shifts = only(exact(logps) - exact(old_logps.detach()), counts)
    advantages = only(exact(advantages.detach()), counts)
    losses = _clipped(shifts, advantages, clip_low, clip_high, None)
    found = _statistics(shifts, advantages, counts, clip_low, clip_high, stats)
    return mean_where(losses, counts), found


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    *,
    clip: float | None = None,
    stats: Collection[str] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the values, the mean over the mask's elements, and statistics.

    With a clip, the larger one of this and of the error of values that are at most `clip` away from
    the old ones. An item is an element.

    Statistics are means over the elements: the `value`, the `return`, and `clipped`, the share of
    elements for which clipping decides.

    Args:
        values: as the model computes them now, any shape.
        old_values: those with which the samples were collected, of the same shape.
        returns: what they are to become, of the same shape, without a gradient.
        mask: of the same shape; true, or not 0, where an element counts. None if all do.
        clip: the largest change, in the unit of the rewards; None for any.
        stats: as for `ppo_policy_loss`.
    """
    check_shapes("ppo_value_loss", values=values, old_values=old_values, returns=returns, mask=mask)
    if clip is not None and not clip > 0:
        raise ConfigError(f"ppo_value_loss: clip={clip}; it is above 0, or None for no clipping.")
    _check_stats("ppo_value_loss", stats, _OF_VALUES)
    counts = None if mask is None else mask.bool()
    values, returns = only(exact(values), counts), only(exact(returns.detach()), counts)
    errors = (values - returns).square()
    clipped: Tensor | None = None
    if clip is not None:
        old = only(exact(old_values.detach()), counts)
        held = (old + (values - old).clamp(-clip, clip) - returns).square()
        clipped = held.detach() > errors.detach()
        errors = torch.maximum(errors, held)
    each: dict[str, Callable[[], Tensor]] = {
        "value": values.detach,
        "return": lambda: returns,
        "clipped": lambda: (
            torch.zeros_like(values) if clipped is None else clipped.to(values.dtype)
        ),
    }
    return mean_where(errors, counts) / 2, _means(each, counts, stats)


def _check_clips(call: str, clip_low: float, clip_high: float) -> None:
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ConfigError(
            f"{call}: clip_low={clip_low}, clip_high={clip_high}: the ratio is clipped to "
            "1 - clip_low and 1 + clip_high, so clip_low is from 0 to 1 and clip_high at least 0."
        )


def _clipped(
    shifts: Tensor, advantages: Tensor, clip_low: float, clip_high: float, cap: float | None
) -> Tensor:
    """-min(r A, clip(r) A) for log-ratios."""
    ratios = shifts.exp()
    held = ratios.clamp(1 - clip_low, 1 + clip_high)
    if cap is not None:
        ratios = ratios.clamp(max=cap)
    return -torch.minimum(ratios * advantages, held * advantages)


def _statistics(
    shifts: Tensor,
    advantages: Tensor,
    counts: Tensor | None,
    clip_low: float,
    clip_high: float,
    wanted: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """What is said of the ratios: means over the mask's elements."""
    shifts = shifts.detach()
    ratios = shifts.exp()
    each: dict[str, Callable[[], Tensor]] = {
        "ratio": lambda: ratios,
        "approx_kl": lambda: torch.expm1(shifts) - shifts,
        "clip_low": lambda: (ratios < 1 - clip_low) & (advantages < 0),
        "clip_high": lambda: (ratios > 1 + clip_high) & (advantages > 0),
    }
    of = {k: lambda v=v: only(v().to(shifts.dtype), counts) for k, v in each.items()}
    return _means(of, counts, wanted)


def _means(
    each: Mapping[str, Callable[[], Tensor]], counts: Tensor | None, wanted: Collection[str] | None
) -> dict[str, Tensor]:
    """The means of those that are wanted; all for None."""
    return {k: mean_where(v(), counts) for k, v in each.items() if wanted is None or k in wanted}


def _check_stats(call: str, stats: Collection[str] | None, known: Collection[str]) -> None:
    for name in stats or ():
        check_choice(call, "stats", name, known)


def _aggregated(losses: Tensor, counts: Tensor, aggregation: str, max_length: int | None) -> Tensor:
    """One number of the losses of tokens."""
    losses = only(losses, counts)
    if aggregation == "grpo":
        per_sequence = losses.sum(-1) / counts.sum(-1).clamp(min=1)
        return per_sequence.sum() / max(len(losses), 1)
    if max_length is not None:
        return losses.sum() / (max(len(losses), 1) * max_length)
    return mean_where(losses, counts)

"""What compares two policies: divergences and importance weights, from log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.errors import ConfigError
from paceline.losses.masked import check_choice, check_shapes, exact, only

KINDS_OF_KL = ("k1", "k2", "k3")
KINDS_OF_WEIGHTS = ("none", "truncate", "mask")
LEVELS = ("token", "sequence")


def kl(logps: Tensor, ref_logps: Tensor, kind: str = "k1", mask: Tensor | None = None) -> Tensor:
    """Estimates KL(policy || reference) for each sample of the policy.

    With d = logps - ref_logps: k1 is d, without bias and of high variance; k2 is d^2 / 2; k3 is
    exp(-d) - 1 + d, without bias and never below 0.

    Args:
        logps: log-probabilities under the policy, any shape.
        ref_logps: those under the reference, of the same shape; no gradient goes there.
        kind: "k1", "k2" or "k3".
        mask: of the same shape; the result is 0 where it is false, or 0. None: all count.
    """
    check_choice("kl", "kind", kind, KINDS_OF_KL)
    check_shapes("kl", logps=logps, ref_logps=ref_logps, mask=mask)
    difference = exact(logps) - exact(ref_logps.detach())
    if mask is not None:
        difference = only(difference, mask.bool())
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference


def importance_weights(
    trainer: Tensor,
    sampler: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str = "none",
    cap: float | None = None,
    level: str = "token",
) -> Tensor:
    """Weights that correct for a sampler that is not quite the policy that is trained, detached.

    Multiply advantages by them. A weight is exp(trainer - sampler), for a token or, with the sums
    over its tokens, for a sequence; 0 outside the mask.

    Args:
        trainer: log-probabilities as the trainer computes them, with the sampler's weights or
            newer ones, [sequences, length].
        sampler: those that the sampler recorded, of the same shape.
        mask: of the same shape; true, or not 0, where a token counts. None: all count.
        kind: "none" is 1 everywhere, "truncate" takes `cap` for what is above it, "mask" 0.
        cap: the largest weight, above 0.
        level: "token" or "sequence", all of whose tokens get the same weight.
    """
    check_choice("importance_weights", "kind", kind, KINDS_OF_WEIGHTS)
    check_choice("importance_weights", "level", level, LEVELS)
    check_shapes("importance_weights", trainer=trainer, sampler=sampler, mask=mask)
    counts = torch.ones_like(trainer, dtype=torch.bool) if mask is None else mask.bool()
    difference = only(exact(trainer.detach()) - exact(sampler.detach()), counts)
    if kind == "none":
        return counts.to(difference.dtype)
    if cap is None or not cap > 0:
        raise ConfigError(
            f"importance_weights: kind={kind!r} with cap={cap}: give the largest weight, such as "
            "cap=2.0."
        )
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True).expand_as(difference)
    weights = difference.exp()
    weights = weights.clamp(max=cap) if kind == "truncate" else only(weights, weights <= cap)
    return only(weights, counts)

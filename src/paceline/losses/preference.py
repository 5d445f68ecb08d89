"""Learning from pairs of which one is preferred: DPO and its kin."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from paceline.errors import ConfigError
from paceline.losses.masked import check_choice, check_shapes, exact

KINDS = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm")
_SMOOTHED = ("sigmoid", "robust")


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    lengths: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over pairs of a preference loss, and its statistics; an item is a pair.

    With d = (chosen - ref_chosen) - (rejected - ref_rejected): "sigmoid" is -log sigmoid(beta d),
    "hinge" max(0, 1 - beta d), "robust" the sigmoid's, corrected for a share of labels that are
    wrong; "ipo" is (d - 1 / (2 beta))^2. With lengths, both parts of d are per token: "ipo" may
    have them, "sigmoid_norm" is the sigmoid of such a d.

    Statistics: `reward_chosen` and `reward_rejected` (beta times the log-ratio to the reference),
    their `margin`, the `accuracy` with which the chosen one has more, and `logp_chosen` and
    `logp_rejected`; means over the pairs.

    Args:
        chosen, rejected: log-probabilities of both responses under the policy, sums over their
            tokens (`sequence_logps`), [pairs].
        ref_chosen, ref_rejected: the same under the reference; no gradient goes there.
        beta: how much the policy is held to the reference, above 0.
        kind: "sigmoid", "ipo", "hinge", "robust" or "sigmoid_norm".
        label_smoothing: the share of pairs whose labels are taken to be swapped, below 0.5; for
            "sigmoid" (conservative DPO) and "robust".
        lengths: tokens of the chosen and of the rejected responses, [pairs] each.
    """
    check_choice("dpo_loss", "kind", kind, KINDS)
    check_shapes(
        "dpo_loss", chosen=chosen, rejected=rejected, ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )  # fmt: skip
    if not beta > 0:
        raise ConfigError(f"dpo_loss: beta={beta}; it is above 0, such as 0.1.")
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(
            f"dpo_loss: label_smoothing={label_smoothing}; it is from 0 to below 0.5."
        )
    if label_smoothing and kind not in _SMOOTHED:
        raise ConfigError(
            f"dpo_loss: label_smoothing={label_smoothing} does nothing with kind={kind!r}; leave "
            f"it out, or take one of {', '.join(_SMOOTHED)}."
        )
    up = exact(chosen) - exact(ref_chosen.detach())
    down = exact(rejected) - exact(ref_rejected.detach())
    gap = _per_token(up, down, kind, lengths)
    if kind == "ipo":
        losses = (gap - 1 / (2 * beta)).square()
    elif kind == "hinge":
        losses = F.relu(1 - beta * gap)
    else:
        right, wrong = -F.logsigmoid(beta * gap), -F.logsigmoid(-beta * gap)
        if kind == "robust":
            wrong = -wrong
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
        if kind == "robust":
            losses = losses / (1 - 2 * label_smoothing)
    reward_chosen, reward_rejected = beta * up.detach(), beta * down.detach()
    each = {
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "margin": reward_chosen - reward_rejected,
        "accuracy": (reward_chosen > reward_rejected).to(up.dtype),
        "logp_chosen": exact(chosen.detach()),
        "logp_rejected": exact(rejected.detach()),
    }
    return _mean(losses), {name: _mean(values) for name, values in each.items()}


def _per_token(
    up: Tensor, down: Tensor, kind: str, lengths: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The difference of the log-ratios, of sums or per token."""
    if lengths is None:
        if kind == "sigmoid_norm":
            raise ConfigError(
                "dpo_loss: kind='sigmoid_norm' is per token: give lengths=(tokens of the chosen, "
                "tokens of the rejected)."
            )
        return up - down
    if kind not in ("ipo", "sigmoid_norm"):
        raise ConfigError(
            f"dpo_loss: lengths do nothing with kind={kind!r}; leave them out, or take ipo or "
            "sigmoid_norm."
        )
    of_chosen, of_rejected = lengths
    check_shapes("dpo_loss", chosen=up, lengths=of_chosen)
    check_shapes("dpo_loss", rejected=down, lengths=of_rejected)
    return up / of_chosen.clamp(min=1) - down / of_rejected.clamp(min=1)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(values.numel(), 1)

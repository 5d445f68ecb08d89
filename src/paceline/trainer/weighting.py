"""A micro-batch's loss and its weight in the window's mean."""

from __future__ import annotations

from typing import Any

import torch

from paceline.errors import LossError


def weighted(loss: torch.Tensor, weight: Any) -> torch.Tensor:
    """Multiplies a micro-batch's mean loss by its weight in the window.

    Args:
        loss: a scalar; it may be anything, NaN too, if the weight is zero.
        weight: a number, or a scalar on the device.
    """
    if isinstance(weight, torch.Tensor):
        return torch.where(weight == 0, 0.0, loss * weight)
    return loss if weight == 1.0 else loss * weight


def check_loss(loss: Any, which: str = "", giver: str = "training_step") -> None:
    """Refuses what is no loss of a micro-batch.

    Args:
        loss: what was given for it.
        which: which of several, for messages.
        giver: who gave it.

    Raises:
        LossError: it is not one number, or has no gradient.
    """
    if not isinstance(loss, torch.Tensor):
        raise LossError(
            f"{giver} returned {loss!r:.80}{which} of type {type(loss).__name__}; it returns "
            "the mean loss over the batch's items, a tensor of one element."
        )
    if loss.numel() != 1:
        raise LossError(
            f"{giver} returned a tensor of shape {tuple(loss.shape)}{which}; the loss is one "
            "number, the mean over the batch's items. Take its mean() (reduction='mean')."
        )
    if not loss.requires_grad:
        raise LossError(
            f"{giver} returned a loss without a gradient{which}: it depends on no trainable "
            "parameter. Is something detached, under torch.no_grad(), or frozen?"
        )

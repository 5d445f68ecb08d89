"""A micro-batch's loss and its weight in the window's mean.

The weight is its part of the window's items, times the number of ranks over which gradients are
averaged (`Window.present`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from paceline.data.batches import count_first_dimension, samples_in
from paceline.errors import DataError, LossError
from paceline.trainer.progress import as_number
from paceline.trainer.run import Run


class Counts(NamedTuple):
    """What a window's weights are made of.

    Attributes:
        counts: items of each of this rank's micro-batches; numbers, or tensors on the device.
        items: items of all ranks in the window.
        samples: samples of all ranks in the window.
        whole: what weights are parts of: `items`, but never zero.
        shares: ranks over which gradients are averaged.
    """

    counts: list[Any]
    items: Any
    samples: Any
    whole: Any
    shares: int


def count_window(run: Run, batches: list[Any], sizes: list[int], samples: int) -> Counts:
    """Counts a window's items from its batches, and adds them up over the ranks.

    Args:
        run: with the user's `count_items`, if there is one; else samples are items.
        batches: this rank's micro-batches, as read.
        sizes: samples of each; 0 for a stand-in, which has no items, -1 if only the batch tells.
        samples: of all ranks in the window, or -1 if only the batches tell.
    """
    # On paper there are no values that could be counted.
    own = None if run.world.on_paper else run.count_items
    count_items = own or count_first_dimension
    counts = [
        size if size == 0 or (size > 0 and own is None) else count_items(batch)
        for batch, size in zip(batches, sizes, strict=True)
    ]
    if run.world.reads_are_free:
        read = as_number if own is None else _checked
        counts = [read(count) for count in counts]
    items: Any = sum(counts)
    seen: Any = samples
    if samples < 0:
        known = zip(batches, sizes, strict=True)
        seen = sum(samples_in(batch) if size < 0 else size for batch, size in known)
    shares = run.world.dp_size
    if run.world.parts > 1:
        shares = run.world.parts
        both = torch.zeros(2, dtype=torch.float64, device=run.device)
        both[0], both[1] = items, seen
        run.world.sum_parts(both)
        items, shared = map(as_number, both) if run.world.reads_are_free else both
        seen = shared if samples < 0 else samples
    elif run.groups is not None:
        both = torch.tensor([items, seen], dtype=torch.float64)
        run.groups.add_up(both)
        items, shared = map(as_number, both)
        seen = shared if samples < 0 else samples
    if isinstance(items, torch.Tensor):
        exact = torch.float32 if items.device.type == "mps" else torch.float64
        whole: Any = torch.where(items == 0, torch.ones_like(items), items).to(exact)
    else:
        whole = items or 1
    return Counts(counts, items, seen, whole, shares)


def _checked(count: Any) -> Any:
    """A count as a number.

    Raises:
        DataError: it is none, or below 0.
    """
    try:
        number = as_number(count)
        if number >= 0:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise DataError(f"count_items(batch) returned {count!r:.80}; it returns a number of items.")


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
    if loss is None:
        raise LossError(
            f"{giver} returned nothing{which}: return the mean loss over the batch's items. The "
            "loop calls backward() and the optimizer; to do so yourself, override step(window) "
            "with self.backward(loss) and self.optimizer_step()."
        )
    if not isinstance(loss, torch.Tensor):
        raise LossError(
            f"{giver} returned {loss!r:.80}{which} of type {type(loss).__name__}; it returns "
            "the mean loss over the batch's items, a tensor of one element: loss, and not "
            "loss.item(), nor (loss, other). To log something beside it, return "
            "{'loss': loss, 'name': other}."
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

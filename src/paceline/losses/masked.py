"""Sums and means over the elements of a mask, and the checks that all losses share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from paceline.errors import ConfigError, nearest


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over a mask's elements, a scalar; 0 if there is none.

    Args:
        values: any shape.
        mask: of the same shape; true, or not 0, where an element counts. None if all do.
    """
    check_shapes("masked_mean", values=values, mask=mask)
    counts = None if mask is None else mask.bool()
    return mean_where(only(exact(values), counts), counts)


def sequence_logps(logps: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of whole sequences, [sequences]: the sums over their tokens.

    Args:
        logps: of tokens, [sequences, length].
        mask: of the same shape; true, or not 0, where a token counts.
    """
    check_shapes("sequence_logps", logps=logps, mask=mask)
    return only(exact(logps), mask.bool()).sum(-1)


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares, [3], in float64: those of several ranks may be added up.

    Args:
        values: any shape.
        mask: of the same shape; true, or not 0, where an element counts.
    """
    check_shapes("moments", values=values, mask=mask)
    counts = mask.bool()
    kind = torch.float32 if values.device.type == "mps" else torch.float64
    given = only(values.detach().to(kind), counts)
    return torch.stack([counts.sum().to(kind), given.sum(), given.square().sum()])


def whiten(values: Tensor, mask: Tensor, *, over: Tensor | None = None) -> Tensor:
    """Values shifted to mean 0 and scaled to variance 1 (of a sample); 0 outside the mask.

    A single value, and values that differ by rounding only, are left as they are: to scale these
    up would make advantages of noise.

    Args:
        values: such as the advantages of an experience, any shape.
        mask: of the same shape; true, or not 0, where an element counts.
        over: the `moments` of everything to whiten over, such as the sum of those of all ranks;
            those of `values` unless given.
    """
    check_shapes("whiten", values=values, mask=mask)
    counts = mask.bool()
    values = only(exact(values), counts)
    count, total, squares = (moments(values, counts) if over is None else over).unbind()
    mean = total / count.clamp(min=1)
    variance = (squares - total * mean).clamp(min=0) / (count - 1).clamp(min=1)
    # A constant in float32 deviates by some 1e-7 of itself.
    varies = variance > 1e-12 * squares / count.clamp(min=1)
    scaled = (values - mean) * (variance + 1e-8).rsqrt()
    return only(torch.where(varies, scaled, values).to(values.dtype), counts)


# Internal to the room.


def exact(values: Tensor) -> Tensor:
    """Values in the precision in which losses are computed: float64 if given so, else float32.

    Args:
        values: of any dtype, integers too.
    """
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def only(values: Tensor, counts: Tensor | None) -> Tensor:
    """Values with 0 outside a mask, where neither they nor their gradients count, NaN or not.

    Args:
        values: any shape.
        counts: of the same shape, bool; None if all count.
    """
    return values if counts is None else values.masked_fill(~counts, 0.0)


def mean_where(values: Tensor, counts: Tensor | None) -> Tensor:
    """The mean of values that are 0 outside a mask.

    Args:
        values: any shape.
        counts: of the same shape, bool; None if all count.
    """
    if counts is None:
        return values.mean() if values.numel() else values.sum()
    return values.sum() / counts.sum().clamp(min=1)


def check_shapes(call: str, **tensors: Tensor | None) -> None:
    """Refuses tensors of different shapes, which would be broadcast in silence.

    Args:
        call: the function, for the message.
        **tensors: by the names of its arguments; the first has the right shape.

    Raises:
        ConfigError: a shape differs.
    """
    (name, first), *others = ((n, t) for n, t in tensors.items() if t is not None)
    for other, tensor in others:
        if tensor.shape != first.shape:
            raise ConfigError(
                f"{call}: {other} has shape {list(tensor.shape)}, but {name} has "
                f"{list(first.shape)}. Give both one element each for the same things."
            )


def check_choice(call: str, name: str, given: str, choices: Iterable[str]) -> None:
    """Refuses a name that there is not.

    Args:
        call: the function, for the message.
        name: of its argument.
        given: its value.
        choices: the values there are.

    Raises:
        ConfigError: it is none of them.
    """
    choices = list(choices)
    if given not in choices:
        raise ConfigError(
            f"{call}: there is no {name}={given!r}{nearest(str(given), choices)} There are "
            f"{', '.join(choices)}."
        )

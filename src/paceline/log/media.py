"""Values for `log` that are no numbers: images, histograms, text, tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline.errors import MetricError


@dataclass(frozen=True, eq=False)
class Image:
    """An image to log.

    Args:
        pixels: a tensor or an array of [height, width], [channels, height, width] or [height,
            width, channels], with 1, 3 or 4 channels; floats from 0 to 1, or bytes.

    Raises:
        MetricError: it has another shape.
    """

    pixels: Any

    def __post_init__(self) -> None:
        shape = tuple(torch.as_tensor(self.pixels).shape)
        if len(shape) == 3 and {shape[0], shape[2]} & {1, 3, 4}:
            return
        if len(shape) != 2:
            raise MetricError(
                f"Image(...) got a shape of {list(shape)}: it takes [height, width], or three "
                "dimensions of which the first or the last are 1, 3 or 4 channels."
            )

    @property
    def channels_first(self) -> torch.Tensor:
        """The pixels as [channels, height, width], on the CPU."""
        pixels = torch.as_tensor(self.pixels).detach().cpu()
        if pixels.dim() == 2:
            return pixels[None]
        return pixels if pixels.shape[0] in (1, 3, 4) else pixels.permute(2, 0, 1)


@dataclass(frozen=True, eq=False)
class Histogram:
    """Values whose distribution is to be logged.

    Args:
        values: a tensor or an array of numbers, of any shape.
    """

    values: Any


@dataclass(frozen=True)
class Text:
    """Text to log.

    Args:
        text: Markdown.
    """

    text: str


@dataclass(frozen=True)
class Table:
    """A table to log.

    Args:
        columns: their names.
        rows: a value for each column.

    Raises:
        MetricError: a row has another number of values.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise MetricError(
                    f"Table(...) has {len(self.columns)} columns, and a row of {len(row)} values."
                )

    @property
    def markdown(self) -> str:
        """The table as text."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


Media = Image | Histogram | Text | Table


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")

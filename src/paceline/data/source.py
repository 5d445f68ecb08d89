"""What the loop needs from its data: windows of micro-batches, and the position to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol


class Draw(NamedTuple):
    """The data of one window on this rank.

    Attributes:
        sizes: this rank's samples in each micro-batch; 0 marks a stand-in that keeps ranks in step,
            -1 a number that is unknown until the batch is counted.
        samples: samples of all ranks, or -1 if unknown.
        batch: returns the j-th micro-batch; call it in order.
        ids: returns the sample indices of the j-th micro-batch, if the loader knows them.
    """

    sizes: list[int]
    samples: int
    batch: Callable[[int], Any]
    ids: Callable[[int], list[Any]]


class Source(Protocol):
    """Training data as the loop sees it.

    Attributes:
        micro_batches: micro-batches of this rank in an epoch, None if unknown until the data ends.
        windows_per_epoch: optimizer steps in an epoch, or None.
        per_rank: whether each rank has a state of its own.
        plan: decisions about the data, as (decision, setting) pairs.
        identity: settings that a resumed run must not change.
    """

    micro_batches: int | None
    windows_per_epoch: int | None
    per_rank: bool
    plan: list[tuple[str, str]]
    identity: dict[str, Any]

    def start_epoch(self, epoch: int) -> None:
        """Moves to the first window of `epoch`, or to the position of a loaded state in it."""
        ...

    def draw(self) -> Draw | None:
        """The next window, or None at the epoch's end."""
        ...

    def at_end(self, *, keep: bool) -> bool:
        """Whether the epoch ends here.

        Args:
            keep: whether `state_dict` may be called before the next draw.
        """
        ...

    def batches_done(self) -> int:
        """The micro-batches of the epoch that this rank has done."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, between two windows."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the position in `state`."""
        ...

    def close(self) -> None:
        """Ends worker processes."""
        ...


class Validation(Protocol):
    """Validation data: each sample once over all ranks.

    Attributes:
        length: micro-batches of this rank, or None.
        plan: what was decided about the data, as (decision, setting) pairs.
    """

    length: int | None
    plan: list[tuple[str, str]]

    def batches(self) -> Iterator[tuple[Any, int]]:
        """This rank's (batch, samples) pairs; samples is -1 if unknown.

        A batch of 0 samples is a stand-in that keeps ranks in step.
        """
        ...

    def close(self) -> None: ...


def batches_in(validation: Mapping[str | None, Validation]) -> int | None:
    """This rank's micro-batches in all of the validation data, or None if one does not say."""
    lengths = [data.length for data in validation.values()]
    return None if None in lengths else sum(length for length in lengths if length is not None)

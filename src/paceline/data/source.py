"""What the loop asks of its data: windows of micro-batches, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol


class Draw(NamedTuple):
    """What one window takes from the data on this rank.

    Attributes:
        sizes: this rank's samples in each micro-batch; 0 is a stand-in that keeps ranks in step,
            -1 is unknown until the batch is counted.
        samples: samples of all ranks, or -1 if the loader does not say.
        batch: the j-th micro-batch; to be asked for in order.
        ids: the sample indices of the j-th micro-batch, if the loader knows them.
    """

    sizes: list[int]
    samples: int
    batch: Callable[[int], Any]
    ids: Callable[[int], list[Any]]


class Source(Protocol):
    """Training data, seen from the loop.

    Attributes:
        micro_batches: micro-batches of this rank in an epoch, None if only the end will tell.
        windows_per_epoch: optimizer steps in an epoch, or None.
        per_rank: whether each rank's state is its own.
        plan: what was decided about the data, as (decision, setting) pairs.
        identity: what a resumed run must find unchanged.
    """

    micro_batches: int | None
    windows_per_epoch: int | None
    per_rank: bool
    plan: list[tuple[str, str]]
    identity: dict[str, Any]

    def start_epoch(self, epoch: int) -> None:
        """Stands at the first window of `epoch`, unless a loaded state says where in it."""
        ...

    def draw(self) -> Draw | None:
        """The next window, or None at the epoch's end."""
        ...

    def at_end(self, *, keep: bool) -> bool:
        """Whether the epoch ends here; `keep` if a state may be taken before the next draw."""
        ...

    def batches_done(self) -> int:
        """This rank's micro-batches before here in the epoch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands, between two windows."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back to where `state` was taken."""
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
        """This rank's (batch, samples) pairs; samples is -1 if the loader does not say.

        Those of 0 samples are stand-ins, which keep ranks in step.
        """
        ...

    def close(self) -> None: ...


def batches_in(validation: Mapping[str | None, Validation]) -> int | None:
    """This rank's micro-batches in all of the validation data, or None if one does not say."""
    lengths = [data.length for data in validation.values()]
    return None if None in lengths else sum(length for length in lengths if length is not None)

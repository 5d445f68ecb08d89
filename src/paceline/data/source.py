"""What the loop needs from its data: windows of micro-batches, and the position to resume from.

A training source of one's own (rollouts, a simulator, a stream) is given as `train_dataloader`: an
object that keeps the `Source` protocol, or one with `open_source`, which makes a source for each
run (`SourceFactory`). What it has to do, beside the methods of `Source`:

- `draw` gives this rank's micro-batches of the next optimizer step. Ranks may differ in how many
  there are in a window, and in how many windows an epoch has: where a rank has fewer than another,
  its last batch stands in with weight zero. The loss is the mean over the items of all ranks.
- `state_dict` is asked before each draw, and gives a snapshot: copies of what is later written to
  in place. It may hold numbers, strings, tensors, arrays, and lists, tuples and dictionaries of
  them. With `per_rank` each rank's state is saved, and the run resumes on as many ranks; else the
  states are equal, and rank 0's is saved.
- What is drawn depends on that state, the models and random numbers alone. The global generators of
  torch, numpy and `random` are seeded for each draw, by step and data-parallel rank, and are no
  part of the state; a generator of the source's own is. Ranks with the same `world.dp_rank` share
  samples (`parallel.tensor`, `parallel.context`): they draw the same.
- A draw that takes long asks `stopping()` now and then, each rank as often as it likes, and raises
  `StopCollecting` once that is true. It need not tidy up: the run saves the state from before the
  draw, drops what other ranks have drawn, and draws that window anew when it is resumed.
- So such a draw must not wait for another rank's, which may have been given up. Ranks wait for each
  other after it, for `parallel.timeout` seconds at most.
- A source may have `collect()`, which is called before an epoch's first draw, and may take long.
  Then `draw` does not ask whether to stop and comes to the same end on all ranks soon, so that it
  may exchange what was collected (`World.all_gather_object`). An epoch for which nothing was
  collected may have no window: its first draw gives None, and `at_end` is true.
- `identity` holds the settings that decide what is drawn, as plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from paceline.errors import ConfigError, counted
from paceline.world.world import World


class StopCollecting(Exception):
    """Raised by a source's `draw` to give up the window it is collecting, since the run stops."""


@dataclass(frozen=True)
class WindowSize:
    """How many samples an optimizer step sees.

    Args:
        gradient_accumulation_steps: micro-batches a rank accumulates for one step.
        global_batch_size: samples of all ranks in one step; if given, the accumulation follows.
        epoch_length: micro-batches a rank sees in an epoch; None for one pass over the loader.
    """

    gradient_accumulation_steps: int = 1
    global_batch_size: int | None = None
    epoch_length: int | None = None

    def micro_batches(self, batch_size: int, dp_size: int) -> int:
        """Micro-batches a rank accumulates for one step.

        Args:
            batch_size: samples in a micro-batch.
            dp_size: data-parallel ranks.

        Raises:
            ConfigError: `global_batch_size` is not a multiple of `batch_size` times `dp_size`.
        """
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        at_once = batch_size * dp_size
        accumulation, rest = divmod(self.global_batch_size, at_once)
        if rest or accumulation == 0:
            raise ConfigError(
                f"global_batch_size={self.global_batch_size} cannot be made of micro-batches of "
                f"{batch_size} samples on {counted(dp_size, 'rank')}: it must be a "
                f"multiple of {batch_size} x {dp_size} = {at_once}. Change the loader's "
                "batch_size, the number of ranks, or global_batch_size."
            )
        return accumulation


class Draw(NamedTuple):
    """The data of one window on this rank.

    Attributes:
        sizes: this rank's samples in each micro-batch; 0 is a stand-in that keeps ranks in step,
            -1 is unknown until the batch is counted.
        samples: samples of all ranks, or -1 to have all batches counted.
        batch: the j-th micro-batch; to be asked for in order, once.
        ids: the sample indices of the j-th micro-batch, if the loader knows them.
    """

    sizes: list[int]
    samples: int
    batch: Callable[[int], Any]
    ids: Callable[[int], list[Any]]

    @classmethod
    def of(cls, batches: Sequence[Any]) -> Draw:
        """The draw of batches that are there, whose items are to be counted.

        Args:
            batches: this rank's micro-batches.
        """
        return cls([-1] * len(batches), -1, batches.__getitem__, lambda j: [])


class Source(Protocol):
    """Training data as the loop sees it.

    Attributes:
        micro_batches: micro-batches of this rank in an epoch, None if unknown until the data ends.
        windows_per_epoch: optimizer steps in an epoch, or None if unknown until the data ends.
        per_rank: whether each rank has a state of its own.
        plan: decisions about the data, as (decision, setting that changes it) pairs.
        identity: settings that a resumed run must not change.
    """

    micro_batches: int | None
    windows_per_epoch: int | None
    per_rank: bool
    plan: list[tuple[str, str]]
    identity: dict[str, Any]

    def start_epoch(self, epoch: int) -> None:
        """Goes to the first window of `epoch`; called within that epoch, after a resume, it stays.

        Args:
            epoch: epochs done before it.
        """
        ...

    def draw(self) -> Draw | None:
        """The next window, or None at the epoch's end, as often as it is asked there.

        Raises:
            StopCollecting: the run stops before this window, as `stopping()` has said.
        """
        ...

    def at_end(self, *, keep: bool) -> bool:
        """Whether the epoch ends here, asked behind each window.

        Args:
            keep: a state may be taken before the next draw, which one that reads ahead to answer
                has to keep for that; always true for a source of one's own.
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
        """Ends worker processes and the like; may be called more than once."""
        ...


class SourceFactory(Protocol):
    """What makes a training source for each run."""

    def open_source(
        self, size: WindowSize, seed: int, world: World, stopping: Callable[[], bool]
    ) -> Source:
        """Makes the source of a run that begins.

        Args:
            size: the Trainer's settings on the size of windows, for the source to follow.
            seed: the run's seed.
            world: the ranks; the models are not yet placed.
            stopping: whether the run stops before the window that is being collected. To be asked
                within `draw`, by each rank for itself.
        """
        ...


class Stopping(Protocol):
    """The ranks' agreement on stopping before a window, as `CustomSource` takes part in it."""

    @property
    def global_step(self) -> int:
        """Windows done."""
        ...

    def asked(self) -> bool:
        """Whether the run stops before the next window; each rank may ask for itself.

        Raises:
            PeerError: another rank has failed.
        """
        ...

    def decided(self) -> bool:
        """The same, equal on all ranks; to be asked once all of them have ended their draws.

        Raises:
            PeerError: another rank has failed.
        """
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


def windows_in(source: Any, epochs: int | None, max_steps: int | None) -> int | None:
    """Optimizer steps in a whole run, or None if unknown until the data ends.

    Args:
        source: of the training data; one that makes sources, as far as it knows.
        epochs, max_steps: the end of the run, whichever comes first.
    """
    per_epoch = getattr(source, "windows_per_epoch", None)
    if per_epoch is None or epochs is None:
        return max_steps
    count = getattr(source, "windows_in", None)
    steps = per_epoch * epochs if count is None else count(epochs, max_steps)
    return steps if max_steps is None else min(steps, max_steps)


def batches_in(validation: Mapping[str | None, Validation], most: int | None = None) -> int | None:
    """This rank's micro-batches in all of the validation data, or None if one does not say.

    Args:
        validation: the data of each loader.
        most: micro-batches that are read of each; None for all.
    """
    lengths = [data.length for data in validation.values()]
    known = [length for length in lengths if length is not None]
    if len(known) < len(lengths):
        return None
    return sum(known) if most is None else sum(min(length, most) for length in known)

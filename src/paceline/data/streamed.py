"""Data that can only be iterated: streaming sets, torchdata's StatefulDataLoader, generators.

Each rank iterates its own loader, which has to know its share of the data. A loader with
`state_dict` is asked where it stands; any other is replayed to its place at resume.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from paceline.data.source import Draw
from paceline.errors import DataError
from paceline.world.seeding import seed_everything, stream
from paceline.world.world import World

_END = object()


class StreamedSource:
    """Training windows from an iterable (`Source`).

    Args:
        loader: yields batches; has `state_dict` and `load_state_dict`, or is replayed at resume.
        micro_batches_per_window: micro-batches a rank accumulates for one optimizer step.
        epoch_length: micro-batches in an epoch; None for one pass over the loader.
        seed: the run's seed; whatever the loader draws is seeded from (seed, pass, batch).
        world: ranks agree on each window's length and on the epoch's end.
        plan: what was decided, for the printed plan.
    """

    per_rank = True

    def __init__(
        self,
        loader: Iterable[Any],
        micro_batches_per_window: int,
        epoch_length: int | None,
        seed: int,
        world: World,
        plan: list[tuple[str, str]],
    ) -> None:
        self._loader: Any = loader
        self._stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._count = micro_batches_per_window
        self._seed = seed
        self._world = world
        self._epoch_length = epoch_length
        self.micro_batches = epoch_length or _length(loader)
        self.windows_per_epoch = (
            None
            if self.micro_batches is None
            else -(-self.micro_batches // micro_batches_per_window)
        )
        self.identity: dict[str, Any] = {"order": "the loader's own"}
        self.plan = plan
        self._epoch = 0
        self._pass = 0
        self._in_pass = 0  # batches drawn in this pass
        self._in_epoch = 0  # batches drawn in this epoch
        self._ended = False  # this rank's loader has no more batches in this epoch
        self._iterator: Iterator[Any] | None = None
        self._held: Any = _END  # a batch drawn ahead, to see whether the epoch goes on
        self._kept: dict[str, Any] | None = None  # the state from before `_held`
        self._last: Any = None  # for a stand-in when another rank has more batches

    def start_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._in_epoch, self._ended = epoch, 0, False
        if self._iterator is None and not self._ended:
            self._open()

    def draw(self) -> Draw | None:
        limit = self._count
        if self._epoch_length is not None:
            limit = min(limit, self._epoch_length - self._in_epoch)
        batches: list[Any] = []
        while len(batches) < limit and (batch := self._pull()) is not _END:
            batches.append(batch)
        drawn = len(batches)
        longest = max(self._world.all_gather_object(drawn)) if self._world.size > 1 else drawn
        self._in_epoch += longest
        if longest == 0:
            if self._in_epoch == 0:
                raise DataError("the training loader yields no batch.")
            return None
        if batches:
            self._last = batches[-1]
        elif self._last is None:
            raise DataError(
                f"rank {self._world.rank}'s loader yields no batch while another rank's does: "
                "give every rank at least one."
            )
        batches += [self._last] * (longest - drawn)
        return Draw([-1] * drawn + [0] * (longest - drawn), -1, batches.__getitem__, lambda j: [])

    def at_end(self, *, keep: bool) -> bool:
        if self._epoch_length is not None:
            return self._in_epoch >= self._epoch_length
        self._kept = self.state_dict() if keep else None
        self._held = self._pull()
        ended = self._held is _END
        if self._world.size > 1:
            ended = all(self._world.all_gather_object(ended))
        if ended:
            self._kept = None
        return ended

    def batches_done(self) -> int:
        return self._in_epoch

    def state_dict(self) -> dict[str, Any]:
        if self._kept is not None:
            return self._kept
        if self._held is not _END:
            raise DataError("the loader has been read ahead of the state that is asked for.")
        return {
            "epoch": self._epoch,
            "pass": self._pass,
            "in_pass": self._in_pass,
            "in_epoch": self._in_epoch,
            "ended": self._ended,
            "open": self._iterator is not None,
            "loader": self._loader.state_dict() if self._stateful else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._pass = state["epoch"], state["pass"]
        self._in_pass, self._in_epoch = state["in_pass"], state["in_epoch"]
        self._held, self._kept, self._iterator = _END, None, None
        self._ended = state["ended"]
        if self._stateful and state["loader"] is not None:
            self._loader.load_state_dict(state["loader"])
        if not state["open"]:
            return
        self._open()
        if not self._stateful and self._in_pass:
            self._replay(self._in_pass)

    def close(self) -> None:
        self._iterator = None

    def _open(self) -> None:
        # Making an iterator draws from the global generators; so may the loader's shuffling.
        seed_everything(stream(self._seed, "loader", self._pass))
        self._iterator = iter(self._loader)

    def _pull(self) -> Any:
        """The next batch of this pass, or of the next pass if epochs have a fixed length."""
        if self._held is not _END:
            batch, self._held, self._kept = self._held, _END, None
            return batch
        if self._iterator is None:
            return _END
        batch = self._next()
        if batch is _END and self._epoch_length is not None:
            if self._in_pass == 0:
                raise DataError("the training loader yields no batch.")
            self._pass, self._in_pass = self._pass + 1, 0
            self._open()
            batch = self._next()
        elif batch is _END:
            self._pass, self._in_pass = self._pass + 1, 0
            self._ended, self._iterator = True, None
        return batch

    def _next(self) -> Any:
        assert self._iterator is not None
        seed_everything(stream(self._seed, "batch", self._pass, self._in_pass))
        batch = next(self._iterator, _END)
        self._in_pass += batch is not _END
        return batch

    def _replay(self, batches: int) -> None:
        warnings.warn(
            f"resume reads {batches} batches again to find its place, because "
            f"{type(self._loader).__name__} has no state_dict; torchdata's StatefulDataLoader or "
            "a map-style dataset resumes at once."
        )
        self._in_pass = 0
        for _ in range(batches):
            if self._next() is _END:
                raise DataError(
                    f"the training loader ended after {self._in_pass} batches where the stopped "
                    f"run had read {batches}: its data have changed."
                )


class StreamedValidation:
    """Validation over an iterable (`Validation`); each rank iterates its own share."""

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        self._loader = loader
        self._seed = seed
        self.length = _length(loader)

    def batches(self) -> Iterator[tuple[Any, int]]:
        seed_everything(stream(self._seed, "loader", -1))
        for i, batch in enumerate(self._loader):
            yield batch, -1
            seed_everything(stream(self._seed, "val-sample", i))

    def close(self) -> None:
        """Nothing is held between validations."""


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None

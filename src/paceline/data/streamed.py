"""Data that can only be iterated: streaming sets, torchdata's StatefulDataLoader, generators.

Each rank iterates its own loader, which has to know its share of the data. Ranks that work on the
same samples (tensor or context parallelism) have the same share, which is checked. A loader with
`state_dict` saves its position; any other is replayed to its position on resume.

An iterator is created, and its first batch read, under the same random stream on every rank, so
that a loader may shuffle all the data before it takes its share; later batches have one stream per
rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from torch.utils.data import Dataset, Sampler

from paceline.data.alike import borrowed, check_alike, fingerprint
from paceline.data.batches import first_dimension, stacked_by_torch
from paceline.data.fetch import tell_pass, told_of_passes
from paceline.data.kept import Kept
from paceline.data.source import Draw
from paceline.data.workers import Reading
from paceline.errors import DataError
from paceline.world.seeding import seed_everything, stream
from paceline.world.world import World

_END = object()


class StreamedSource:
    """Training windows from an iterable (`Source`).

    Args:
        loader: yields batches; has `state_dict` and `load_state_dict`, or is replayed on resume.
        micro_batches_per_window: micro-batches a rank accumulates for one optimizer step.
        epoch_length: micro-batches in an epoch; None for one pass over the loader.
        seed: the run's seed; the loader's random numbers are seeded from (seed, pass, batch).
        world: the ranks that agree on each window's length and on the end of the epoch.
        plan: decisions, for the printed plan.
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
        self.micro_batches_per_window = micro_batches_per_window
        self._seed = seed
        self._world = world
        self._epoch_length = epoch_length
        self.micro_batches = epoch_length or _length(loader)
        self.windows_per_epoch = (
            None
            if self.micro_batches is None
            else -(-self.micro_batches // micro_batches_per_window)
        )
        told = self.micro_batches is not None and epoch_length is None
        if told and not isinstance(loader, list | tuple):
            text = f"the run's length is counted with {self.micro_batches} batches an epoch"
            plan.append((f"{text}, as len(train_dataloader) says", "epoch_length"))
        self.identity: dict[str, Any] = {"order": "the loader's own"}
        self.plan = plan
        self._epoch = 0
        self._pass = 0
        self._in_pass = 0  # batches drawn in this pass
        self._in_epoch = 0  # batches drawn in this epoch
        self._ended = False  # this rank's loader has no more batches in this epoch
        self._size = first_dimension if stacked_by_torch(loader) else _untold
        self._reading = Reading(loader)
        self._iterator: Iterator[Any] | None = None
        self._held: Any = _END  # a batch drawn ahead, to see whether the epoch continues
        self._kept: dict[str, Any] | None = None  # the state before `_held` was drawn
        self._begun = False  # the loader has been read, in this process or before a resume
        self._last: Any = _END  # for a stand-in when another rank has more batches
        self._compared = False  # whether the ranks' shares have been compared
        # torchdata's loaders save what is in them, but for their generator.
        self._objects = Kept(loader, ("loader",)) if self._stateful else Kept(loader)
        self._at_open: dict[str, Any] = {}  # what they kept as this pass was opened
        if self._reading.keeps_workers:
            plan.append((_ANEW, "persistent_workers"))

    def start_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._in_epoch, self._ended = epoch, 0, False
        if self._iterator is None and not self._ended:
            self._open()

    def draw(self) -> Draw | None:
        limit = self.micro_batches_per_window
        if self._epoch_length is not None:
            limit = min(limit, self._epoch_length - self._in_epoch)
        batches: list[Any] = []
        while len(batches) < limit and (batch := self._pull()) is not _END:
            batches.append(batch)
        drawn = len(batches)
        longest = self._level(batches) if self._world.size > 1 else drawn
        self._in_epoch += longest
        if longest == 0:
            if self._in_epoch == 0:
                raise DataError("the training loader yields no batch.")
            return None
        sizes = [self._size(batch) for batch in batches[:drawn]] + [0] * (longest - drawn)
        return Draw(sizes, -1, batches.__getitem__, lambda j: [])

    def _level(self, batches: list[Any]) -> int:
        """Adds stand-ins until this rank has as many batches as any other; returns that number."""
        world, drawn = self._world, len(batches)
        alike = world.size // world.dp_size
        # Not the very first batch, which draws the same random numbers on every rank.
        compares = not self._compared and self._in_epoch + drawn > 1
        self._last = batches[-1] if batches else self._last
        read = fingerprint(batches) if compares or alike > 1 else b""
        told = world.all_gather_object((drawn, self._last is _END, compares, read))
        check_alike(told, world)
        longest = max(held for held, *_ in told)
        if longest and any(lacks for _, lacks, *_ in told):  # it has read nothing since it started
            lent = borrowed(world, [held for held, *_ in told], batches)
            self._last = lent if self._last is _END else self._last
        batches += [self._last] * (longest - drawn)
        shares = [read for *_, compares, read in told[::alike] if compares and read]
        if len(shares) == world.dp_size:
            self._compared = True
            if world.dp_size > 1 and len(set(shares)) == 1:
                warnings.warn(
                    "every rank reads the same batches, so each sample is seen "
                    f"{world.dp_size} times a pass: give each rank its share of the data "
                    "(dp_rank of dp_size, of trainer.world), or use a map-style dataset, which "
                    "Paceline splits."
                )
        return longest

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
            raise DataError("the loader was read beyond the position of the state to be saved.")
        opened = self._iterator is not None
        return {
            "epoch": self._epoch,
            "pass": self._pass,
            "in_pass": self._in_pass,
            "in_epoch": self._in_epoch,
            "ended": self._ended,
            "open": opened,
            # A loader not yet read would create its iterator now, under another random stream.
            "loader": self._loader.state_dict() if self._stateful and self._begun else None,
            "kept": self._objects.state() if self._stateful or not opened else self._at_open,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._pass = state["epoch"], state["pass"]
        self._in_pass, self._in_epoch = state["in_pass"], state["in_epoch"]
        self._held, self._kept, self._iterator = _END, None, None
        self._ended = state["ended"]
        if self._stateful and state["loader"] is not None:
            self._loader.load_state_dict(state["loader"])
        kept = state.get("kept", {})
        if not state["open"] or not self._stateful:
            self._objects.load(kept)
        if not state["open"]:
            return
        self._open()
        if self._stateful:
            self._objects.load(kept)
        elif self._in_pass:
            done = self._in_pass
            try:
                self._replay(done)
            except DataError:  # what a dataset gives may be its position, not what it begins with
                self._objects.load(kept, generators_only=True)
                self._open()
                self._replay(done)

    def close(self) -> None:
        self._reading.close()
        self._iterator = None

    def _open(self) -> None:
        dataset = getattr(self._loader, "dataset", None)
        for thing, kind in ((self._loader, Sampler), (dataset, Dataset)):
            tell_pass(told_of_passes(thing, kind), self._pass)
        if self._reading.keeps_workers:
            self._reading.close()
        self._at_open = {} if self._stateful else self._objects.state()
        # Creating an iterator draws from the global generators; so may the loader's shuffling.
        seed_everything(stream(self._seed, "loader", self._pass))
        self._iterator, self._begun = self._reading.start(), True

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
        seed_everything(_batch_seed(self._seed, "batch", self._pass, self._in_pass, self._world))
        batch = next(self._iterator, _END)
        self._in_pass += batch is not _END
        return batch

    def _replay(self, batches: int) -> None:
        warnings.warn(
            f"resuming reads {batches} batches again to restore the position, because "
            f"{type(self._loader).__name__} has no state_dict; torchdata's StatefulDataLoader or "
            "a map-style dataset resumes directly."
        )
        self._in_pass = 0
        for _ in range(batches):
            if self._next() is _END:
                raise DataError(
                    f"the training loader ended after {self._in_pass} batches where the stopped "
                    f"run had read {batches}: its data have changed."
                )


class StreamedValidation:
    """Validation over an iterable (`Validation`); each rank iterates its own share.

    If a model's forward pass communicates, a rank without further batches repeats its last one as a
    stand-in.

    Args:
        loader: yields batches.
        seed: of whatever it draws.
        world: the ranks.
        setting: what errors call the loader.
        label: what the plan calls the validation.
    """

    def __init__(
        self, loader: Iterable[Any], seed: int, world: World, setting: str, label: str
    ) -> None:
        self.plan: list[tuple[str, str]] = []
        if world.dp_size > 1:
            own = f"{label}: each rank iterates its own loader, which must know its share"
            self.plan.append((own, setting))
        self._setting = setting
        self._loader = loader
        self._seed = seed
        self._world = world
        self._in_step = world.parallel.partitions_state or world.parallel.context > 1
        self.length = _length(loader)
        self._size = first_dimension if stacked_by_torch(loader) else _untold
        self._reading = Reading(loader)
        self._objects = Kept(loader)
        if self._reading.keeps_workers:
            self.plan.append((f"{label}: {_ANEW}", setting))

    def state_dict(self) -> dict[str, Any]:
        """What the loader's objects keep from one validation to the next."""
        return self._objects.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._objects.load(state)

    def batches(self) -> Iterator[tuple[Any, int]]:
        before, abandoned = self._objects.state(), True
        seed_everything(stream(self._seed, "loader", -1))
        reading = self._reading.start()
        try:
            last: Any = _END
            for i in count():
                batch = next(reading, _END)
                if not self._goes_on(batch, first=i == 0):
                    break
                yield (last, 0) if batch is _END else (batch, self._size(batch))
                last = last if batch is _END else batch
                seed_everything(_batch_seed(self._seed, "val-sample", 0, i + 1, self._world))
            abandoned = False
        finally:
            self.close()
            if abandoned:  # a resumed run begins it again
                self._objects.load(before)

    def _goes_on(self, batch: Any, *, first: bool) -> bool:
        """Whether this rank, or any rank that it has to keep in step with, has a batch."""
        if not self._in_step:
            return batch is not _END
        alike = self._world.size > self._world.dp_size
        read = fingerprint([batch]) if alike else b""
        told = self._world.all_gather_object((batch is not _END, read))
        check_alike(told, self._world)
        has = [there for there, _ in told]
        if first and any(has) and not all(has):
            raise DataError(
                f"{self._setting}: rank {has.index(False)} yields no batch; with sharded or split "
                "models each rank needs at least one batch."
            )
        return any(has)

    def close(self) -> None:
        self._reading.close()


_ANEW = "workers start anew with each pass: what they keep could not be restored on resume"


def _untold(batch: Any) -> int:
    return -1


def _batch_seed(seed: int, label: str, pass_: int, index: int, world: World) -> int:
    return stream(seed, label, pass_, index, world.dp_rank if index else 0)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None

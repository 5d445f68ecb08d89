"""Map-style data: every position is computed, so any number of ranks sees the same windows.

An epoch is a range of units (samples; or batches, if a batch sampler makes them). A window is the
next `micro_batches x batch_size x ranks` units and never crosses the end of an epoch. Each
micro-batch is a contiguous run of the window, split evenly over the ranks: 1 rank that accumulates
4 micro-batches and 4 ranks that accumulate 1 compute the same windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from paceline.data.fetch import Fetcher, Request, plain
from paceline.data.kept import Kept
from paceline.data.order import ORDER_VERSION, Order, Sampled
from paceline.data.source import Draw
from paceline.data.workers import iterate, stop_workers
from paceline.errors import DataError


class Layout:
    """The arithmetic of splitting units over micro-batches and ranks.

    Args:
        order: the units of each pass.
        batch_size: units in a rank's micro-batch (1 if units are batches).
        dp_rank, dp_size: this replica and their number.
        epoch_length: micro-batches a rank sees in an epoch; None for one pass over the data.
        batched: each unit is a list of sample indices from a batch sampler.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        dp_rank: int,
        dp_size: int,
        epoch_length: int | None = None,
        *,
        batched: bool = False,
    ) -> None:
        self.order = order
        self.batched = batched
        self.chunk = batch_size * dp_size
        self._rank, self._ranks = dp_rank, dp_size
        self._epoch_units = None if epoch_length is None else epoch_length * self.chunk
        if order.length(0) < 1:
            raise DataError("the training data is empty: no sample is left to train on.")

    def units(self, epoch: int) -> int:
        """Units in `epoch`, all ranks together."""
        return self._epoch_units or self.order.length(epoch)

    @property
    def has_fixed_epochs(self) -> bool:
        """Whether an epoch has as many units as was asked for, whatever a pass has."""
        return self._epoch_units is not None

    def pass_at(self, epoch: int) -> int | None:
        """The pass over the data that begins with `epoch`, if one does."""
        if self._epoch_units is None:
            return epoch
        pass_, position = divmod(epoch * self._epoch_units, self.order.length(0))
        return None if position else pass_

    def micro_batches(self, epoch: int) -> int:
        """Micro-batches a rank sees in `epoch`."""
        return -(-self.units(epoch) // self.chunk)

    def repartition(self, rank: int, ranks: int) -> bool:
        """Changes the rank and the number of ranks that share the units.

        Args:
            rank: this rank among them.
            ranks: their number.

        Returns:
            Whether either has changed.
        """
        is_new = (rank, ranks) != (self._rank, self._ranks)
        self.chunk = self.chunk // self._ranks * ranks
        self._rank, self._ranks = rank, ranks
        return is_new

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This rank's part of some units; ranks' parts differ by at most one unit.

        Args:
            start: the first unit in the epoch.
            stop: the unit after the last.

        Returns:
            The first unit of the part, and the unit after its last.
        """
        if self._ranks == 1:
            return start, stop
        base, extra = divmod(stop - start, self._ranks)
        first = start + self._rank * base + min(self._rank, extra)
        return first, first + base + (self._rank < extra)

    def request(self, epoch: int, start: int, stop: int) -> Request:
        """The samples of some units, by pass.

        Args:
            epoch: the epoch, from 0.
            start: the first unit in the epoch.
            stop: the unit after the last.
        """
        if self._epoch_units is None:
            return [(epoch, self._samples(epoch, start, stop))]
        length = self.order.length(0)
        position, end = epoch * self._epoch_units + start, epoch * self._epoch_units + stop
        runs: list[tuple[int, Any]] = []
        while position < end:
            pass_, first = divmod(position, length)
            last = min(length, first + end - position)
            runs.append((pass_, self._checked_slice(pass_, first, last, length)))
            position += last - first
        return runs

    def _checked_slice(self, pass_: int, first: int, last: int, length: int) -> Any:
        if self.order.length(pass_) != length:
            raise DataError(
                f"the sampler gave {length} units in its first pass and "
                f"{self.order.length(pass_)} in pass {pass_}: with epoch_length set, every pass "
                "must have the same length. Leave epoch_length out, or use another sampler."
            )
        return self._samples(pass_, first, last)

    def _samples(self, pass_: int, first: int, last: int) -> Sequence[Any]:
        units = self.order.slice(pass_, first, last)
        return [sample for unit in units for sample in unit] if self.batched else units

    def count(self, epoch: int, start: int, stop: int) -> int:
        """The number of samples in some units.

        Args:
            epoch: the epoch, from 0.
            start: the first unit in the epoch.
            stop: the unit after the last.
        """
        if not self.batched:
            return stop - start
        return sum(len(run) for _, run in self.request(epoch, start, stop))

    def requests(self, epoch: int, offset: int, *, endless: bool) -> Iterator[Request]:
        """This rank's requests, one per micro-batch.

        Args:
            epoch: the epoch to start in, from 0.
            offset: the unit in it to start at.
            endless: continue with the following epochs.
        """
        while True:
            end = self.units(epoch)
            while offset < end:
                stop = min(offset + self.chunk, end)
                first, last = self.share(offset, stop)
                # A rank without a unit runs the micro-batch's first one with weight zero.
                yield self.request(
                    epoch, *((first, last) if last > first else (offset, offset + 1))
                )
                offset = stop
            if not endless:
                return
            epoch, offset = epoch + 1, 0


class _Requests:
    """A batch sampler for torch's DataLoader."""

    def __init__(self, layout: Layout, epoch: int, offset: int, *, endless: bool) -> None:
        self._arguments = layout, epoch, offset, endless

    def __iter__(self) -> Iterator[Request]:
        layout, epoch, offset, endless = self._arguments
        return layout.requests(epoch, offset, endless=endless)


class Reader:
    """Turns requests into batches, in this process or in the loader's number of workers."""

    def __init__(self, fetcher: Fetcher, loader: DataLoader, layout: Layout) -> None:
        self._fetcher = fetcher
        self._layout = layout
        self._loader = loader
        self.persistent = loader.persistent_workers
        # Workers have copies, which this process cannot ask for their state.
        parts = () if loader.num_workers else ("dataset", "collate_fn")
        self.objects = Kept(loader, parts)
        self.unheard = Kept(loader, ("dataset", "collate_fn")).names if loader.num_workers else []

    def read(self, epoch: int, offset: int, *, endless: bool = False) -> Iterator[Any]:
        """This rank's batches.

        Args:
            epoch: the epoch to start in, from 0.
            offset: the unit in it to start at.
            endless: continue with the following epochs.
        """
        requests = _Requests(self._layout, epoch, offset, endless=endless)
        self._fetcher.take(self._loader.collate_fn)
        if self._loader.num_workers == 0:
            return self._read_here(requests)
        theirs = self._loader
        return iterate(
            DataLoader(
                self._fetcher,
                batch_sampler=requests,  # pyright: ignore[reportArgumentType]
                collate_fn=self._fetcher.collate,
                num_workers=theirs.num_workers,
                pin_memory=theirs.pin_memory,
                timeout=theirs.timeout,
                worker_init_fn=theirs.worker_init_fn,
                multiprocessing_context=theirs.multiprocessing_context,
                prefetch_factor=theirs.prefetch_factor,
                # Its own generator: creating an iterator must not draw from the global one.
                generator=torch.Generator().manual_seed(0),
            )
        )

    def _read_here(self, requests: _Requests) -> Iterator[Any]:
        fetch = self._fetcher
        # As a DataLoader without workers does: from other memory a copy to the device may wait.
        pins = self._loader.pin_memory and torch.accelerator.is_available()
        for request in requests:
            yield pin_memory(fetch(request)) if pins else fetch(request)


# What is drawn at most to count a run's steps, beside the first two passes.
_COUNTED_PASSES, _COUNTED_UNITS = 100, 1_000_000
_TO_BE_DRAWN = -1  # an epoch's end, before its order is known


class IndexedSource:
    """Training windows over map-style data (`Source`).

    Args:
        layout: splits the units.
        reader: reads them.
        micro_batches_per_window: micro-batches a rank accumulates for one optimizer step.
        sizes_known: whether a unit is one sample (not with a loader's batch_size=None).
        identity: settings that a resumed run must not change.
        plan: decisions, for the printed plan.
        sampled: the order, if it is that of the user's own sampler.

    Attributes:
        estimates: whether `windows_in` has counted the first passes only, of different lengths.
    """

    per_rank = False
    estimates = False

    def __init__(
        self,
        layout: Layout,
        reader: Reader,
        micro_batches_per_window: int,
        *,
        sizes_known: bool,
        identity: dict[str, Any],
        plan: list[tuple[str, str]],
        sampled: Sampled | None = None,
    ) -> None:
        self._layout = layout
        self._reader = reader
        follows = sampled is not None and sampled.follows
        self._sampled = sampled if follows else None
        # The order whose passes may differ in length, and can be drawn ahead.
        self._varying = None if follows or layout.has_fixed_epochs else sampled
        self._counted: dict[tuple[int, int | None], int] = {}
        self._endless = reader.persistent and self._sampled is None
        self._window = micro_batches_per_window * layout.chunk
        self._sizes_known = sizes_known
        self.micro_batches: int | None = layout.micro_batches(0)
        self.windows_per_epoch: int | None = -(-self.micro_batches // micro_batches_per_window)
        self.identity = {**identity, "order_version": ORDER_VERSION, "units": layout.units(0)}
        self.plan = plan
        if reader.unheard:
            kept = ", ".join(reader.unheard)
            plan.append((f"what workers keep is not restored on resume: {kept}", "num_workers=0"))
        if follows and not layout.has_fixed_epochs:
            text = "the run's length is counted as if each pass were as long as the first"
            plan.append((text, "epoch_length"))
        self._epoch = 0
        self._offset = 0
        self._end = 0
        self._unread = 0  # micro-batches of the current window that have not been read
        self._batches: Iterator[Any] | None = None

    def start_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._offset = epoch, 0
        if not self._endless:
            self._batches = None
        if self._sampled is None:
            self._end = self._layout.units(epoch)
        elif self._offset == 0:
            self._end = _TO_BE_DRAWN

    def windows_in(self, epochs: int, most: int | None) -> int:
        """Optimizer steps in a run's first epochs, of which a sampler may make some longer.

        Args:
            epochs: how many.
            most: steps after which the count may end; None for no bound.
        """
        counted, asked = self._counted, (epochs, most)
        if asked not in counted:
            counted[asked] = self._count_windows(epochs, most)
        return counted[asked]

    def _count_windows(self, epochs: int, most: int | None) -> int:
        assert self.windows_per_epoch is not None
        if epochs < 2 or self._varying is None:
            return self.windows_per_epoch * epochs
        steps = done = units = 0
        with self._varying.looking_ahead():
            if self._varying.keeps_length:
                return self.windows_per_epoch * epochs
            while done < min(epochs, _COUNTED_PASSES) and (most is None or steps < most):
                if done > 1 and units > _COUNTED_UNITS:
                    break
                units += self._layout.units(done)
                steps += -(-self._layout.units(done) // self._window)
                done += 1
        self.estimates = done < epochs and (most is None or steps < most)
        return steps + round(steps / done * (epochs - done))

    def repartition(self, rank: int, ranks: int) -> None:
        """Splits the same windows among another number of ranks from the next window on.

        Args:
            rank: this rank among them.
            ranks: their number.
        """
        if self._layout.repartition(rank, ranks):
            self.close()

    def draw(self) -> Draw | None:
        if self._end == _TO_BE_DRAWN:  # now that all who listen to the epoch's start were called
            assert self._sampled is not None
            self._sampled.begin(self._layout.pass_at(self._epoch))
            self._end = self._layout.units(self._epoch)
        start, stop = self._offset, min(self._offset + self._window, self._end)
        if start == stop:
            return None
        if self._batches is None or self._unread:
            self._batches = self._reader.read(self._epoch, start, endless=self._endless)
        self._offset = stop
        layout, chunk = self._layout, self._layout.chunk
        shares: list[tuple[int, int]] = []
        sizes: list[int] = []
        for at in range(start, stop, chunk):
            first, last = share = layout.share(at, min(at + chunk, stop))
            shares.append(share)
            sizes.append(last - first)
        samples, self._unread = stop - start, len(shares)
        if layout.batched or not self._sizes_known:
            sizes, samples = self._count(shares, start, stop)
        return Draw(sizes, samples, self._read, partial(self._ids, self._epoch, shares))

    def _read(self, j: int) -> Any:
        assert self._batches is not None
        self._unread -= 1
        return next(self._batches)

    def _ids(self, epoch: int, shares: list[tuple[int, int]], j: int) -> list[Any]:
        return [unit for _, run in self._layout.request(epoch, *shares[j]) for unit in plain(run)]

    def _count(self, shares: list[tuple[int, int]], start: int, stop: int) -> tuple[list[int], int]:
        if self._sizes_known:
            count, epoch = self._layout.count, self._epoch
            return [count(epoch, *share) for share in shares], count(epoch, start, stop)
        return [-1 if last > first else 0 for first, last in shares], -1

    def at_end(self, *, keep: bool) -> bool:
        return self._offset >= self._end

    def batches_done(self) -> int:
        return -(-self._offset // self._layout.chunk)

    def state_dict(self) -> dict[str, Any]:
        sampler = {} if self._sampled is None else {"sampler": self._sampled.state_dict()}
        return {"epoch": self._epoch, "offset": self._offset, **sampler}

    def reader_state(self) -> dict[str, Any]:
        """What this rank's dataset keeps, such as a generator of its own."""
        return self._reader.objects.state()

    def load_reader_state(self, state: dict[str, Any]) -> None:
        """Takes back what `reader_state` gave."""
        self._reader.objects.load(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epoch, self._offset = state["epoch"], state["offset"]
        if self._sampled is not None:
            self._sampled.load_state_dict(state.get("sampler", {}))
        self._end = self._layout.units(self._epoch)
        self._batches = None

    def close(self) -> None:
        stop_workers(self._batches)
        self._batches = None


class IndexedValidation:
    """Validation over map-style data (`Validation`): each sample once, ranks evenly loaded."""

    def __init__(
        self, layout: Layout, reader: Reader, *, sizes_known: bool, plan: list[tuple[str, str]]
    ) -> None:
        self.plan = plan
        self._layout = layout
        self._reader = reader
        self._sizes_known = sizes_known
        self.length: int | None = layout.micro_batches(0)
        self._reading: Iterator[Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What this rank's dataset keeps from one validation to the next."""
        return self._reader.objects.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._reader.objects.load(state)

    def batches(self) -> Iterator[tuple[Any, int]]:
        end, chunk = self._layout.units(0), self._layout.chunk
        before, abandoned = self.state_dict(), True
        self._reading = reading = self._reader.read(0, 0)
        try:
            for start in range(0, end, chunk):
                first, last = self._layout.share(start, min(start + chunk, end))
                batch = next(reading)
                if last == first:
                    yield batch, 0
                else:
                    yield batch, self._layout.count(0, first, last) if self._sizes_known else -1
            abandoned = False
        finally:
            self.close()
            if abandoned:  # a resumed run begins it again
                self.load_state_dict(before)

    def close(self) -> None:
        stop_workers(self._reading)
        self._reading = None

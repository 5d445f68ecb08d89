"""One optimizer step's micro-batches and the weight of each in the window's mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from paceline.data.source import Draw
from paceline.errors import DataError
from paceline.trainer.run import KeptBuffers, Run
from paceline.trainer.weighting import count_window
from paceline.world.seeding import mix, seed_everything


class Window:
    """The micro-batches of one optimizer step; iterate it to get `(batch, batch_idx)` pairs.

    The step's loss is the mean over the window's items on all ranks. A micro-batch whose mean
    loss is over n of the window's N items therefore enters with weight n / N, times the number of
    data-parallel ranks, since DDP averages gradients over ranks.

    Iterating does for each micro-batch what does not depend on the model: fetches it, moves it to
    the device, seeds its random stream, switches gradient exchange on for the last one, and fires
    the batch events.

    Args:
        run: at hand.
        draw: what the training data gave for it.
        first_batch_idx: the index, within the epoch, of its first micro-batch.

    Attributes:
        items: items of all ranks in the window (a number, or a tensor if counted on a device).
        samples: samples of all ranks in the window.
        position: the place in the window of the micro-batch at hand, from 0.
        weight: of the micro-batch at hand in the window's mean.
        stand_in: whether the micro-batch at hand only keeps this rank in step with the others.
        loss: the loss that `backward` was last given, detached.
        discarded: whether a non-finite value keeps this window from the weights.
    """

    def __init__(self, run: Run, draw: Draw, first_batch_idx: int) -> None:
        self._run = run
        self._draw = draw
        self._first = first_batch_idx
        self.position = 0
        self._batches: list[Any] | None = None
        self._shares = run.world.dp_size  # by which the weights add up, as gradients average
        self.samples = draw.samples
        self.counts: list[Any] = draw.sizes
        self.items: Any = draw.samples
        self._whole: Any = draw.samples  # what weights are parts of: `items`, but never zero
        self.weight: Any = 1.0
        self.stand_in = False
        self.loss: Any = None
        self.batch: Any = None
        self.discarded = False
        if draw.samples < 0 or run.count_items is not None:
            self._count()

    def __len__(self) -> int:
        return len(self._draw.sizes)

    @property
    def batch_idx(self) -> int:
        """The index, within the epoch, of the micro-batch at hand."""
        return self._first + self.position

    @property
    def is_last(self) -> bool:
        """Whether the micro-batch at hand is the window's last."""
        return self.position == len(self._draw.sizes) - 1

    @property
    def weighs_nothing(self) -> bool:
        """Whether the micro-batch at hand is known to hold no item: a stand-in, or no tokens."""
        return not isinstance(self.weight, torch.Tensor) and self.weight == 0

    def ids(self) -> list[Any]:
        """The sample indices of the micro-batch at hand, if the loader knows them."""
        return [] if self.stand_in else self._draw.ids(self.position)

    def locator(self) -> Callable[[], list[Any]]:
        """What gives the sample indices of each micro-batch later, and holds no batch till then."""
        ids, sizes = self._draw.ids, self._draw.sizes
        return lambda: [ids(j) if size != 0 else [] for j, size in enumerate(sizes)]

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        if self.batch is not None:
            raise DataError(
                "a window's batches are read once: do all that a batch is for in one pass over "
                "the window (self.backward(loss, only=...) keeps several losses apart)."
            )
        run, events, progress = self._run, self._run.events, self._run.progress
        key = mix(run.model_key, progress.global_step)
        count = len(self._draw.sizes)
        for j in range(count):
            batch = self.present(j)
            seed_everything(mix(key, j))
            if events.on_train_batch_start and not self.stand_in:
                announce(run, self)
            for replica in run.placement.replicas:
                replica.begin(exchange=j == count - 1)
            for shards in run.placement.frozen:
                shards.begin()
            if self.stand_in:
                with buffers_kept(run):
                    yield batch, self._first + j
                continue
            yield batch, self._first + j
            progress.local_batches += 1
            for hook in events.on_train_batch_end:
                hook(batch, self._first + j, self.loss)
        run.batch_items = None

    def present(self, j: int) -> Any:
        """Makes a micro-batch the one at hand, and returns its batch."""
        self.position = j
        self.batch = self._fetch(j)
        self.stand_in = self._draw.sizes[j] == 0
        self._run.batch_items = self.counts[j]
        self.weight = self.counts[j] * self._shares / self._whole
        return self.batch

    def read(self) -> list[Any]:
        """All micro-batches, read before the first is run."""
        if self._batches is None:
            self._batches = [self._fetch(j) for j in range(len(self))]
        return self._batches

    def _fetch(self, j: int) -> Any:
        if self._batches is not None:
            return self._batches[j]
        batch, placement = self._draw.batch(j), self._run.placement
        return batch if placement.takes_batches_as_read else placement.local_batch(batch)

    def _count(self) -> None:
        """Counts items that only the batches tell: all of them are read before the first is run."""
        counted = count_window(self._run, self.read(), self._draw.sizes, self.samples)
        self.counts, self.items, self.samples, self._whole, self._shares = counted


def announce(run: Run, window: Window) -> None:
    """Calls who listens to a micro-batch's start; gradients made there are not kept.

    Args:
        run: whose listeners and optimizers these are.
        window: the micro-batch is the one at hand.
    """
    with gradients_aside(run.components.named_optimizers().values()):
        for hook in run.events.on_train_batch_start:
            hook(window.batch, window.batch_idx)


@contextmanager
def gradients_aside(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Within it parameters have no gradients; afterwards they have those of before, and no other.

    Args:
        optimizers: whose parameters these are.
    """
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    held = [(parameter, parameter.grad) for group in groups for parameter in group["params"]]
    for parameter, _ in held:
        parameter.grad = None
    yield
    for parameter, gradient in held:
        parameter.grad = gradient


class buffers_kept:
    """Leaves no trace of a stand-in's forward pass: no log entry and no running statistics.

    Args:
        run: whose models' buffers are kept.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._run.muted = True
        self._held = KeptBuffers(self._run)

    def __exit__(self, *_: Any) -> None:
        self._run.muted = False
        self._held.put_back()

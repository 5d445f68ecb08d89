"""Loaders that repeat their first batch, and epochs long enough for a number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Sampler

from paceline.data.loader import count_windows, is_indexed
from paceline.data.source import WindowSize
from paceline.errors import ConfigError


class FirstBatch(Sampler[int]):
    """The first samples of a dataset in each batch: an order.

    Args:
        batch_size: samples of a batch.
        batches: how many batches there are.
    """

    def __init__(self, batch_size: int, batches: int) -> None:
        self.batch_size, self.batches = batch_size, batches

    def __len__(self) -> int:
        return self.batch_size * self.batches

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.batches):
            yield from range(self.batch_size)


def first_batch_only(loader: Any, ranks: int) -> DataLoader[Any]:
    """A loader of as many batches, each of which has the dataset's first samples.

    Args:
        loader: of the training data.
        ranks: that share its batches.

    Raises:
        ConfigError: it is no plain DataLoader over a map-style dataset.
    """
    if (
        not is_indexed(loader)
        or loader.batch_size is None
        or type(loader.batch_sampler) is not BatchSampler
    ):
        raise ConfigError(
            "trainer.overfit_first_batch needs a DataLoader over a map-style dataset, with a "
            "batch_size, and none with a batch sampler of its own."
        )
    samples = len(loader.sampler)  # pyright: ignore[reportArgumentType]
    size = min(loader.batch_size, len(loader.dataset))  # pyright: ignore[reportArgumentType]
    if loader.drop_last:
        samples -= samples % loader.batch_size
    # Every rank has a whole batch in the last step too.
    batches = -(-samples // (loader.batch_size * ranks)) * ranks
    return DataLoader(
        loader.dataset,
        batch_size=size,
        sampler=FirstBatch(size, batches),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def epoch_for(
    min_steps: int, loader: Any, size: WindowSize, epochs: int, ranks: int, seed: int
) -> int | None:
    """How long an epoch has to be, so that all of them together have a number of steps.

    Args:
        min_steps: optimizer steps.
        loader: of the training data.
        size: samples of a step.
        epochs: of the run.
        ranks: that share the data.
        seed: of the run.

    Returns:
        Micro-batches of a rank in an epoch; None if a pass over the data is long enough.

    Raises:
        ConfigError: only the end of the data tells how long a pass is.
    """
    steps = count_windows(loader, size, epochs, None, ranks, seed)
    if steps is None or getattr(loader, "batch_size", None) is None:
        raise ConfigError(
            "trainer.min_steps needs training data of a known length, in batches of a known size: "
            "give max_steps for a stream."
        )
    if steps >= min_steps:
        return None
    return -(-min_steps // epochs) * size.micro_batches(loader.batch_size, ranks)

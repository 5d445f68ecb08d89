"""Loader workers: they leave signals to the main process, and exit with it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, get_worker_info

from paceline.data.fetch import Fetcher
from paceline.world.orphans import signal_when_parent_dies
from paceline.world.signals import SAME, STOPS

_SIGTERM_GRACE = 600  # seconds for the main process to close its workers itself


class WorkerInit:
    """Runs first in each loader worker: signals are left to the main process, and the dataset that
    `get_worker_info()` gives is the user's.

    A scheduler or a terminal signals every process of the group; a worker that died of the signal
    would end the run before it could be saved. A second SIGTERM means that the main process
    terminates a worker that has not exited; a worker that is left behind anyway exits after a grace
    period.

    Args:
        then: the loader's own `worker_init_fn`.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self._then = then
        self._asked: float | None = None

    def __call__(self, worker_id: int) -> None:
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        signal_when_parent_dies(signal.SIGKILL)
        worker: Any = get_worker_info()
        if isinstance(worker.dataset, Fetcher):
            object.__setattr__(worker, "dataset", worker.dataset.dataset)  # it is frozen
        if self._then is not None:
            self._then(worker_id)

    def _on_sigterm(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            signal.alarm(_SIGTERM_GRACE)
        elif now - self._asked > SAME:
            os._exit(0)


class Reading:
    """Reads one loader again and again, apart from whoever else iterates it.

    torch's DataLoader has one iterator if its workers are persistent: a validation on the training
    loader, or a hook that looks into it, would move training's own.

    Args:
        loader: any iterable of batches.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._separates = getattr(loader, "persistent_workers", False) and (
            getattr(type(loader), "__iter__", None) is DataLoader.__iter__
        )
        self._iterator: Any = None
        self.keeps_workers: bool = getattr(loader, "persistent_workers", False)

    def start(self) -> Iterator[Any]:
        """Reads from the beginning."""
        if not self._separates:
            self._iterator = None  # first, and its workers with it
            self._iterator = iterate(self._loader)
            return self._iterator
        theirs, self._loader._iterator = self._loader._iterator, self._iterator
        try:
            self._iterator = iterate(self._loader)
        finally:
            self._loader._iterator = theirs
        return self._iterator

    def close(self) -> None:
        """Stops the workers."""
        stop_workers(self._iterator)
        if not self._separates and getattr(self._loader, "_iterator", None) is not None:
            self._loader._iterator = None
        self._iterator = None


def iterate(loader: Any) -> Iterator[Any]:
    """`iter(loader)`, with workers that leave signals to this process."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return iter(loader)
    own = loader.worker_init_fn
    loader.worker_init_fn = WorkerInit(own)
    try:
        with _signals_held():
            return iter(loader)
    finally:
        loader.worker_init_fn = own


def stop_workers(iterator: Any) -> None:
    """Stops a DataLoader iterator's workers now.

    They would stop with the iterator, but after an error the traceback's frames keep the iterator
    alive as long as the error is.
    """
    stop = getattr(iterator, "_shutdown_workers", None)
    if stop is not None:
        stop()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Blocks signals while workers start; each inherits the mask until its `WorkerInit` runs.

    Before that, torch's own handlers or Python's would end the worker.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

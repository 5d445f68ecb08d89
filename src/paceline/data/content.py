"""What a map-style dataset holds: a hash of three of its samples, read under fixed random streams.

Cheap, and enough to notice other files, another split or another preparation of the data.
"""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from paceline.data.loader import is_indexed
from paceline.data.workers import iterate, stop_workers
from paceline.world.seeding import random_state_kept, seed_everything

_SEED = 0


def content_of(loader: Any) -> tuple[str | None, str]:
    """A hash of what a loader's dataset holds, equal in every process and at any time.

    The samples are read where the loader reads: in this process, or in one worker of its kind, so
    that nothing is opened here that workers then share.

    Args:
        loader: the user's.

    Returns:
        The hash, or None and why there is none.
    """
    if not is_indexed(loader):
        return None, "it can only be iterated"
    dataset: Any = loader.dataset
    if hasattr(dataset, "state_dict") or hasattr(dataset, "set_epoch"):
        return None, "it changes from pass to pass"
    n = len(dataset)
    wanted = [0, n // 2, n - 1, 0]
    try:
        with random_state_kept():
            if loader.num_workers:
                read = _read_in_worker(loader, wanted)
            else:
                read = [_read(dataset, index) for index in wanted]
    except Exception as error:  # noqa: BLE001 - a dataset whose keys are no numbers, say
        said = str(error).strip().splitlines()
        return None, f"its samples cannot be read by number: {type(error).__name__}: {said[-1:]}"
    if read[0] != read[-1]:
        return None, "a sample is another one each time"
    return hashlib.sha256("".join([str(n), *read]).encode()).hexdigest()[:16], ""


def _read(dataset: Any, index: int) -> str:
    seed_everything(_SEED)
    return digest(dataset[index])


def _read_in_worker(loader: DataLoader, wanted: list[int]) -> list[str]:
    reading = iterate(
        DataLoader(
            loader.dataset,
            batch_size=None,
            sampler=wanted,  # pyright: ignore[reportArgumentType]
            collate_fn=_digest_and_seed,
            num_workers=1,
            timeout=loader.timeout,
            worker_init_fn=_Seeded(loader.worker_init_fn),
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator().manual_seed(_SEED),
        )
    )
    try:
        return list(reading)
    finally:
        stop_workers(reading)


def _digest_and_seed(sample: Any) -> str:
    text = digest(sample)
    seed_everything(_SEED)  # for the next sample
    return text


class _Seeded:
    """The user's `worker_init_fn`, then the fixed streams."""

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self._init = init

    def __call__(self, worker: int) -> None:
        if self._init is not None:
            self._init(worker)
        seed_everything(_SEED)


def digest(value: Any) -> str:
    """A hash of plain data, arrays and tensors in any nesting.

    Args:
        value: of anything else only the class counts, and its attributes.
    """
    found = hashlib.sha256()
    _feed(value, found.update, 0)
    return found.hexdigest()


def _feed(value: Any, update: Callable[[bytes], None], depth: int) -> None:
    update(f"{type(value).__name__}(".encode())
    if depth > 6:
        pass
    elif isinstance(value, torch.Tensor):
        whole = value.detach().cpu().to_dense() if value.is_sparse else value.detach().cpu()
        update(f"{whole.dtype}{tuple(whole.shape)}".encode())
        update(bytes(whole.contiguous().reshape(-1).view(torch.uint8).numpy()))
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, bytes | bytearray):
        update(bytes(value))
    elif value is None or isinstance(value, str | numbers.Number | np.generic):
        update(repr(value).encode())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            update(repr(key).encode())
            _feed(item, update, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(item, update, depth + 1)
    elif hasattr(value, "tobytes"):  # an image
        update(repr(getattr(value, "size", "")).encode() + value.tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        _feed({one.name: getattr(value, one.name) for one in fields(value)}, update, depth + 1)
    elif hasattr(value, "__dict__") and not callable(value):
        _feed(vars(value), update, depth + 1)
    update(b")")

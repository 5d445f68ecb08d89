"""Shared builders: small data whose rows differ, a model with dropout, and runs to compare."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from paceline import Trainer
from paceline.trainer.callback import Callback
from paceline.trainer.events import EVENTS
from paceline.world.dtensors import local_part


class Noisy(Dataset):
    """Rows that all differ, with random augmentation from torch, numpy and `random`."""

    def __init__(self, n: int = 97, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(n, 8, generator=generator)
        self.y = self.x @ torch.randn(8, 1, generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        x = self.x[index] + self.noise * torch.randn(8)
        x = x * (1 + self.noise * random.random()) + self.noise * float(np.random.rand())
        return x, self.y[index], index


def make_model(dropout: float = 0.2, seed: int = 3) -> nn.Module:
    """A small network with dropout, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))


class Regression(Trainer):
    """Trains on `Noisy` batches and remembers the sample ids of every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[int, list[int]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, ids = batch
        if not self.muted:
            self.seen.setdefault(self.global_step, []).extend(ids.tolist())
        error = ((self.model(x) - y) ** 2).mean()
        self.log("train/spread", (x * torch.rand(())).std())
        return error

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        self.log("val/loss", ((self.model(x) - y) ** 2).mean())


class Recorder(Callback):
    """Writes down every event, with the step at which it came.

    All but `on_checkpoint`: when a save in the background has ended is not for the run to say.
    """

    def __init__(self) -> None:
        self.trace: list[tuple[str, int]] = []


def _recording(event: str) -> Any:
    def record(self: Recorder, trainer: Trainer, *_: Any) -> None:
        self.trace.append((event, trainer.global_step))

    return record


for _event in set(EVENTS) - {"on_checkpoint"}:
    setattr(Recorder, _event, _recording(_event))


class StopAt(Callback):
    """Asks for a stop once `step` windows are done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.global_step == self.step:
            trainer.request_stop("test")

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if trainer.global_step == self.step:
            trainer.request_stop("test")


def bits(tree: Any) -> Any:
    """A tree with every tensor replaced by its dtype, shape and bytes, for exact comparison.

    Of a tensor that is spread over ranks, the bytes are this rank's; on the meta device, none.
    """
    if isinstance(tree, torch.Tensor):
        tensor = local_part(tree.detach()).contiguous().reshape(-1)
        raw = (
            tensor.view(torch.uint8).numpy().tobytes()
            if tensor.numel() and not tensor.is_meta
            else b""
        )
        return (str(tree.dtype), tuple(tree.shape), raw)
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [bits(value) for value in tree]
    return tree


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_each_says(messages: Sequence[str], *parts: str) -> None:
    """There are as many messages as parts, and each has its own in it."""
    for message, part in zip(messages, parts, strict=True):
        assert part in message, f"{part!r} is not in {message!r}"


def loader(dataset: Dataset, batch_size: int = 10, **options: Any) -> DataLoader:
    """A shuffling DataLoader unless told otherwise."""
    return DataLoader(dataset, batch_size, **{"shuffle": True, **options})


@contextmanager
def code_forgotten() -> Iterator[None]:
    """Afterwards, code that recipes have loaded is neither imported nor on the path."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if hasattr(sys.modules[name], "__paceline_code__"):
            del sys.modules[name]


class Count(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def assert_stages_equal(found: list[Any], expected: Any) -> None:
    """Ranks' weights by name, metrics and rows are those of one process.

    The ranks together have each weight; metrics and rows are equal on all.
    """
    weights, metrics, rows, *_ = expected
    assert set().union(*(mine for mine, *_ in found)) == set(weights)
    for mine, measured, seen, *_ in found:
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-9, atol=1e-9)
        assert measured == pytest.approx(metrics, rel=1e-9, nan_ok=True)
        assert len(seen) == len(rows)
        for row, like in zip(seen, rows, strict=True):
            assert row == pytest.approx(like, rel=1e-9, nan_ok=True)

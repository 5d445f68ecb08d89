"""What runs leave at any layout, and when two of them have left the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Callback, CheckpointPolicy, Parallel, Trainer
from paceline.callbacks import AveragedWeights
from paceline.testing import bits
from paceline.world.dtensors import is_dtensor, local_part, whole
from small import settings


class Kept(Callback):
    """What a run leaves on this rank.

    Attributes:
        rows: one for each step, in order.
        metrics: of the last validation.
        weights: by name, gathered from all ranks; those that only other stages have are left out.
        split: the names of those that are spread over ranks.
        shapes: of this rank's part of each.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.metrics: dict[str, float] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.split: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.rows.append(dict(metrics))

    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.metrics = dict(metrics)

    def on_train_end(self, trainer: Trainer) -> None:
        [model] = trainer.named_models().values()
        here = {name: t.detach() for name, t in model.state_dict().items() if not t.is_meta}
        self.weights = {name: whole(tensor).clone() for name, tensor in here.items()}
        self.split = sorted(name for name, tensor in here.items() if is_dtensor(tensor))
        self.shapes = {name: tuple(local_part(tensor).shape) for name, tensor in here.items()}


class EachStep(Callback):
    """After each step the scale of its loss, and this rank's part of the weights.

    Attributes:
        scales: one a step, 1.0 unless losses are scaled.
        weights: one a step, bit by bit.
    """

    def __init__(self) -> None:
        self.scales: list[float] = []
        self.weights: list[Any] = []

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        scaler = trainer.optimization.scaler
        self.scales.append(1.0 if scaler is None else scaler.get_scale())
        self.weights.append(bits([*trainer.get_module("model").parameters()]))


def run(trainer: Trainer, seed: int = 0) -> Kept:
    """Trains, and returns what the run leaves."""
    kept = Kept()
    trainer.callbacks.append(kept)
    trainer.train(seed=seed)
    return kept


def flipped(rows: int) -> TensorDataset:
    """Rows of 4 numbers, all different; the targets are the same backwards."""
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    return TensorDataset(x, x.flip(1))


def fit(
    model: nn.Module,
    parallel: Parallel,
    folder: Path | None = None,
    max_steps: int = 6,
    *,
    rows: TensorDataset | None = None,
    callbacks: Sequence[Callback] = (),
    **changes: Any,
) -> Kept:
    """Steps of 8 samples at any layout, with averaged weights, saved after every other one.

    Args:
        model: from 4 numbers to 4.
        parallel: the layout.
        folder: the run's; None to write nothing.
        max_steps: where it ends, 3 a pass over the data.
        rows: the data; 24 unless given.
        callbacks: beside the average.
        changes: of the Trainer's settings.
    """
    options = {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.02, fused=True),
        "train_dataloader": DataLoader(rows or flipped(24), 2, shuffle=True),
        "val_dataloader": DataLoader(flipped(7), 2),
        "callbacks": [AveragedWeights(decay=0.5), *callbacks],
        "parallel": parallel,
        "global_batch_size": 8,
        "epochs": None,
        "max_steps": max_steps,
        "run_dir": folder,
        "checkpoint": CheckpointPolicy(every_steps=2),
    }
    return run(Trainer(**settings(model, **options | changes)), seed=2)


def assert_near(found: Kept, expected: Kept, rtol: float, atol: float = 1e-6) -> None:
    """All weights are equal to a tolerance, and so are the last metrics, to 1e-5."""
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=rtol, atol=atol, msg=name)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)


def assert_stages_equal(found: Sequence[Kept], expected: Kept, from_step: int = 0) -> None:
    """The ranks together have each weight of one process, and metrics and rows are its own on all.

    Args:
        found: by rank.
        expected: what one process leaves.
        from_step: the step that was resumed, before which there are no rows.
    """
    assert {name for one in found for name in one.weights} == expected.weights.keys()
    for one in found:
        for name, tensor in one.weights.items():
            torch.testing.assert_close(tensor, expected.weights[name], rtol=1e-9, atol=1e-9)
        assert one.metrics == pytest.approx(expected.metrics, rel=1e-9, nan_ok=True)
        for row, like in zip(one.rows, expected.rows[from_step:], strict=True):
            assert row == pytest.approx(like, rel=1e-9, nan_ok=True)

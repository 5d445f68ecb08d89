"""P7 No hidden synchronisation: between two rows the loop asks no tensor for its value.

An accelerator is pretended: the loop is told that reading a tensor is not free, and whatever reads
one (or copies a number to a device, which waits as well) is written down.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from paceline import Callback, CheckpointPolicy, Trainer, World
from paceline.callbacks import (
    SWA,
    AveragedWeights,
    EarlyStopping,
    GradientExplosion,
    GradientMonitor,
    LearningRate,
    LossPrediction,
    OverfitDetection,
    Throughput,
    UpdateRatio,
)
from paceline.trainer.nonfinite import NonFiniteGuard

STEPS = 20
aten = torch.ops.aten
# Operators whose result the host has to know, of a value or of a shape that depends on values.
READS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.item, aten.equal, aten.nonzero,
    aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
    aten.repeat_interleave, aten._assert_async,
}  # fmt: skip
METHODS = {
    getattr(torch.Tensor, name)
    for name in [
        "item",
        "tolist",
        "numpy",
        "cpu",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "__array__",
    ]
}


class _Operators(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        by_mask = operator.overloadpacket in (aten.index, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        from_host = operator.overloadpacket is aten.lift_fresh and not _is_data_loading()
        if operator.overloadpacket in READS or by_mask or from_host:
            self._watch.note(str(operator))
        return operator(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function in METHODS:
            self._watch.note(function.__name__)
        return function(*args, **(kwargs or {}))


def _is_data_loading() -> bool:
    frame: Any = sys._getframe()
    while frame is not None:
        if "/paceline/data/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class Watch(Callback):
    """Notes every read from before the first window to behind the last but one."""

    priority = 10_000

    def __init__(self) -> None:
        self.in_windows: list[tuple[int, str]] = []
        self.between: list[tuple[int, str]] = []
        self.inside = False
        self._modes = (_Operators(self), _Methods(self))
        self._trainer: Any = None

    def note(self, what: str) -> None:
        place = self.in_windows if self.inside else self.between
        place.append((self._trainer.global_step, what))

    def on_train_start(self, trainer: Trainer) -> None:
        self._trainer = trainer
        for mode in self._modes:
            mode.__enter__()

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if trainer.global_step == STEPS - 1:
            for mode in reversed(self._modes):
                mode.__exit__(None, None, None)


class Watched(Trainer):
    """Logs values, and tells the watch whether a window is being computed."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        outputs = self.model(x)
        self.log("train/error", (outputs - y).abs().mean())
        self.log("train/batch", batch_idx)
        return self.loss_fn(outputs, y)

    def step(self, window: Any) -> None:
        self.watch.inside = True
        super().step(window)
        self.watch.inside = False


@pytest.fixture(autouse=True)
def _pretended_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "reads_are_free", property(lambda self: False))


def watched(
    kind: type[Watched] = Watched, optimizer: str = "AdamW", fused: bool = True, **settings: Any
) -> Watch:
    """A run of 20 steps, each epoch of 8, and what it read."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-2, fused=fused)
    watch = Watch()
    trainer = kind(
        model=model,
        optimizer=made,
        lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(made, STEPS),
        loss_fn=nn.functional.mse_loss,
        train_dataloader=DataLoader(data, 4, shuffle=True),
        max_steps=STEPS,
        callbacks=[*settings.pop("callbacks", ()), watch],
        **{
            "max_grad_norm": 1.0,
            "gradient_accumulation_steps": 2,
            "log_every": 1000,
            "progress": False,
            **settings,
        },
    )
    trainer.watch = watch
    trainer.train(seed=3)
    return watch


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("AdamW", {}),
        ("SGD", {}),
        ("Adagrad", {}),
        ("AdamW", {"max_grad_norm": None, "gradient_accumulation_steps": 1}),
        ("AdamW", {"on_nonfinite": "skip"}),
        ("AdamW", {"on_nonfinite": "stop"}),
        ("AdamW", {"precision": "bf16"}),
        ("AdamW", {"precision": "fp16"}),
    ],
)
def test_nothing_is_read_between_rows(optimizer: str, settings: dict[str, Any]) -> None:
    """An epoch of 8 steps (16 without accumulation) ends with a row."""
    watch = watched(optimizer=optimizer, **settings)
    assert watch.in_windows == []
    assert {step for step, _ in watch.between} in ({8, 16}, {16})


def test_nothing_is_read_with_the_defaults_on(tmp_path: Path) -> None:
    """Rows, progress and asynchronous checkpoints: they read at their own time only.

    So does the proof that the state can be loaded, before the first step and after it.
    """
    watch = watched(
        log_every=6,
        progress=True,
        run_dir=tmp_path / "run",
        checkpoint=CheckpointPolicy(every_epochs=None, every_steps=9),
    )
    assert watch.in_windows == []
    assert {step for step, _ in watch.between} == {0, 1, 6, 8, 9, 12, 16, 18}


def test_callbacks_read_with_the_row() -> None:
    callbacks = [AveragedWeights(decay=0.9), GradientMonitor(), LearningRate(), Throughput()]
    watch = watched(log_every=6, callbacks=callbacks, loggers=[])
    assert watch.in_windows == []
    assert {step for step, _ in watch.between} <= {6, 12, 18}


@pytest.mark.parametrize("clipped", [None, 1.0])
def test_callbacks_that_judge_a_run_read_with_the_row(clipped: float | None) -> None:
    """None of them asks for a value elsewhere, whoever takes the norm."""
    callbacks = [
        GradientExplosion(warmup=2, window=4),
        LossPrediction(min_points=6),
        SWA(2),
        UpdateRatio(),
    ]
    watch = watched(log_every=2, callbacks=callbacks, loggers=[], max_grad_norm=clipped)
    assert watch.in_windows == []
    assert {step for step, _ in watch.between} <= set(range(2, STEPS, 2))


def test_callbacks_that_judge_validations_read_with_them() -> None:
    callbacks = [EarlyStopping(patience=99), OverfitDetection(), LossPrediction("val/loss")]
    data = DataLoader(TensorDataset(torch.randn(8, 8), torch.randn(8, 1)), 4)
    watch = watched(
        log_every=6, callbacks=callbacks, loggers=[], val_dataloader=data, validate_every=6
    )
    assert watch.in_windows == []
    assert {step for step, _ in watch.between} <= {6, 12, 18}


def _reading_loss(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
    loss = Watched.training_step(self, batch, batch_idx)
    if loss.item() > 1e9:
        raise AssertionError
    return loss


def _asked_at_once(self: Any, optimizer: Any) -> bool:
    return not bool(self._flag)


class _Reader(Callback):
    def on_train_batch_end(
        self, trainer: Trainer, batch: Any, batch_idx: int, loss: torch.Tensor
    ) -> None:
        loss.tolist()


@pytest.mark.parametrize("mutant", ["item", "guard", "callback", "unfused", "copy", "mask"])
def test_the_watch_sees_what_waits(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a loop that reads in each step, each read is noted."""
    settings: dict[str, Any] = {}
    kind = Watched
    if mutant == "item":
        kind = type("Reads", (Watched,), {"training_step": _reading_loss})
    elif mutant == "guard":
        monkeypatch.setattr(NonFiniteGuard, "_mask", _asked_at_once)
    elif mutant == "callback":
        settings["callbacks"] = [_Reader()]
    elif mutant == "unfused":
        settings["fused"] = False
    elif mutant == "copy":
        kind = type("Copies", (Watched,), {"loss_fn": None})
        kind.training_step = lambda self, batch, i: self.model(batch[0]).mean() * torch.tensor(2.0)
    else:
        kind = type("Selects", (Watched,), {})
        kind.training_step = lambda self, batch, i: self.model(batch[0])[batch[1] < 9].mean()
    watch = watched(kind, **settings)
    assert {step for step, _ in watch.in_windows} == set(range(STEPS - 1))

"""P2 Nothing observed is disturbed: watching a run, more or less, changes no bit of its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from builders import Noisy, Regression, loader, make_model
from paceline import CheckpointPolicy, Trainer
from paceline.callbacks import (
    SWA,
    AveragedWeights,
    EarlyStopping,
    GradientExplosion,
    GradientMonitor,
    LearningRate,
    LossPrediction,
    OverfitDetection,
    Profiler,
    Throughput,
    UpdateRatio,
)
from paceline.log.sinks import JsonlSink
from paceline.log.tensorboard import TensorBoard
from paceline.testing import Trace, bits
from small import batches, fitted, line, points

STEPS = 9


class Drawing(Regression):
    """Its validation draws random numbers and moves weights about, as careless ones do."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.rand(3)
        super().validation_step(batch, batch_idx)


def weights(run_dir: Path | None, **settings: Any) -> Any:
    """The final weights and optimizer state of a short run."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    defaults: dict[str, Any] = {
        "train_dataloader": loader(Noisy()),
        "loggers": [],
        "progress": False,
        "checkpoint": None,
    }
    trainer = Drawing(
        model=model,
        optimizer=optimizer,
        max_steps=STEPS,
        run_dir=run_dir,
        **{**defaults, **settings},
    )
    trainer.train(seed=5)
    return bits([model.state_dict(), optimizer.state_dict()])


@pytest.fixture(scope="module")
def alone() -> Any:
    """A run that nobody watches."""
    return weights(None)


WATCHED: dict[str, dict[str, Any]] = {
    "validated each step": {"validate_every": 1},
    "validated every other step": {"validate_every": 2},
    "rows each step": {"log_every": 1, "loggers": None},
    "rows every fourth step": {"log_every": 4, "loggers": None},
    "saved each step": {"checkpoint": CheckpointPolicy(every_steps=1)},
    "saved each step, waiting for it": {
        "checkpoint": CheckpointPolicy(every_steps=1, asynchronous=False)
    },
    "shown": {"progress": True, "log_every": 1},
    "every event heard": {"callbacks": [Trace()]},
    "averaged, and validated with the average": {
        "callbacks": [AveragedWeights(decay=0.5)],
        "validate_every": 1,
    },
    "gradients, rates and speeds looked at": {
        "callbacks": [GradientMonitor(), LearningRate(), Throughput()],
        "log_every": 1,
        "loggers": None,
    },
    "judged by its losses, gradients and updates": {
        "callbacks": [
            EarlyStopping(patience=99),
            OverfitDetection(window=3, warmup=0),
            LossPrediction(min_points=6),
            GradientExplosion(1.01, window=4, warmup=2),
            UpdateRatio(),
        ],
        "validate_every": 1,
        "log_every": 1,
        "loggers": None,
    },
    "averaged equally": {"callbacks": [SWA(2, 2)], "validate_every": 1},
    "profiled": {"callbacks": [Profiler(3, 4, memory=True, shapes=True)]},
    "shown by TensorBoard": {"loggers": [JsonlSink(), TensorBoard()], "log_every": 1},
    "all of it": {
        "callbacks": [Trace(), AveragedWeights(), GradientMonitor(), Throughput()],
        "validate_every": 2,
        "log_every": 1,
        "loggers": None,
        "checkpoint": CheckpointPolicy(every_steps=2),
        "progress": True,
    },
}


@pytest.mark.parametrize("how", WATCHED)
def test_watching_changes_no_bit(how: str, tmp_path: Path, alone: Any) -> None:
    """Given a run, when it is watched in this way, then weights and optimizer end the same."""
    check_watched(tmp_path, how, alone)


def check_watched(folder: Path, how: str, alone: Any = None) -> None:
    settings = {"val_dataloader": loader(Noisy(23), shuffle=False), **copy.deepcopy(WATCHED[how])}
    assert weights(folder, **settings) == (alone or weights(None))


class Probing(Trainer):
    """Looks at the loss's gradients wherever the loop lets it, as saliency maps and attacks do."""

    def probe(self, *_: Any) -> None:
        with torch.enable_grad():
            self.loss(points(4).tensors).backward()

    on_train_start = on_train_epoch_start = on_train_batch_start = on_step_end = probe
    on_validation_start = validation_step = on_validation_end = on_metrics = probe
    on_train_epoch_end = probe


def test_gradients_from_outside_a_window_reach_no_step() -> None:
    """Given gradients made before `train()`, in validations and in hooks, when the run goes on,
    then it ends as a loop by hand that makes none."""
    model, by_hand = line(), line()
    nn.functional.mse_loss(model(points().tensors[0]), points().tensors[1]).backward()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for i in range(0, 20, 4):
            optimizer.zero_grad()
            for x, y in batches(size=2).dataset[i : i + 2], batches(size=2).dataset[i + 2 : i + 4]:
                (nn.functional.mse_loss(by_hand(x), y) / 2).backward()
            optimizer.step()
    fitted(
        Probing,
        model=model,
        train_dataloader=batches(size=2),
        gradient_accumulation_steps=2,
        val_dataloader=batches(8),
        validate_every=2,
    )
    assert torch.equal(model.weight, by_hand.weight)


def test_the_check_can_fail(alone: Any) -> None:
    """The comparison sees a change: another clipping norm, another learning rate."""
    assert weights(None, max_grad_norm=0.1) != alone

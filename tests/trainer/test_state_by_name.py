"""A state goes to what it was taken of: by name and settings, never by position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import Callback, MetricMonitor, Trainer
from paceline.callbacks import EarlyStopping
from small import batches, line, settings


class Scores(Trainer):
    """The loss falls from 5 by one an epoch, the error from 9; the accuracy rises by 0.1."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 5.0 - self.current_epoch)
        self.log("val/error", 9.0 - self.current_epoch)
        self.log("val/accuracy", 0.1 * (1 + self.current_epoch))


def trained(run_dir: Path, epochs: int, callbacks: tuple[Any, ...] = (), **changes: Any) -> Scores:
    changes |= {"epochs": epochs, "callbacks": callbacks, "run_dir": run_dir}
    trainer = Scores(**settings(val_dataloader=batches(4), **changes))
    trainer.fit(seed=0)
    return trainer


def test_a_new_metric_inherits_no_best(tmp_path: Path, capsys: Any) -> None:
    """Given a best loss of 4, when the run goes on with the error, which falls from 7 to 2."""

    def plateau() -> dict[str, Any]:
        model = line()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        parts = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
        return {**parts, "lr_scheduler_interval": "metric"}

    trained(tmp_path, 2, metric_monitor=MetricMonitor("val/loss"), **plateau())

    error = MetricMonitor("val/error")
    trainer = trained(tmp_path, 8, metric_monitor=error, early_stop=2, **plateau())

    assert trainer.result.stopped_by == "epochs"
    assert trainer.result.best == 2.0
    assert trainer.learning_rates == {"optimizer": 0.05}
    assert "watches val/error (min) now, and val/loss (min)" in capsys.readouterr().err


def stops() -> tuple[EarlyStopping, EarlyStopping]:
    return EarlyStopping("val/loss", patience=2), EarlyStopping("val/accuracy", "max", patience=2)


@pytest.mark.parametrize("which", [(1,), (1, 0)])
def test_early_stopping_follows_its_metric(which: tuple[int, ...], tmp_path: Path) -> None:
    trained(tmp_path, 2, stops())

    trainer = trained(tmp_path, 6, tuple(stops()[i] for i in which))

    assert trainer.result.stopped_by == "epochs"


class Counts(Callback):
    """Counts steps, by its own stride."""

    def __init__(self, stride: int | tuple[str, ...]) -> None:
        self._words = stride if isinstance(stride, tuple) else ()
        self._stride, self.count = stride if isinstance(stride, int) else len(stride), 0

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.count += self._stride

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize(
    ("before", "after", "counts"),
    [
        ((1, 10), (10, 1), (100, 10)),  # another order
        ((("a",), ("b", "c")), (("b", "c"), ("a",)), (20, 10)),  # of words
        ((1, 10), (10,), (100,)),  # one was taken away
        ((1,), (10, 1), (50, 10)),  # one is new
        ((1,), (2,), (15,)),  # its setting was changed
        ((1, 10), (2, 10), (15, 100)),  # that of one
        ((1, 10), (2, 3), (10, 15)),  # nobody knows which is which
    ],
)
def test_callbacks_of_one_class_keep_their_own(
    before: tuple[Any, ...], after: tuple[Any, ...], counts: tuple[int, ...], tmp_path: Path
) -> None:
    """Given an epoch of five steps, when a second one is trained with other callbacks."""
    trained(tmp_path, 1, tuple(map(Counts, before)))

    trainer = trained(tmp_path, 2, tuple(map(Counts, after)))

    assert tuple(callback.count for callback in trainer.callbacks) == counts

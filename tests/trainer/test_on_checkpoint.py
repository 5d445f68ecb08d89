"""`on_checkpoint`: once for each checkpoint that is published, soon, and while it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paceline import Callback, CheckpointPolicy, MetricMonitor, Trainer
from paceline.checkpoint import NativeEngine, verify
from paceline.errors import CheckpointError
from paceline.testing import Ranks, StopAt
from small import batches, fitted, settings

EACH_STEP = CheckpointPolicy(every_steps=1)


class Hears(Callback):
    """Notes each checkpoint that it is told of, and where the run is by then; it has to be there.

    Attributes:
        heard: (step of the checkpoint, step of the run).
        best: the steps of those that are marked best.
        ends: "train end" and "teardown", among the steps heard of, as they come.
    """

    def __init__(self) -> None:
        self.heard: list[tuple[int, int]] = []
        self.best: list[int] = []
        self.order: list[Any] = []

    def on_checkpoint(self, trainer: Trainer, path: Path, step: int, best: bool) -> None:
        assert verify(path).step == step
        self.heard.append((step, trainer.global_step))
        self.best += [step] * best
        self.order.append(step)

    def on_train_end(self, trainer: Trainer) -> None:
        self.order.append("train end")

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        self.order.append("exception")

    def on_teardown(self, trainer: Trainer) -> None:
        self.order.append("teardown")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_checkpoint_is_told_of_once_and_before_the_run_ends(
    asynchronous: bool, tmp_path: Path
) -> None:
    """Given that only the newest is kept, when a run saves after each step, then each checkpoint is
    still there when the callback hears of it."""
    hears = Hears()
    policy = CheckpointPolicy(every_steps=1, asynchronous=asynchronous)
    fitted(run_dir=tmp_path, checkpoint=policy, callbacks=[hears])
    assert hears.order == [*range(1, 11), "train end", "teardown"]
    late = [run - step for step, run in hears.heard]
    assert max(late) <= (1 if asynchronous else 0)


def test_it_says_which_is_best(tmp_path: Path) -> None:
    class Measured(Trainer):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", [4.0, 2.0, 3.0, 1.0][self.global_step // 2 - 1])

    hears = Hears()
    fitted(
        Measured,
        run_dir=tmp_path,
        epochs=None,
        max_steps=8,
        validate_every=2,
        val_dataloader=batches(4),
        metric_monitor=MetricMonitor(),
        checkpoint=EACH_STEP,
        callbacks=[hears],
    )
    assert hears.best == [2, 4, 8]


def test_it_comes_at_the_first_boundary_after_the_write_has_ended(tmp_path: Path) -> None:
    """Not with the next save, nor with the next row: there is neither here."""

    class Waits(Callback):
        def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            if trainer.global_step == 5:
                saver = trainer._at_hand.saver
                assert saver is not None
                saver.wait()

    hears = Hears()
    fitted(
        run_dir=tmp_path,
        checkpoint=CheckpointPolicy(every_epochs=None, every_steps=4),
        loggers=[],
        epochs=None,
        max_steps=7,
        callbacks=[Waits(), hears],
    )
    assert hears.heard[0] in [(4, 4), (4, 5)]
    assert hears.order == [4, 7, "train end", "teardown"]


def test_the_checkpoint_of_a_stop_is_told_of(tmp_path: Path) -> None:
    hears = Hears()
    fitted(run_dir=tmp_path, callbacks=[StopAt(3), hears])
    assert hears.order == [3, "teardown"]
    again = Hears()
    fitted(run_dir=tmp_path, callbacks=[again])
    assert again.order == [5, 10, "train end", "teardown"]


def test_a_write_that_fails_is_not_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = NativeEngine._begin

    def full(self: Any, hidden: Path, job: Any) -> None:
        if job.step in (2, 3):
            raise CheckpointError("no space")
        begin(self, hidden, job)

    monkeypatch.setattr(NativeEngine, "_begin", full)
    hears = Hears()
    fitted(run_dir=tmp_path, checkpoint=EACH_STEP, epochs=1, callbacks=[hears])
    assert hears.order == [1, 4, 5, "train end", "teardown"]


def test_what_was_being_saved_as_a_run_fails_is_told_of(tmp_path: Path) -> None:
    hears = Hears()
    trainer = Trainer(**settings(run_dir=tmp_path, checkpoint=EACH_STEP, callbacks=[hears]))

    def fail(_: Any) -> None:
        if trainer.global_step == 3:
            raise ValueError("on purpose")

    trainer.on_step_end = fail
    with pytest.raises(ValueError, match="on purpose"):
        trainer.fit()
    assert [entry for entry in hears.order if entry != "exception"] == [1, 2, "teardown"]


def on_a_rank(folder: Path) -> list[Any]:
    hears = Hears()
    fitted(run_dir=folder, checkpoint=EACH_STEP, callbacks=[hears])
    return hears.order


def test_every_rank_hears_of_each(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(on_a_rank, 2, tmp_path) == [[*range(1, 7), "train end", "teardown"]] * 2

"""The events of a run: their order, who hears them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paceline import Callback, CheckpointPolicy, MetricMonitor, Trainer
from paceline.errors import ConfigError
from paceline.testing import Trace
from small import batches, fitted, settings

BATCH = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end"]
STEP = ["on_before_optimizer_step", "on_step_end"]
VALIDATION = [
    "on_validation_start",
    *["on_validation_batch_start", "on_validation_batch_end"] * 2,
    "on_validation_end",
    "on_metrics",
]
EPOCH = [
    "on_train_epoch_start",
    *BATCH * 2,
    *STEP,
    *BATCH,  # the epoch's last window is short
    *STEP,
    *VALIDATION,
    "on_train_epoch_end",
    "on_save_checkpoint",
    "on_checkpoint",
]
AT_ONCE = CheckpointPolicy(asynchronous=False)


class Everything(Trace):
    """Writes down `on_checkpoint`, too: of saves that are waited for it has its place."""

    def on_checkpoint(self, trainer: Trainer, path: Path, step: int, best: bool) -> None:
        self.events.append(("on_checkpoint", trainer.global_step))


def test_the_golden_trace_of_two_epochs(tmp_path: Path) -> None:
    trace = Everything()
    fitted(
        train_dataloader=batches(12),
        val_dataloader=batches(8),
        gradient_accumulation_steps=2,
        callbacks=[trace],
        checkpoint=AT_ONCE,
        run_dir=tmp_path,
    )
    assert [event for event, _ in trace.events] == [
        *["on_setup", "on_train_start", *EPOCH, *EPOCH, "on_train_end", "on_teardown"]
    ]


def test_the_golden_trace_of_a_run_stopped_by_max_steps_in_mid_epoch(tmp_path: Path) -> None:
    trace = Everything()
    fitted(
        train_dataloader=batches(12),
        val_dataloader=batches(8),
        epochs=None,
        max_steps=1,
        callbacks=[trace],
        run_dir=tmp_path,
    )
    assert [event for event, _ in trace.events] == [
        *["on_setup", "on_train_start", "on_train_epoch_start", *BATCH, *STEP],
        *[*VALIDATION, "on_save_checkpoint", "on_checkpoint", "on_train_end", "on_teardown"],
    ]


def test_the_golden_trace_of_a_failure() -> None:
    trace = Trace()
    trainer = Trainer(**settings(callbacks=[trace]))
    trainer.on_after_backward = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert [event for event, _ in trace.events] == [
        *["on_setup", "on_train_start", "on_train_epoch_start", "on_train_batch_start"],
        *["on_before_backward", "on_exception", "on_teardown"],
    ]


def test_the_golden_trace_of_a_finished_run_started_again(tmp_path: Path) -> None:
    fitted(run_dir=tmp_path)
    trace = Trace()
    fitted(run_dir=tmp_path, callbacks=[trace])
    assert [event for event, _ in trace.events] == [
        "on_setup",
        "on_load_checkpoint",
        "on_teardown",
    ]


class Counters(Trainer):
    """Notes the counters that each hook sees."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.notes.append(("batch", self.current_epoch, self.global_step, batch_idx))

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        self.notes.append(("step", self.current_epoch, self.global_step))

    def on_validation_start(self) -> None:
        self.notes.append(("validation", self.current_epoch, self.global_step))

    def on_train_epoch_end(self) -> None:
        self.notes.append(("epoch end", self.current_epoch, self.global_step))

    notes: list[Any]


def test_the_counters_that_hooks_see() -> None:
    trainer = Counters(**settings(train_dataloader=batches(8), val_dataloader=batches(4)))
    trainer.notes = []
    trainer.fit()
    epoch = lambda e: [  # noqa: E731
        ("batch", e, 2 * e, 0),
        ("step", e, 2 * e + 1),
        ("batch", e, 2 * e + 1, 1),
        ("step", e, 2 * e + 2),
        ("validation", e, 2 * e + 2),
        ("epoch end", e, 2 * e + 2),
    ]
    assert trainer.notes == [*epoch(0), *epoch(1)]
    assert (trainer.current_epoch, trainer.global_step, trainer.local_batches) == (2, 4, 4)


class Says(Callback):
    """Says its name when a step has ended."""

    def __init__(self, name: str, heard: list[str], priority: int = 100) -> None:
        self.name, self._heard, self.priority = name, heard, priority

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._heard.append(self.name)


def test_the_trainer_comes_first_then_callbacks_by_priority_then_as_given() -> None:
    heard: list[str] = []
    trainer = Trainer(
        **settings(
            callbacks=[Says("b", heard), Says("c", heard), Says("a", heard, priority=1)],
            epochs=None,
            max_steps=1,
        )
    )
    trainer.on_step_end = lambda metrics: heard.append("trainer")
    trainer.fit()
    assert heard == ["trainer", "a", "b", "c"]


def test_hooks_may_be_given_to_instances() -> None:
    heard: list[Any] = []
    callback = Callback()
    callback.on_metrics = lambda trainer, metrics: heard.append((trainer, dict(metrics)))
    trainer = Trainer(**settings(val_dataloader=batches(8), epochs=1, callbacks=[callback]))
    trainer.on_train_epoch_end = lambda: heard.append("epoch")
    result = trainer.fit()
    assert heard == [(trainer, result.metrics), "epoch"]


def test_an_event_that_nobody_overrides_has_no_listener() -> None:
    trainer = Trainer(**settings(callbacks=[Callback()]))
    with trainer.running():
        assert trainer._at_hand.events.on_train_batch_start == ()


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_misspelt_method_of_a_callback_is_refused(where: str) -> None:
    if where == "class":
        callback = type("Mine", (Callback,), {"on_train_epoch_ends": lambda self, trainer: None})()
    else:
        callback = Callback()
        callback.on_train_epoch_ends = lambda trainer: None
    with pytest.raises(ConfigError, match=r"epoch_ends.*did you mean 'on_train_epoch_end'"):
        fitted(callbacks=[callback])


@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_misspelt_hook_of_a_trainer_is_refused(where: str) -> None:
    if where == "class":
        kind = type("Mine", (Trainer,), {"on_train_epoch_strat": lambda self: None})
        trainer = kind(**settings())
    else:
        trainer = Trainer(**settings())
        trainer.on_train_epoch_strat = lambda: None
    with pytest.raises(
        ConfigError, match=r"on_train_epoch_strat.*did you mean 'on_train_epoch_start"
    ):
        trainer.fit()


def test_a_method_of_a_trainer_that_is_near_no_event_is_its_own_business() -> None:
    kind = type("Mine", (Trainer,), {"on_fire": lambda self: None})
    assert fitted(kind).result.complete


def test_on_metrics_comes_before_the_monitor_and_the_schedulers() -> None:
    monitor = MetricMonitor()
    trainer = Trainer(**settings(val_dataloader=batches(8), metric_monitor=monitor, epochs=1))
    seen: list[Any] = []
    trainer.on_metrics = lambda metrics: seen.append(monitor.best_value)
    trainer.fit()
    assert seen == [None]
    assert monitor.best_value is not None


def test_hooks_need_no_super() -> None:
    class Silent(Trainer):
        def on_setup(self) -> None: ...
        def on_train_start(self) -> None: ...
        def on_train_epoch_start(self) -> None: ...
        def on_train_end(self) -> None: ...
        def on_teardown(self) -> None: ...

    assert fitted(Silent).result.complete

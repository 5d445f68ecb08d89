"""Every way of using a Trainer trains the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline import Callback, CheckpointPolicy, Trainer, Window
from paceline.checkpoint import scan
from paceline.errors import ConfigError
from small import batches, fitted, points, same, settings, weights


def expected() -> dict[str, torch.Tensor]:
    """Two epochs over the 20 rows in their order, by a loop of our own."""
    kept = settings()
    model, optimizer = kept["model"], kept["optimizer"]
    for _ in range(2):
        for x, y in batches():
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {f"model.{name}": value for name, value in model.state_dict().items()}


def test_components_alone_are_enough() -> None:
    assert same(weights(fitted()), expected())


def test_loaders_and_epochs_may_be_given_to_train() -> None:
    kept = settings()
    for name in ("train_dataloader", "epochs"):
        del kept[name]
    trainer = Trainer(**kept)
    result = trainer.train(batches(), batches(8), 2)
    assert same(weights(trainer), expected())
    x, y = points(8).tensors
    error = nn.functional.mse_loss(trainer.model(x), y)
    assert result.final_val_loss == pytest.approx(error.item())


def test_loss_alone_is_enough() -> None:
    class Mine(Trainer):
        def loss(self, batch: Any) -> torch.Tensor:
            x, y = batch
            return ((self.model(x) - y) ** 2).mean()

    trainer = fitted(Mine, loss_fn=None, val_dataloader=batches(8))
    assert same(weights(trainer), expected())
    assert trainer.result.final_val_loss is not None


class Steps(Trainer):
    """Both steps overridden; the validation keeps state of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return self.loss_fn(self.model(x), y)

    def on_validation_start(self) -> None:
        self.worst = 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.worst = max(self.worst, float((self.model(x) - y).abs().max()))

    def get_val_metrics(self) -> dict[str, float]:
        return {"val/worst": self.worst}


def test_both_steps_overridden() -> None:
    trainer = fitted(Steps, val_dataloader=batches(8))
    assert same(weights(trainer), expected())
    assert trainer.result.metrics == {"val/worst": trainer.worst}


class OwnTrain(Trainer):
    """The whole of `train()` overridden."""

    def train(self, seed: int | None = None) -> Any:
        self.windows_seen = 0
        for window in self.windows():
            self.step(window)
            self.windows_seen += 1


@pytest.mark.parametrize("call", ["train", "fit"])
def test_train_overridden(call: str, tmp_path: Path) -> None:
    trainer = OwnTrain(**settings(run_dir=tmp_path, val_dataloader=batches(8)))
    result = getattr(trainer, call)(seed=4)
    assert same(weights(trainer), expected())
    assert (result.stopped_by, result.complete, trainer.windows_seen) == ("epochs", True, 10)
    assert trainer.seed == 4
    assert result.checkpoint.name == "step_00000010"


@pytest.mark.parametrize("call", ["train", "fit"])
def test_train_overridden_is_told_of_errors_in_its_loop(call: str, tmp_path: Path) -> None:
    class Fails(OwnTrain):
        def step(self, window: Window) -> None:
            if self.global_step == 3:
                raise KeyError("mine")
            super().step(window)

    heard: list[Any] = []
    trainer = Fails(**settings(run_dir=tmp_path))
    trainer.on_exception = heard.append
    trainer.on_teardown = lambda: heard.append("torn down")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError, match="mine") as caught:
        getattr(trainer, call)()
    assert heard == [caught.value, "torn down"]
    assert signal.getsignal(signal.SIGTERM) is handler  # now, not when the traceback has gone
    assert '"failed"' in (tmp_path / "run.json").read_text()


@pytest.mark.parametrize("call", ["train", "fit"])
def test_train_overridden_may_leave_its_loop(call: str, tmp_path: Path) -> None:
    class Leaves(Trainer):
        def train(self) -> None:
            for window in self.windows():
                self.step(window)
                if self.global_step == 6:
                    break

    result = getattr(Leaves(**settings(run_dir=tmp_path)), call)()
    assert not result.complete
    assert result.stopped_by == "train() left its loop"
    assert result.checkpoint.name == "step_00000005"


def test_epoch_overridden() -> None:
    class Mine(Trainer):
        def epoch(self) -> None:
            for window in self.epoch_windows():
                for batch, batch_idx in window:
                    self.backward(self.training_step(batch, batch_idx))
                self.optimizer_step()
            self.epochs_seen = getattr(self, "epochs_seen", 0) + 1

    trainer = fitted(Mine)
    assert same(weights(trainer), expected())
    assert trainer.epochs_seen == 2


def test_an_epoch_that_takes_no_step_is_an_error_and_no_endless_loop() -> None:
    class Idle(Trainer):
        def epoch(self) -> None:
            pass

    with pytest.raises(ConfigError, match=r"epoch\(\) took no step"):
        fitted(Idle)


def test_step_overridden() -> None:
    class Mine(Trainer):
        def step(self, window: Window) -> None:
            for batch, batch_idx in window:
                self.backward(self.training_step(batch, batch_idx))
            self.optimizer_step()
            self.steps_seen = getattr(self, "steps_seen", 0) + 1

    trainer = fitted(Mine)
    assert same(weights(trainer), expected())
    assert trainer.steps_seen == 10


def test_evaluate_overridden() -> None:
    class Mine(Trainer):
        def evaluate(self) -> dict[str, float] | None:
            metrics = super().evaluate()
            return None if metrics is None else {**metrics, "val/double": 2 * metrics["val/loss"]}

    result = fitted(Mine, val_dataloader=batches(8)).result
    assert result.metrics["val/double"] == 2 * result.final_val_loss


def test_checkpoint_overridden(tmp_path: Path) -> None:
    class Mine(Trainer):
        def checkpoint(self, reasons: Any = ("asked for",), *, best: bool = False) -> None:
            super().checkpoint(reasons, best=best)
            saved.append((self.global_step, list(reasons), best))

    saved: list[Any] = []
    fitted(Mine, run_dir=tmp_path)
    assert saved == [(5, ["epoch"], False), (10, ["epoch", "end"], False)]


class Asks(Callback):
    """Asks for a checkpoint where one must not be taken at once."""

    def __init__(self, event: str, step: int) -> None:
        def ask(trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.checkpoint(["mine"])

        setattr(self, event, ask)


@pytest.mark.parametrize(
    ("event", "step"), [("on_after_backward", 2), ("on_step_end", 3), ("on_train_batch_end", 2)]
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_checkpoint_asked_for_in_a_window_is_made_at_its_end(
    event: str, step: int, streamed: bool, tmp_path: Path
) -> None:
    def run(**changes: Any) -> Trainer:
        data = Rows() if streamed else batches()
        return fitted(
            train_dataloader=data,
            val_dataloader=batches(8),
            validate_every=3,
            checkpoint=CheckpointPolicy(keep_last=None),
            run_dir=tmp_path,
            resume=mode,
            **changes,
        )

    mode = "auto"
    whole = run(callbacks=[Asks(event, step)])
    assert scan(tmp_path / "checkpoints")[0][0].info["reasons"] == ["mine"]
    mode = str(tmp_path / "checkpoints" / "step_00000003")
    resumed = run()
    assert same(weights(resumed), weights(whole))


class Rows:
    """An iterable of batches that is no DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        return iter(batches())


def test_a_run_stays_in_its_folder_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    trainer = Trainer(**settings(run_dir="runs/r"))
    trainer.on_step_end = lambda metrics: os.chdir(tmp_path / "elsewhere")
    assert trainer.fit().checkpoint == tmp_path / "runs/r/checkpoints/step_00000010"
    assert not list((tmp_path / "elsewhere").iterdir())

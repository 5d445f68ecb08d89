"""What is not finite never reaches the weights, and each policy does what it says (one process)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Callback, CheckpointPolicy, Trainer
from paceline.callbacks import GradientMonitor
from paceline.checkpoint import decode
from paceline.errors import NonFiniteError
from paceline.testing import StopAt, rows
from small import batches, checkpoints, fitted, line, points, same, settings, weights

BAD = 9  # the row that is not finite: in the third window of 4 rows


def poisoned(n: int = 20, *rows: int, value: float = math.nan) -> TensorDataset:
    x, y = points(n).tensors
    y = y.clone()
    for row in rows or (BAD,):
        y[row] = value
    return TensorDataset(x, y)


def data(*rows: int, **options: Any) -> DataLoader:
    return DataLoader(poisoned(20, *rows), 4, **options)


class Normed(nn.Module):
    """A line behind batch normalisation, whose running statistics move in forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.line = nn.BatchNorm1d(3), line()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(self.norm(x))


class BadInput(Trainer):
    """The inputs are what is bad: batch normalisation sees them."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return self.loss_fn(self.model(x + 0 * y), torch.nan_to_num(y))


def without(*windows: int, model: nn.Module | None = None, epochs: int = 1) -> dict[str, Any]:
    """Weights after every window but these, by a loop of our own; momentum as in `settings`."""
    model = line() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = 0
    for _ in range(epochs):
        for x, y in batches():
            if step not in windows:
                nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            step += 1
    return {f"model.{name}": value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_raise_leaves_the_weights_as_before_and_says_where(value: float, tmp_path: Path) -> None:
    trainer = Trainer(
        **settings(train_dataloader=DataLoader(poisoned(20, value=value), 4), run_dir=tmp_path)
    )
    before: list[Any] = []
    trainer.on_train_batch_start = lambda batch, batch_idx: before.append(weights(trainer))
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    text = str(caught.value)
    for part in ("step 3 is not finite", "rank 0, batch 2", "samples [8, 9, 10, 11]", "loss "):
        assert part in text
    assert "first parameter with a non-finite gradient: model.weight" in text
    assert "on_nonfinite='raise'" in text
    assert same(weights(trainer), before[2])
    assert checkpoints(tmp_path) == []


def test_the_batch_is_kept_for_a_replay(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="the batch is kept in"):
        fitted(train_dataloader=data(), run_dir=tmp_path)
    folder = tmp_path / "nonfinite_step_3_rank_0"
    tensors = load_file(folder / "batch.safetensors")
    kept = decode(tensors, json.loads((folder / "batch.json").read_text()))["batch"]
    x, y = poisoned().tensors
    assert torch.equal(kept[0], x[8:12])
    assert torch.equal(kept[1].nan_to_num(7.0), y[8:12].nan_to_num(7.0))


def test_what_cannot_be_kept_does_not_hide_the_failure(tmp_path: Path) -> None:
    (tmp_path / "nonfinite_step_3_rank_0").touch()
    with pytest.raises(NonFiniteError, match=r"(?s)step 3 is .* nothing is kept in .*rank_0"):
        fitted(train_dataloader=data(), run_dir=tmp_path)


def test_without_a_run_folder_no_batch_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NonFiniteError):
        fitted(train_dataloader=data())
    assert list(tmp_path.iterdir()) == []


def test_skip_passes_over_the_window_and_only_it(capsys: Any) -> None:
    trainer = fitted(train_dataloader=data(), epochs=1, on_nonfinite="skip")
    assert same(weights(trainer), without(2))
    assert (trainer.global_step, trainer.result.complete) == (5, True)
    assert "step 3 is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("accumulation", [1, 2])
def test_skip_drops_a_whole_window(accumulation: int) -> None:
    trainer = fitted(
        train_dataloader=DataLoader(poisoned(), 4 // accumulation),
        gradient_accumulation_steps=accumulation,
        epochs=1,
        on_nonfinite="skip",
    )
    expected = without(2)
    for name, value in weights(trainer).items():
        assert torch.allclose(value, expected[name], atol=1e-6)


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_running_statistics_stay_clean(policy: str, tmp_path: Path) -> None:
    trainer = fitted(
        BadInput,
        model=Normed(),
        train_dataloader=data(),
        epochs=1,
        on_nonfinite=policy,
        run_dir=tmp_path,
    )
    assert all(bool(torch.isfinite(value).all()) for value in weights(trainer).values())
    batches_seen = {"skip": 4, "stop": 2}[policy]  # the bad one is as if it had not been
    assert trainer.model.norm.num_batches_tracked == batches_seen


def test_stop_saves_and_the_run_may_go_on(tmp_path: Path) -> None:
    first = fitted(train_dataloader=data(), epochs=1, on_nonfinite="stop", run_dir=tmp_path)
    assert (first.result.stopped_by, first.result.complete) == ("non-finite", False)
    assert checkpoints(tmp_path) == ["step_00000003"]
    second = fitted(train_dataloader=data(), epochs=1, on_nonfinite="stop", run_dir=tmp_path)
    assert second.result.complete
    assert same(weights(second), without(2))


def test_rewind_goes_back_and_passes_over_the_window(tmp_path: Path, capsys: Any) -> None:
    seen: list[int] = []

    class Watches(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append(self.global_step)
            return super().training_step(batch, batch_idx)

    trainer = fitted(
        Watches,
        train_dataloader=data(),
        epochs=1,
        on_nonfinite="rewind",
        run_dir=tmp_path,
        checkpoint=CheckpointPolicy(every_steps=2),
        log_every=1,
    )
    assert seen == [0, 1, 2, 3, 4]  # back to step 2; window 2 is not tried again
    assert same(weights(trainer), without(2))
    assert trainer.progress.skips == [2]
    assert [row["step"] for row in rows(tmp_path) if "train/loss" in row] == [1, 2, 4, 5]
    assert "went back to step 2; step 3 will be skipped" in capsys.readouterr().err


def test_rewind_goes_back_over_good_steps_and_takes_them_again(tmp_path: Path) -> None:
    trainer = fitted(
        train_dataloader=data(), epochs=1, on_nonfinite="rewind", run_dir=tmp_path, log_every=1
    )  # no checkpoint is due in the epoch: back to the start
    assert same(weights(trainer), without(2))
    assert [row["step"] for row in rows(tmp_path) if "train/loss" in row] == [1, 2, 4, 5]


def test_rewind_more_than_once(tmp_path: Path) -> None:
    trainer = fitted(
        train_dataloader=data(BAD, 17), epochs=2, on_nonfinite="rewind", run_dir=tmp_path
    )
    assert trainer.progress.skips == [2, 4, 7, 9]
    assert same(weights(trainer), without(2, 4, 7, 9, epochs=2))
    assert (trainer.global_step, trainer.result.complete) == (10, True)


class Plain:
    """The same batches from an iterable that is no DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        return iter(data())


@pytest.mark.parametrize("loader", [Plain, data], ids=["streamed", "indexed"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_rewind_with_any_loader(loader: Any, epochs: int, tmp_path: Path) -> None:
    trainer = fitted(
        train_dataloader=loader(),
        epochs=epochs,
        on_nonfinite="rewind",
        run_dir=tmp_path,
        checkpoint=CheckpointPolicy(every_steps=2),
    )
    bad = [2, 7, 12][:epochs]
    assert same(weights(trainer), without(*bad, epochs=epochs))


def test_the_list_of_what_to_skip_survives_a_resume(tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> Trainer:
        return fitted(
            train_dataloader=data(),
            epochs=2,
            on_nonfinite="rewind",
            run_dir=tmp_path,
            callbacks=list(callbacks),
            log_every=1,
        )

    run(StopAt(4))
    resumed = run()
    assert resumed.progress.skips == [2, 7]
    assert same(weights(resumed), without(2, 7, epochs=2))


def test_a_rewind_to_a_stop_in_mid_boundary_finishes_that_boundary(tmp_path: Path) -> None:
    """The checkpoint gone back to is one that a stop left with the end of an epoch to do."""

    def run(*callbacks: Callback) -> Trainer:
        return fitted(
            train_dataloader=DataLoader(poisoned(20, 1), 4),
            val_dataloader=batches(8),
            epochs=2,
            on_nonfinite="rewind",
            run_dir=tmp_path,
            callbacks=list(callbacks),
            checkpoint=CheckpointPolicy(every_epochs=None),
        )

    run(StopAt(5))
    resumed = run()
    assert resumed.result.complete
    assert resumed.progress.skips == [0, 5]
    assert same(weights(resumed), without(0, 5, epochs=2))


def test_a_norm_that_is_not_finite_counts_where_one_is_taken() -> None:
    class Steep(Trainer):
        """A finite loss with an infinite gradient, in the third window."""

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            steep = (self.model.weight * 0).sum().sqrt() if self.global_step == 2 else 0.0
            return loss + steep

    for ways in ({"max_grad_norm": 1e9}, {"callbacks": [GradientMonitor()]}):
        with pytest.raises(NonFiniteError, match=r"step 3 is not finite.*\n.*gradient norm nan"):
            fitted(Steep, epochs=1, **ways)
        trainer = fitted(Steep, epochs=1, on_nonfinite="skip", **ways)
        assert same(weights(trainer), without(2))
    checked = type("Checked", (Steep,), {"check_gradients": True})
    with pytest.raises(NonFiniteError):
        fitted(checked, epochs=1)


def test_skip_under_a_loss_scale() -> None:
    trainer = fitted(train_dataloader=data(), epochs=2, precision="fp16", on_nonfinite="skip")
    assert trainer.result.complete
    assert all(bool(torch.isfinite(value).all()) for value in weights(trainer).values())


def test_the_schedule_goes_on_over_a_window_that_is_dropped() -> None:
    model = line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = fitted(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        train_dataloader=data(),
        epochs=1,
        on_nonfinite="skip",
    )
    assert trainer.learning_rates == {"optimizer": 0.1 * 0.5**5}


def test_a_metric_that_is_not_finite_stops_nothing(tmp_path: Path) -> None:
    class Logs(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("train/odd", math.nan)
            return super().training_step(batch, batch_idx)

    assert fitted(Logs, run_dir=tmp_path, log_every=1).result.complete


class Centred(nn.Module):
    """A line behind a running mean that it assigns anew; it may come with the first batch alone."""

    mean: torch.Tensor | None

    def __init__(self, *, late: bool) -> None:
        super().__init__()
        self.line = line()
        self.register_buffer("mean", None if late else torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = torch.zeros(3) if self.mean is None else self.mean
        self.mean = 0.5 * before + 0.5 * x.mean(0)
        return self.line(x)


@pytest.mark.parametrize("late", [False, True])
def test_a_skipped_window_moves_no_buffer_that_is_assigned_anew(late: bool) -> None:
    """Given windows whose first and third are bad, then the mean is that of the others by hand."""
    trainer = fitted(
        BadInput,
        model=Centred(late=late),
        train_dataloader=data(0, BAD),
        on_nonfinite="skip",
        epochs=1,
    )
    mean, x = torch.zeros(3), points().tensors[0]
    for window in (1, 3, 4):
        mean = 0.5 * mean + 0.5 * x[4 * window : 4 * window + 4].mean(0)
    assert torch.equal(trainer.model.mean, mean)

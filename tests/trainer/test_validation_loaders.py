"""Several validation loaders by name: each has its own metrics, and none knows of another."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from builders import Noisy, Regression, loader, make_model
from paceline import Callback, MetricMonitor, Trainer
from paceline.errors import ConfigError, DataError, MetricError
from paceline.testing import Ranks, bits, rows
from small import batches, fitted, line, message, points, same, settings, weights

NEAR, FAR = 11, 30  # samples


def near_and_far() -> dict[str, DataLoader]:
    """Loaders whose batches are not even, on one rank or two."""
    return {"near": batches(NEAR, 4), "far": DataLoader(points(FAR, seed=8), 7)}


class Measuring(Trainer):
    """Logs a mean, a largest target, and counts what it is given."""

    def on_validation_start(self) -> None:
        self.seen: dict[Any, list[int]] = {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val/target", batch[1].mean())
        self.log("bias", batch[1].mean() * 2)
        self.seen.setdefault(self.val_name, []).append(batch_idx)

    def get_val_metrics(self) -> dict[str, Any]:
        assert self.val_name is None
        return {"val/loaders": len(self.seen)}


def by_hand(model: nn.Module) -> dict[str, float]:
    """The metrics, in plain torch."""
    expected: dict[str, float] = {}
    for name, data in (("near", points(NEAR)), ("far", points(FAR, seed=8))):
        x, y = data.tensors
        with torch.no_grad():
            expected[f"val/{name}/loss"] = nn.functional.mse_loss(model(x), y).item()
        expected[f"val/{name}/target"] = y.mean().item()
        expected[f"val/{name}/bias"] = y.mean().item() * 2
    return {**expected, "val/loaders": 2.0}


def measured() -> tuple[dict[str, float], dict[str, float], Any]:
    trainer = fitted(Measuring, val_dataloader=near_and_far(), epochs=1)
    return trainer.result.metrics, by_hand(trainer.model), trainer.seen


def test_each_loader_has_its_own_means() -> None:
    metrics, expected, seen = measured()
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert seen == {"near": [0, 1, 2], "far": [0, 1, 2, 3, 4]}


def test_so_it_has_on_two_ranks(ranks: Ranks) -> None:
    for metrics, expected, _ in ranks(measured, 2):
        assert metrics == pytest.approx(expected, rel=1e-5)


class Drawing(Regression):
    """Its loaders and its steps draw random numbers."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        self.log("val/loss", (self.model(x + torch.rand(())) - y).square().mean())


def drawing(val_dataloader: Any, **changes: Any) -> Trainer:
    model = make_model()
    trainer = Drawing(
        model=model,
        optimizer=torch.optim.Adam(model.parameters()),
        train_dataloader=loader(Noisy(40)),
        val_dataloader=val_dataloader,
        **{"epochs": 2, "validate_every": 2, "progress": False, **changes},
    )
    trainer.train(seed=5)
    return trainer


def streamed() -> Any:
    """Batches that are drawn while they are read."""

    class Stream:
        def __iter__(self) -> Any:
            for _ in range(3):
                x = torch.randn(5, 8)
                yield x, x[:, :1], torch.arange(5)

    return Stream()


@pytest.mark.parametrize("make", [lambda: loader(Noisy(23)), streamed])
def test_a_loader_more_changes_no_bit_of_another_nor_of_training(make: Any) -> None:
    alone = drawing({"far": make()})
    both = drawing({"near": loader(Noisy(31)), "far": make(), "third": loader(Noisy(7))})
    name = "val/far/loss"
    assert both.result.metrics[name] == alone.result.metrics[name]
    assert len(set(both.result.metrics.values())) == 3
    assert same(weights(both), weights(alone))
    assert same(weights(both), weights(drawing(None)))


def test_two_names_of_one_loader_draw_their_own_random_numbers() -> None:
    metrics = drawing({"a": loader(Noisy(23)), "b": loader(Noisy(23))}).result.metrics
    assert metrics["val/a/loss"] != metrics["val/b/loss"]


def test_a_loss_is_final_only_if_it_is_the_only_one() -> None:
    assert fitted(val_dataloader={"near": batches(8)}).result.final_val_loss is None

    class Whole(Trainer):
        def get_val_metrics(self) -> dict[str, Any]:
            return {"val/loss": 2.0}

    assert fitted(Whole, val_dataloader={"near": batches(8)}).result.final_val_loss == 2.0


# Stopping


class LeaveIn(Callback):
    """Asks for a stop in the validation after a step, at a batch of a loader, and waits for it."""

    def __init__(self, step: int, name: str, batch: int) -> None:
        self.place = (step, name, batch)

    def on_validation_batch_end(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.global_step, trainer.val_name, batch_idx) == self.place:
            trainer.request_stop("test")
            while not trainer.stopping():
                time.sleep(0.01)


def stopped_and_whole(folder: Path, name: str) -> list[Any]:
    def run(where: str, *callbacks: Callback) -> Trainer:
        loaders = {"near": loader(Noisy(NEAR), 2), "far": loader(Noisy(FAR), 3)}
        monitor = MetricMonitor("val/far/loss")
        return drawing(
            loaders,
            callbacks=callbacks,
            run_dir=folder / where,
            metric_monitor=monitor,
            log_every=1,
        )

    stopped = run("parts", LeaveIn(4, name, 1))
    assert (stopped.progress.pending, stopped.global_step) == (["validation"], 4)
    outcomes = [run("whole"), run("parts")]
    return [bits([weights(t), t.result.metrics, t.result.best]) for t in outcomes]


@pytest.mark.parametrize("name", ["near", "far"])
def test_a_validation_left_in_a_loader_begins_again_at_its_resume(
    name: str, ranks: Ranks, tmp_path: Path
) -> None:
    for size in (1, 2):
        folder = tmp_path / str(size)
        for whole, parts in ranks(stopped_and_whole, size, folder, name):
            assert parts == whole
        assert rows(folder / "parts") == rows(folder / "whole")


class Shares:
    """A stream of which each rank has its own number of batches."""

    def __init__(self, lengths: tuple[int, int]) -> None:
        self.lengths = lengths

    def __iter__(self) -> Any:
        for _ in range(self.lengths[torch.distributed.get_rank()]):
            yield torch.ones(2, 3), torch.ones(2, 1)


class StopsLate(Trainer):
    """Its ranks exchange something in each step of the second loader, at first or always."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.val_name == "even":
            index = torch.tensor(float(batch_idx))
            self.world.all_reduce(index)
            assert index == 2 * batch_idx
            if batch_idx == 2 and self.world.rank == 1:
                self.request_stop("test")
        time.sleep(0.02)
        super().validation_step(batch, batch_idx)


def stop_out_of_step() -> tuple[list[str], int]:
    loaders = {"uneven": Shares((9, 2)), "even": Shares((50, 50))}
    trainer = StopsLate(**settings(val_dataloader=loaders, validate_every=1))
    trainer.fit()
    return trainer.progress.pending, trainer.global_step


def test_ranks_with_unequal_shares_of_one_loader_leave_the_next_at_the_same_batch(
    ranks: Ranks,
) -> None:
    assert ranks(stop_out_of_step, 2) == [(["validation"], 1)] * 2


# Mistakes


def test_a_loader_without_data_is_named() -> None:
    with pytest.raises(DataError, match=r"val_dataloader\['far'\].*yields no batch"):
        fitted(val_dataloader={"near": batches(8), "far": []})
    with pytest.raises(DataError, match=r"val_dataloader\['far'\]: the data are empty"):
        fitted(val_dataloader={"near": batches(8), "far": batches(0)})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({}, "val_dataloader: it holds no loader"),
        ({"a/b": batches(8)}, r"val_dataloader['a/b']: a name is text without '/'"),
        ({3: batches(8)}, "val_dataloader[3]: a name is text"),
        ({"near": 3}, "val_dataloader['near']=3: a seed is given by name"),
        ({"near": None}, "val_dataloader['near']: None cannot be iterated"),
        ({"near": iter([])}, "val_dataloader['near']: <list_iterator"),
    ],
)
def test_what_is_no_loader_is_named(given: Any, error: str) -> None:
    assert error in message(ConfigError, val_dataloader=given)


def test_a_monitored_loss_that_no_loader_measures_is_refused_before_training() -> None:
    told = message(ConfigError, val_dataloader=near_and_far(), metric_monitor=MetricMonitor())
    assert "metric_monitor: 'val/loss' is not measured" in told
    assert "val/near/loss, val/far/loss" in told
    monitor = MetricMonitor("val/far/loss")
    assert fitted(val_dataloader=near_and_far(), metric_monitor=monitor).result.best is not None
    told = message(
        MetricError, Measuring, val_dataloader=near_and_far(), metric_monitor=MetricMonitor()
    )
    assert "There is: val/far/bias" in told  # its own step might have logged anything


def test_an_error_in_a_step_names_the_loader() -> None:
    class Fails(Trainer):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.val_name == "far" and batch_idx == 1:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fitted(Fails, val_dataloader=near_and_far())
    assert "in the validation 'far' after step 5, batch 1" in caught.value.__notes__[0]


def test_the_plan_tells_of_each_loader() -> None:
    data = {"near": DataLoader(points(10), 4, drop_last=True)}
    said = [line["decision"] for line in fitted(val_dataloader=data).plan.as_list()]
    assert "validation near: drop_last leaves out 2 of 10 samples a pass" in said


def test_a_plain_loader_keeps_its_numbers() -> None:
    """Random streams of a single loader depend on no name: what it measured, it measures."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(6, 3, generator=generator), torch.zeros(6, 1))

    class Draws(Trainer):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/drawn", torch.rand(()))

    drawn = fitted(Draws, model=line(), val_dataloader=DataLoader(data, 6)).result.metrics
    assert drawn == {"val/drawn": 0.8387994170188904}

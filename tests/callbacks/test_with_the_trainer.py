"""The callbacks in real runs: resumed, watched, stopped, with what they leave in the run folder."""

from __future__ import annotations

import csv
import io
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from real_runs import LeaveValidation, build, check_resumed, check_undisturbed

from builders import Noisy
from paceline import Callback
from paceline.callbacks import (
    AveragedWeights,
    GradientMonitor,
    LearningRate,
    Progress,
    Throughput,
    TimeLimit,
    progress,
)
from paceline.errors import NonFiniteError
from paceline.log.run_record import read_run
from paceline.log.sinks import read_rows
from paceline.testing import StopAt, bits, rows


def everything(file: io.StringIO | None = None) -> list[Callback]:
    return [
        AveragedWeights(0.9, every=2),
        GradientMonitor(per_layer=True),
        LearningRate(),
        Throughput(),
        TimeLimit(hours=1),
        Progress(file=file or io.StringIO(), line_seconds=0),
    ]


def test_nothing_of_it_changes_a_bit_of_the_trained_weights(tmp_path: Path) -> None:
    check_undisturbed(tmp_path, everything)


@pytest.mark.parametrize("stop", [StopAt(1), StopAt(5), StopAt(6), LeaveValidation(6)])
def test_a_resumed_run_ends_as_if_it_had_never_stopped(tmp_path: Path, stop: Callback) -> None:
    check_resumed(tmp_path, everything, stop)


def test_a_validation_that_is_left_saves_the_trained_weights(tmp_path: Path) -> None:
    plain = build(None, max_steps=6)
    plain.train(seed=5)
    trainer = build(tmp_path, AveragedWeights(0.9), LeaveValidation(6))
    trainer.train(seed=5)
    assert bits(trainer.model.state_dict()) == bits(plain.model.state_dict())
    loaded = build(tmp_path, AveragedWeights(0.9), StopAt(6))
    loaded.train(seed=5)
    assert loaded.global_step == 6
    assert bits(loaded.model.state_dict()) == bits(plain.model.state_dict())


def test_validation_measures_the_average() -> None:
    raw, averaged = build(None), build(None, AveragedWeights(0.9))
    assert raw.train(seed=5).final_val_loss != averaged.train(seed=5).final_val_loss
    callback = averaged.callbacks[0]
    with callback.applied():
        x, y = Noisy(23, noise=0).x, Noisy(23, noise=0).y
        applied = torch.nn.functional.mse_loss(averaged.model.eval()(x), y)
    averaged.model.load_state_dict(callback.averaged_state_dict())
    assert torch.equal(torch.nn.functional.mse_loss(averaged.model(x), y), applied)


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    build(tmp_path, *everything(), max_grad_norm=1.0).train(seed=5)
    training = [row for row in rows(tmp_path) if "train/loss" in row]
    assert [row["step"] for row in training] == [2, 4, 6, 8, 10, 12]
    assert {"lr/0", "lr/1", "grad_norm", "grad_norm/0", "grad_norm/3"} <= training[0].keys()
    assert [row["lr/1"] for row in training] == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]
    timing = [row for row in read_rows(tmp_path / "timing.jsonl") if "step_seconds" in row]
    assert [row["step"] for row in timing] == [2, 4, 6, 8, 10, 12]
    assert all(row["samples_per_second"] > 0 and row["items_per_second"] > 0 for row in timing)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    samples = dict.fromkeys(row["samples"] for row in rows(tmp_path))
    assert [float(line["samples"]) for line in table] == list(samples)
    record = read_run(tmp_path)
    assert (record["status"], record["stopped_by"], record["seed"]) == ("complete", "max_steps", 5)
    assert json.dumps(record["plan"]).count("decision") == len(record["plan"]) > 0


def test_progress_shows_rows_and_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    # The longest pause between two lines is over at each look at this clock.
    clock = itertools.count(0.0, 1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    build(None, *everything(out)).train(seed=5)
    lines = out.getvalue().splitlines()
    training = [line for line in lines if line.startswith("epoch")]
    assert [line.split("  ")[:2] for line in training] == [
        ["epoch 1", "step 2/12"],
        ["epoch 1", "step 4/12"],
        ["epoch 2", "step 6/12"],
        ["epoch 2", "step 8/12"],
        ["epoch 2", "step 10/12"],
        ["epoch 3", "step 12/12"],
    ]
    assert all("  loss " in line and "samples/s" in line for line in training)
    results = [line for line in lines if line.startswith("validation at") and "loss" in line]
    assert len(results) == 4


def test_a_time_limit_stops_the_run_and_it_goes_on_later(tmp_path: Path) -> None:
    first = build(tmp_path, TimeLimit(seconds=1e-9)).train(seed=5)
    assert (first.stopped_by, first.complete, first.global_step) == ("time limit", False, 1)
    assert read_run(tmp_path)["status"] == "stopped"
    second = build(tmp_path, TimeLimit(hours=1)).train(seed=5)
    assert (second.complete, second.global_step) == (True, 12)
    assert [start["stopped_by"] for start in read_run(tmp_path)["starts"]] == ["time limit"]


class BreakGradient(Callback):
    """Makes one gradient infinite at a step, while the loss stays finite."""

    priority = 1

    def on_before_optimizer_step(self, trainer: Any, optimizer: torch.optim.Optimizer) -> None:
        if trainer.global_step == 3:
            trainer.model[3].bias.grad.fill_(torch.inf)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    trainer = build(None, BreakGradient(), GradientMonitor())
    with pytest.raises(NonFiniteError, match="step 4"):
        trainer.train(seed=5)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


class FailValidation(Callback):
    def on_validation_batch_end(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        raise ValueError("in validation")


def test_a_validation_that_fails_leaves_the_trained_weights() -> None:
    plain = build(None, max_steps=3, val_dataloader=None, validate_every="epoch")
    plain.train(seed=5)
    trainer = build(None, AveragedWeights(0.9), FailValidation())
    with pytest.raises(ValueError, match="in validation"):
        trainer.train(seed=5)
    assert bits(trainer.model.state_dict()) == bits(plain.model.state_dict())

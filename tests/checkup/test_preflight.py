"""Preflight: the first steps of a run, taken for real, and what they tell."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.checkpoint import CheckpointPolicy, reasons_due, to_keep
from paceline.checkup import PreflightReport, preflight
from paceline.checkup.costs import Length, most_checkpoints
from paceline.checkup.preflight_checks import labels
from paceline.checkup.rehearsal import Seen, _watch_loss
from paceline.errors import ConfigError


class Kept(NamedTuple):
    save_id: int
    step: int
    best: bool
    info: dict[str, Any]


def found(report: PreflightReport, name: str) -> tuple[str, str]:
    """(status, detail) of the one check of that name."""
    (check,) = [check for check in report.checks if check.name == name]
    return check.status, check.detail


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts}


def test_a_sound_recipe_passes_without_a_warning_and_leaves_no_file(recipe, tmp_path: Path):
    checked = recipe()
    before = files(tmp_path)
    report = preflight(checked)
    assert report.passed
    assert [c for c in report.checks if c.status != "PASS"] == []
    assert files(tmp_path) == before
    assert found(report, "output shape")[0] == "PASS"  # class indices are no mistake
    assert "ln(3) = 1.1" in found(report, "loss at the start")[1]
    assert "40 samples, 5 batches an epoch" in found(report, "training data")[1]
    assert "(8, 6) float32, (8,) int64" in found(report, "training data")[1]
    assert "100 samples, 13 batches" in found(report, "validation data")[1]
    assert "83 parameters, all trainable" in found(report, "components")[1]
    assert "equal bit by bit" in found(report, "checkpoint")[1]


def test_the_numbers_are_those_of_the_whole_run(recipe):
    report = preflight(recipe())
    assert report.seconds_per_step is not None
    assert report.seconds_for_the_run is not None
    assert report.seconds_for_the_run > 100 * report.seconds_per_step  # and 20 validations
    assert report.peak_memory_mb is not None
    assert report.peak_memory_mb > 50
    one = preflight(recipe("+checkpoint.keep_last=1")).disk_bytes
    three = preflight(recipe("+checkpoint.keep_last=3")).disk_bytes
    assert one is not None
    assert three == pytest.approx(2 * one, rel=0.01)  # one more is always being written


def test_of_several_seeds_one_is_rehearsed_and_all_are_counted(recipe, tmp_path: Path):
    one, two = preflight(recipe("+seed=3")), preflight(recipe("+seeds=[3,4]"))
    assert two.passed
    assert two.disk_bytes == pytest.approx(2 * (one.disk_bytes or 0), rel=0.01)
    assert "2 seeds, one run each" in found(two, "the whole run")[1]
    assert not (tmp_path / "runs").exists()


def test_an_earlier_run_is_neither_read_nor_changed(recipe, tmp_path: Path):
    from paceline.recipe import build_trainer

    checked = recipe("trainer.epochs=1", "+trainer.progress=false", "lr_scheduler.warmup=1")
    build_trainer(checked).train(seed=0)
    run = tmp_path / checked.run_dir
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert preflight(checked).passed
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in run.parent.iterdir()) == [run.name]


@pytest.mark.parametrize(
    ("override", "name", "status", "said"),
    [
        ("+model.unused=true", "unused parameters", "WARN", "model.spare.weight, model.spare.bias"),
        ("+model.dead=true", "zero gradients", "WARN", "model.spare.weight, model.spare.bias"),
        ("+model.scale=200.0", "loss at the start", "WARN", "confident and wrong"),
        ("+model.frozen=true", "components", "PASS", "83 parameters, 27 trainable"),
        ("optimizer.lr=500.0", "loss in the steps", "FAIL", "is lr too high, or a warm-up"),
        ("optimizer.lr=1e-30", "optimizer step", "FAIL", "no weight changed"),
        ("+model.blind=true", "outputs", "WARN", "the same for all samples"),
        ("+train_dataloader.dataset.same=true", "inputs", "WARN", "the same in all samples"),
        (
            "+train_dataloader.dataset.highest=3",
            "labels",
            "FAIL",
            "from 0 to 3, and outputs (8, 3)",
        ),
        ("optimizer.lr=0.0", "settings", "FAIL", "above zero"),
        ("+model.wrong=true", "forward pass", "FAIL", "RuntimeError: mat1 and mat2"),
    ],
)
def test_what_is_wrong_with_a_model_is_said(recipe, override, name, status, said):
    report = preflight(recipe(override))
    assert report.passed == (status != "FAIL")
    assert found(report, name)[0] == status
    assert said in found(report, name)[1]


def test_a_loss_that_is_no_number_fails(recipe):
    report = preflight(recipe(loss_fn={"_target_": "toy.undefined"}))
    assert found(report, "forward pass")[0] == "FAIL"
    assert "loss nan" in found(report, "forward pass")[1]
    assert found(report, "checkpoint")[0] == "SKIP"


def test_inputs_that_are_no_numbers_are_named(recipe):
    """They need not fail the run: targets may hold NaN where they are masked."""
    report = preflight(recipe("+train_dataloader.dataset.broken=true"))
    status, detail = found(report, "inputs")
    assert (status, detail[:27]) == ("WARN", "batch[0] of the first batch")
    assert found(report, "backward pass")[0] == "FAIL"


def test_labels_that_the_loss_ignores_are_no_classes():
    loss = partial(torch.nn.functional.cross_entropy, ignore_index=255)
    trainer: Any = SimpleNamespace(loss_fn=loss)
    seen = Seen()
    unwatch = _watch_loss(trainer, seen)
    trainer.loss_fn(torch.zeros(3, 2), torch.tensor([0, 255, 1]))
    unwatch()
    assert (seen.labels, labels(trainer, seen)) == ((0, 1), [])


def test_targets_that_broadcast_against_outputs_are_pointed_out(recipe):
    report = preflight(recipe("+model.classes=1", loss_fn={"_target_": "torch.nn.MSELoss"}))
    assert report.passed
    status, detail = found(report, "output shape")
    assert status == "WARN"
    assert "outputs (8, 1), targets (8,)" in detail


def test_a_failure_names_the_users_own_line_and_skips_the_rest(recipe, tmp_path: Path):
    report = preflight(recipe("+model.wrong=true"))
    line = 1 + next(
        i for i, text in enumerate((tmp_path / "toy.py").read_text().splitlines()) if "@" in text
    )
    assert f"(toy.py:{line})" in found(report, "forward pass")[1].replace(f"{tmp_path}/", "")
    assert "in forward" in report.stack
    assert found(report, "training data")[0] == "PASS"
    for stage in ("backward pass", "optimizer step", "validation", "checkpoint"):
        assert found(report, stage) == ("SKIP", "after the failure of: forward pass")


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_cannot_be_read_fail_with_their_own_words(recipe, workers):
    report = preflight(
        recipe("+train_dataloader.dataset.fails_at=0", f"+train_dataloader.num_workers={workers}")
    )
    status, detail = found(report, "training data")
    assert status == "FAIL"
    assert "OSError: the disk of sample" in detail
    assert found(report, "forward pass")[0] == "SKIP"


def test_a_constructor_that_fails_is_the_components_failure(recipe):
    report = preflight(recipe("optimizer.lr=-1.0"))
    assert found(report, "settings")[0] == "FAIL"
    status, detail = found(report, "components")
    assert status == "FAIL"
    assert "Invalid learning rate" in detail
    assert not any(check.status == "PASS" for check in report.checks[1:-1])


def test_a_checkpoint_that_does_not_come_back_as_it_was_fails(recipe):
    report = preflight(recipe("trainer._target_=toy.Forgetful"))
    assert found(report, "checkpoint") == (
        "FAIL",
        "changed by saving and loading: models/model/last.bias",
    )


NEAR_AND_FAR = {
    name: {
        "_target_": "torch.utils.data.DataLoader",
        "batch_size": 8,
        "dataset": {"_target_": "toy.Points", "n": n},
    }
    for name, n in (("near", 12), ("far", 20))
}


@pytest.mark.parametrize(
    ("overrides", "keys", "name", "said"),
    [
        (["trainer._target_=toy.Pair"], {"model": None, "optimizer": None, "lr_scheduler": None},
         "optimizer step", "4 of 4 parameter tensors changed; one lr 0.1, 0.1; two lr"),
        (["~val_dataloader"], {}, "validation", "there is no val_dataloader"),
        (["~trainer.epochs", "+trainer.max_steps=50"], {}, "the whole run", "50 steps"),
        (["+trainer.max_steps=1", "~lr_scheduler"], {}, "speed", "of a first step"),
        (["checkpoint=null"], {}, "checkpoint", "the recipe saves no checkpoint"),
        (["train_dataloader.dataset._target_=toy.Stream", "~train_dataloader.shuffle",
          "+trainer.max_steps=30"], {}, "training data", "unknown number of samples"),
        (["+trainer.gradient_accumulation_steps=2"], {}, "training data", "in 3 steps"),
        (["+trainer.lr_scheduler_interval=epoch", "lr_scheduler.warmup=2"], {},
         "scheduler step", "stepped 1 times"),
        (["+trainer.precision=bf16"], {}, "components", "on cpu in bf16"),
        (["+trainer.precision=fp16"], {}, "optimizer step", "4 of 4 parameter tensors changed"),
        (["+trainer.on_nonfinite=rewind"], {}, "checkpoint", "equal bit by bit"),
        ([], {"val_dataloader": NEAR_AND_FAR}, "validation data", "near: 12 samples, 2 batches"),
        ([], {"val_dataloader": NEAR_AND_FAR}, "validation", "val/near/accuracy"),
        (["~val_dataloader", "trainer._target_=toy.Judged"], {}, "validation", "val/score"),
    ],
)  # fmt: skip
def test_every_kind_of_run_is_rehearsed(recipe, overrides, keys, name, said):
    report = preflight(recipe(*overrides, **keys))
    assert report.passed, report.checks
    assert said in found(report, name)[1]


TORCH = "torch.optim.lr_scheduler."
WARMUP = [
    {"_target_": TORCH + "LinearLR", "start_factor": 0.1, "total_iters": 10},
    {"_target_": TORCH + "CosineAnnealingLR", "T_max": 90},
]


@pytest.mark.parametrize(
    ("overrides", "schedule", "said"),
    [
        (["+trainer.early_stop=20", "+trainer.metric_monitor.metric_name=val/loss"], {},
         "early_stop is 20 and the run has 20 validations"),
        ([], {"_target_": TORCH + "CosineAnnealingLR", "T_max": 7},
         "lr_scheduler.T_max is 7 and the run has 100 optimizer steps"),
        ([], {"type": "warmup_cosine", "warmup": 100},
         "100 steps of warm-up take all of the run's 100"),
        ([], {"_target_": TORCH + "MultiStepLR", "milestones": [300]},
         "no milestone lies within the run's 100 optimizer steps"),
        (["+trainer.lr_scheduler_interval=epoch"],
         {"_target_": TORCH + "CosineAnnealingLR", "T_max": 100},
         "lr_scheduler.T_max is 100 and the run has 20 epochs"),
        ([], {"_target_": TORCH + "LinearLR", "start_factor": 0.1, "total_iters": 100},
         "100 steps of warm-up take all of the run's 100 optimizer steps"),
        (["trainer._target_=toy.Sequenced", "~lr_scheduler"], {},
         "lr_scheduler: its milestone 500 lies beyond the run's 100 optimizer steps"),
        ([], {"_target_": TORCH + "SequentialLR", "milestones": [30], "schedulers": WARMUP},
         "lr_scheduler.1.T_max is 90 and its part of the run has 70 optimizer steps"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_listed(recipe, overrides, schedule, said):
    report = preflight(recipe(*overrides, **({"lr_scheduler": schedule} if schedule else {})))
    assert report.passed
    assert found(report, "settings")[0] == "WARN"
    assert said in found(report, "settings")[1]


def test_a_schedule_of_schedules_that_fits_is_no_warning(recipe):
    schedule = {"_target_": TORCH + "SequentialLR", "milestones": [10], "schedulers": WARMUP}
    report = preflight(recipe(lr_scheduler=schedule))
    assert [c for c in report.checks if c.status != "PASS"] == []


def test_parameters_in_no_optimizer_are_named(recipe):
    report = preflight(recipe("trainer._target_=toy.Untrained"))
    status, detail = found(report, "components")
    assert status == "FAIL"
    assert "in no optimizer: extra.weight, extra.bias" in detail


def test_a_disk_too_small_for_the_runs_checkpoints_fails(recipe, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3 * 10**6}))
    assert preflight(recipe()).passed
    words = ("trainer.epochs=200", "+checkpoint.every_steps=1", "+checkpoint.keep_last=null")
    report = preflight(recipe(*words))
    assert found(report, "disk")[0] == "FAIL"
    assert "at most 1201 checkpoints at once" in found(report, "disk")[1]


@pytest.mark.parametrize(
    ("policy", "length", "monitored", "most"),
    [
        ({}, (100, 10, 10), False, 2),  # the last one, and the one being written
        ({}, (100, 10, 10), True, 3),  # and the best
        ({"save_best": False}, (100, 10, 10), True, 2),
        ({"keep_last": None}, (100, 10, 10), False, 11),
        ({"keep_last": None, "every_steps": 20}, (100, 10, 10), False, 16),
        ({"every_steps": 10, "keep_every_steps": 20}, (100, 10, 10), False, 7),
        ({"keep_last": 50}, (4, 2, 2), False, 3),  # never more than are made
        ({"keep_last": None}, (None, None, None), False, None),
        ({}, (None, None, None), False, 2),
        ({"keep_every_steps": 5}, (None, None, None), False, None),
    ],
)
def test_the_most_checkpoints_at_once(policy, length, monitored, most):
    counted = most_checkpoints(CheckpointPolicy(**policy), Length(*length), monitored=monitored)
    assert counted == most


@settings(max_examples=60)
@given(
    every=st.integers(1, 6), keep=st.integers(1, 4), permanent=st.none() | st.integers(1, 6),
    steps=st.integers(1, 40), per_epoch=st.integers(1, 10), better=st.sets(st.integers(1, 40)),
)  # fmt: skip
def test_no_run_ever_has_more_checkpoints_than_that(
    every, keep, permanent, steps, per_epoch, better
):
    """Given any policy, when its saves are played through, then the count bounds them."""
    policy = CheckpointPolicy(every_steps=every, keep_last=keep, keep_every_steps=permanent)
    length = Length(steps, steps // per_epoch, -(-steps // per_epoch))
    held: list[Kept] = []
    most = 0
    for step in range(1, steps + 1):
        ended = step // per_epoch if step % per_epoch == 0 else None
        improved = step in better and (ended is not None or step == steps)
        due = reasons_due(policy, step=step, epochs_done=ended, improved=improved)
        if due or step == steps:
            held.append(Kept(step, step, improved, {"reasons": due}))
            most = max(most, len(held))
            kept = to_keep(policy, held)
            held = [c for c in held if c.save_id in kept]
    assert most <= (most_checkpoints(policy, length, monitored=True) or 0)


def test_a_monitored_metric_that_nobody_measures_fails(recipe):
    report = preflight(recipe("+trainer.metric_monitor.metric_name=val/acuracy"))
    status, detail = found(report, "validation")
    assert status == "FAIL"
    assert "val/accuracy" in detail


def test_seeds_that_stand_twice_are_a_mistake_of_the_recipe(recipe):
    with pytest.raises(ConfigError, match="3 appear more than once"):
        recipe("+seeds=[3,4,3]")


def test_one_of_several_processes_is_refused(recipe, monkeypatch):
    checked = recipe()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        preflight(checked)
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://node1:29510")
    with pytest.raises(ConfigError, match="not exist for replica groups"):
        preflight(checked)


def test_the_report_is_plain_json(recipe):
    report = preflight(recipe("+model.wrong=true"))
    data = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert data["passed"] is False
    assert data["gpu_memory_mb"] is None
    assert data["checks"][0]["name"] == "recipe"
    assert {*data} == {
        "checks", "passed", "peak_memory_mb", "gpu_memory_mb", "seconds_per_step",
        "seconds_for_the_run", "disk_bytes",
    }  # fmt: skip

"""Going on: what must be the same, what may grow, what is free, and where a run starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from paceline import Callback, CheckpointPolicy, MetricMonitor, Resume, Trainer
from paceline.errors import CheckpointError, ConfigError, MismatchError, ResumeError
from paceline.testing import StopAt
from small import batches, checkpoints, fitted, line, same, settings, step_rows, weights

KEEP = CheckpointPolicy(keep_last=None)


def stopped(run_dir: Path, step: int = 3, **changes: Any) -> Trainer:
    return fitted(run_dir=run_dir, callbacks=[StopAt(step)], **changes)


def test_another_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    stopped(tmp_path)
    with pytest.raises(MismatchError) as caught:
        fitted(run_dir=tmp_path, model=torch.nn.Linear(3, 1, bias=False))
    told = str(caught.value)
    assert "the checkpoint does not fit model 'model'" in told
    assert f"--init-from {tmp_path / 'checkpoints' / 'step_00000003'}" in told


# A finished run, and one whose end moves


def test_a_finished_run_started_again_trains_nothing(tmp_path: Path, capsys: Any) -> None:
    first = fitted(run_dir=tmp_path, val_dataloader=batches(8))
    written = [tmp_path / name for name in ("metrics.jsonl", "run.json")]
    held = [file.read_bytes() for file in written]
    again = fitted(run_dir=tmp_path, val_dataloader=batches(8))
    assert again.local_batches == 0
    assert same(weights(again), weights(first))
    assert again.result == first.result
    told = capsys.readouterr().err
    assert "is complete (epochs): nothing is left to train. To train on, raise epochs;" in told
    assert [file.read_bytes() for file in written] == held  # it was trained when it was
    assert json.loads(held[1])["status"] == "complete"


@pytest.mark.parametrize(
    ("short", "long"),
    [({"epochs": 2}, {"epochs": 4}), ({"epochs": None, "max_steps": 7}, {"epochs": 4})],
)
def test_a_horizon_may_grow(short: dict[str, Any], long: dict[str, Any], tmp_path: Path) -> None:
    whole = fitted(run_dir=tmp_path / "whole", **long)
    fitted(run_dir=tmp_path / "grown", **short)
    grown = fitted(run_dir=tmp_path / "grown", **long)
    assert grown.result.complete
    assert (grown.global_step, grown.current_epoch) == (20, 4)
    assert same(weights(grown), weights(whole))


def test_a_horizon_may_not_shrink_unless_that_is_accepted(tmp_path: Path) -> None:
    stopped(tmp_path, step=12, epochs=4)
    with pytest.raises(ResumeError, match="epochs: 4 then, 2 now"):
        fitted(run_dir=tmp_path, epochs=2)
    over = fitted(run_dir=tmp_path, epochs=2, resume=Resume(accept=("epochs",)))
    assert (over.result.stopped_by, over.local_batches) == ("epochs", 0)
    shorter = fitted(run_dir=tmp_path, epochs=3, resume=Resume(accept=("epochs",)))
    assert (shorter.result.stopped_by, shorter.global_step) == ("epochs", 15)


def test_a_run_that_ran_out_of_patience_goes_on_with_more(tmp_path: Path) -> None:
    class Worse(Trainer):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", self.global_step)

    def run(patience: int | None) -> Any:
        return fitted(
            Worse,
            run_dir=tmp_path,
            epochs=9,
            val_dataloader=batches(4),
            metric_monitor=MetricMonitor(),
            early_stop=patience,
        ).result

    assert (run(2).stopped_by, run(2).epoch) == ("early stop", 3)
    assert (run(4).stopped_by, run(4).epoch) == ("early stop", 5)
    assert (run(None).stopped_by, run(None).epoch) == ("epochs", 9)


# What must be the same


def optimizer(kind: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> Any:
    model = line()
    return {"model": model, "optimizer": kind(model.parameters(), **{"lr": 0.05, **options})}


class OtherLoss(nn.MSELoss):
    pass


@pytest.mark.parametrize(
    ("then", "now", "key"),
    [
        ({}, {"train_dataloader": batches(20, 5)}, "data.global_batch_size: 4 then, 5 now"),
        ({}, {"gradient_accumulation_steps": 2}, "data.global_batch_size: 4 then, 8 now"),
        ({}, {"train_dataloader": batches(24)}, "data.samples: 20 then, 24 now"),
        ({}, {"train_dataloader": batches(shuffle=True)}, "data.order: 'sequential' then"),
        ({}, {"train_dataloader": batches(drop_last=True)}, "data.drop_last: False then, True"),
        ({}, {"epoch_length": 3}, "data.units: 20 then, 12 now"),
        ({}, {"loss_fn": OtherLoss()}, "loss_fn: "),
        (
            {"loss_fn": nn.HuberLoss(delta=1.0)},
            {"loss_fn": nn.HuberLoss(delta=2.0)},
            "loss_fn.delta: 1.0 then, 2.0 now",
        ),
        (
            {"loss_fn": partial(nn.functional.huber_loss, delta=1.0)},
            {"loss_fn": partial(nn.functional.huber_loss, delta=2.0)},
            "loss_fn.delta: 1.0 then, 2.0 now",
        ),
        ({}, {"precision": "bf16"}, "precision: 'fp32' then, 'bf16' now"),
        ({}, {"max_grad_norm": 1.0}, "max_grad_norm: None then, 1.0 now"),
        ({}, optimizer(), "optimizer.momentum: 0.9 then, 0 now"),
        (optimizer(), optimizer(lr=0.1), "optimizer.lr: 0.05 then, 0.1 now"),
        (optimizer(), optimizer(torch.optim.Adam), "optimizer.class: 'SGD' then, 'Adam' now"),
        (
            optimizer(torch.optim.Adam),
            optimizer(torch.optim.Adam, betas=(0.8, 0.9)),
            "optimizer.betas: '(0.9, 0.999)' then",
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_identity(then: dict[str, Any], now: dict[str, Any], key: str, tmp_path: Path) -> None:
    stopped(tmp_path, **then)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".json"}
    with pytest.raises(ResumeError) as caught:
        fitted(run_dir=tmp_path, **now)
    assert key in str(caught.value)
    name = key.split(":")[0]
    assert f"--accept {name}" in str(caught.value) or "\n" in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before


def test_all_that_differs_is_said_at_once(tmp_path: Path) -> None:
    stopped(tmp_path)
    with pytest.raises(ResumeError) as caught:
        fitted(run_dir=tmp_path, precision="bf16", lr=0.1, train_dataloader=batches(24))
    for key in ("precision", "optimizer.lr", "data.samples"):
        assert f"  {key}: " in str(caught.value)


def test_the_seed_must_be_the_same(tmp_path: Path) -> None:
    stopped(tmp_path)
    with pytest.raises(ResumeError, match="seed: 1 then, 2 now"):
        Trainer(**settings(run_dir=tmp_path)).fit(seed=2)


def test_a_group_of_its_own_is_part_of_the_identity(tmp_path: Path) -> None:
    def grouped(lr: float) -> dict[str, Any]:
        model = line()
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": lr}]
        return {"model": model, "optimizer": torch.optim.SGD(groups, lr=0.05)}

    stopped(tmp_path, **grouped(0.1))
    with pytest.raises(ResumeError, match=r"optimizer.group1.lr: 0.1 then, 0.2 now"):
        fitted(run_dir=tmp_path, **grouped(0.2))
    accept = Resume(accept=("optimizer.group1.lr",))
    trainer = fitted(run_dir=tmp_path, resume=accept, **grouped(0.2))
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.05, 0.2]
    assert fitted(run_dir=tmp_path, epochs=3, **grouped(0.2)).result.complete


def test_what_is_free_may_change(tmp_path: Path) -> None:
    stopped(tmp_path)
    trainer = fitted(
        run_dir=tmp_path,
        train_dataloader=batches(num_workers=0, pin_memory=False),
        val_dataloader=batches(8),
        validate_every=2,
        log_every=1,
        callbacks=[Callback()],
        checkpoint=CheckpointPolicy(every_steps=2),
        compile=False,
        on_nonfinite="skip",
    )
    assert same(weights(trainer), weights(fitted()))


def test_accepted_changes_take_effect(tmp_path: Path) -> None:
    stopped(tmp_path, **optimizer(momentum=0.9))
    accept = Resume(accept=("optimizer.lr", "optimizer.momentum"))
    trainer = fitted(run_dir=tmp_path, resume=accept, **optimizer(lr=0.01, momentum=0.5))
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.01, 0.5)
    assert trainer.result.complete
    assert fitted(run_dir=tmp_path, epochs=3, **optimizer(lr=0.01, momentum=0.5)).global_step == 15


def test_a_prefix_accepts_all_below_it(tmp_path: Path) -> None:
    stopped(tmp_path, **optimizer())
    accept = Resume(accept=("optimizer",))
    trainer = fitted(run_dir=tmp_path, resume=accept, **optimizer(lr=0.01, momentum=0.5))
    assert trainer.learning_rates == {"optimizer": 0.01}


# Schedules


def scheduled(make: Callable[[Any], Any], lr: float = 0.1, **changes: Any) -> dict[str, Any]:
    model = line()
    made = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return {"model": model, "optimizer": made, "lr_scheduler": make(made), **changes}


SCHEDULES: list[tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = [
    (
        lambda o: CosineAnnealingLR(o, 10),
        lambda o: CosineAnnealingLR(o, 20),
        "lr_scheduler.T_max: 10 then, 20 now",
    ),
    (
        lambda o: OneCycleLR(o, 0.1, total_steps=10),
        lambda o: OneCycleLR(o, 0.1, total_steps=20),
        "lr_scheduler.total_steps: 10 then, 20 now",
    ),
    (
        lambda o: MultiStepLR(o, [2, 8]),
        lambda o: MultiStepLR(o, [2, 4]),
        "lr_scheduler.milestones: '[2, 8]' then, '[2, 4]' now",
    ),
    (
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=2), CosineAnnealingLR(o, 8)], [2]),
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=2), CosineAnnealingLR(o, 9)], [2]),
        "lr_scheduler.1.T_max: 8 then, 9 now",
    ),
]


@pytest.mark.parametrize(("then", "now", "key"), SCHEDULES, ids=[key for *_, key in SCHEDULES])
def test_a_changed_schedule_is_refused_and_if_accepted_takes_its_place_on_the_new_curve(
    then: Any, now: Any, key: str, tmp_path: Path
) -> None:
    stopped(tmp_path, step=6, epochs=4, max_steps=10, log_every=50, **scheduled(then))
    with pytest.raises(ResumeError) as caught:
        fitted(run_dir=tmp_path, epochs=4, max_steps=20, **scheduled(now))
    assert key in str(caught.value)
    accept = Resume(accept=("lr_scheduler",))
    grown = fitted(
        run_dir=tmp_path, epochs=4, max_steps=20, log_every=1, resume=accept, **scheduled(now)
    )
    fitted(run_dir=tmp_path / "new", epochs=4, max_steps=20, log_every=1, **scheduled(now))
    expected = {row["step"]: row["lr"] for row in step_rows(tmp_path / "new")}
    assert {row["step"]: row["lr"] for row in step_rows(tmp_path)} == {
        step: pytest.approx(expected[step]) for step in range(7, 21)
    }
    again = fitted(run_dir=tmp_path, epochs=4, max_steps=20, **scheduled(now))
    assert again.learning_rates == grown.learning_rates


def test_an_accepted_rate_keeps_its_place_on_the_schedule(tmp_path: Path) -> None:
    stopped(tmp_path, step=6, **scheduled(lambda o: StepLR(o, 2, 0.5)))
    accept = Resume(accept=("optimizer.lr",))
    trainer = fitted(
        run_dir=tmp_path, resume=accept, **scheduled(lambda o: StepLR(o, 2, 0.5), lr=1.0)
    )
    assert trainer.learning_rates["optimizer"] == pytest.approx(0.5**5)


def test_a_metric_schedule_takes_accepted_settings_and_keeps_its_count(tmp_path: Path) -> None:
    class Worse(Trainer):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", self.global_step)

    def run(patience: int, epochs: int, **changes: Any) -> Trainer:
        return fitted(
            Worse,
            run_dir=tmp_path,
            epochs=epochs,
            val_dataloader=batches(4),
            lr_scheduler_interval="metric",
            **scheduled(lambda o: ReduceLROnPlateau(o, patience=patience)),
            **changes,
        )

    assert run(9, 3).lr_scheduler.num_bad_epochs == 2
    with pytest.raises(ResumeError, match=r"lr_scheduler.patience: 9 then, 2 now"):
        run(2, 4)
    trainer = run(2, 4, resume=Resume(accept=("lr_scheduler",)))
    assert trainer.learning_rates["optimizer"] == pytest.approx(0.01)


# Modes


def test_resume_auto_goes_on_or_starts(tmp_path: Path) -> None:
    assert stopped(tmp_path).local_batches == 3
    assert fitted(run_dir=tmp_path).local_batches == 7


def test_resume_must(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume='must'.*holds no intact checkpoint"):
        fitted(run_dir=tmp_path, resume="must")
    stopped(tmp_path)
    assert fitted(run_dir=tmp_path, resume="must").local_batches == 7


def test_resume_never(tmp_path: Path) -> None:
    stopped(tmp_path)
    with pytest.raises(ConfigError, match=r"resume='never'.*holds a run already \(step 3\)"):
        fitted(run_dir=tmp_path, resume="never")
    assert fitted(run_dir=tmp_path / "new", resume="never").result.complete


def test_resume_fresh_moves_the_old_run_aside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stopped(folder)
    stopped(folder, resume="fresh")
    trainer = fitted(run_dir=folder, resume="fresh")
    assert trainer.local_batches == 10
    assert checkpoints(tmp_path / "run.1") == checkpoints(tmp_path / "run.2") == ["step_00000003"]
    assert checkpoints(folder) == ["step_00000010"]


def test_resume_from_a_path(tmp_path: Path) -> None:
    whole = fitted(run_dir=tmp_path, checkpoint=KEEP, epochs=3, log_every=1)
    held = (tmp_path / "metrics.jsonl").read_bytes()
    chosen = tmp_path / "checkpoints" / "step_00000005"
    again = fitted(run_dir=tmp_path, checkpoint=KEEP, epochs=3, log_every=1, resume=str(chosen))
    assert again.local_batches == 10
    assert same(weights(again), weights(whole))
    assert (tmp_path / "metrics.jsonl").read_bytes() == held
    abandoned = [path.name for path in (tmp_path / "checkpoints" / ".abandoned").iterdir()]
    assert len(abandoned) == 2


def test_resume_from_a_path_that_cannot_be_gone_on_from_abandons_nothing(tmp_path: Path) -> None:
    fitted(run_dir=tmp_path, checkpoint=KEEP)
    chosen = tmp_path / "checkpoints" / "step_00000005"
    with pytest.raises(ResumeError):
        fitted(run_dir=tmp_path, checkpoint=KEEP, resume=str(chosen), precision="bf16")
    assert checkpoints(tmp_path) == ["step_00000005", "step_00000010"]
    next(chosen.glob("*.safetensors")).write_bytes(b"torn")
    with pytest.raises(CheckpointError):
        fitted(run_dir=tmp_path, checkpoint=KEEP, resume=str(chosen))
    assert checkpoints(tmp_path) == ["step_00000005", "step_00000010"]


def test_a_path_of_another_run_is_refused(tmp_path: Path) -> None:
    fitted(run_dir=tmp_path / "other")
    chosen = tmp_path / "other" / "checkpoints" / "step_00000010"
    with pytest.raises(ConfigError, match=r"is no checkpoint of this run.*init_from"):
        fitted(run_dir=tmp_path / "run", resume=str(chosen))


def test_a_run_without_checkpoints_of_its_own_goes_on_from_one_that_is_there(
    tmp_path: Path,
) -> None:
    stopped(tmp_path)
    trainer = fitted(run_dir=tmp_path, checkpoint=None)
    assert trainer.local_batches == 7
    assert checkpoints(tmp_path) == ["step_00000003"]
    assert same(weights(trainer), weights(fitted()))


def test_callbacks_may_come_and_go(tmp_path: Path, capsys: Any) -> None:
    class Counts(Callback):
        count = 0

        def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    fitted(run_dir=tmp_path, epochs=1)
    new = Counts()
    fitted(run_dir=tmp_path, epochs=2, callbacks=[new])
    assert (new.count, "'Counts' is new in this run" in capsys.readouterr().err) == (5, True)
    again = Counts()
    fitted(run_dir=tmp_path, epochs=3, callbacks=[again])
    assert again.count == 10
    capsys.readouterr()
    fitted(run_dir=tmp_path, epochs=4)
    assert "'Counts' of the checkpoint is no longer there" in capsys.readouterr().err


def test_two_callbacks_of_a_class_keep_their_own_state(tmp_path: Path) -> None:
    class Holds(Callback):
        def __init__(self, value: int) -> None:
            self.value = value

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    fitted(run_dir=tmp_path, epochs=1, callbacks=[Holds(1), Holds(2)])
    pair = [Holds(0), Holds(0)]
    fitted(run_dir=tmp_path, callbacks=pair)
    assert [callback.value for callback in pair] == [1, 2]


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("as_list", [False, True])
def test_checkpoint_objects_are_matched_by_name(as_list: bool, tmp_path: Path) -> None:
    class Keeps(Trainer):
        order = ("left", "right")

        def on_setup(self) -> None:
            self.left, self.right = Counter(), Counter()

        @property
        def checkpoint_objects(self) -> Any:
            if as_list:
                return [self.left, self.right]
            return {name: getattr(self, name) for name in self.order}

        def on_step_end(self, metrics: dict[str, Any]) -> None:
            self.left.count += 1
            self.right.count += 10

    fitted(Keeps, run_dir=tmp_path, epochs=1)
    Keeps.order = ("right", "left")
    trainer = fitted(Keeps, run_dir=tmp_path)
    assert (trainer.left.count, trainer.right.count) == (10, 100)


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path: Path, capsys: Any) -> None:
    fitted(run_dir=tmp_path, checkpoint=KEEP)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000010")
    stopped(tmp_path, step=7, checkpoint=KEEP)
    next((tmp_path / "checkpoints" / "step_00000007").glob("*.safetensors")).write_bytes(b"torn")
    trainer = fitted(run_dir=tmp_path, checkpoint=KEEP)
    assert trainer.local_batches == 5
    assert "damaged" in capsys.readouterr().err
    assert same(weights(trainer), weights(fitted()))

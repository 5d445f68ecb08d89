"""AccelHydra at home: its acceptance rows on the Trainer, one test a row.

Rows on recipes and the command line stand in `test_recipes.py`. Where Paceline differs on purpose
the test says what it does instead: `global_step` counts optimizer steps, not micro-batches, and
"best" and "latest" are hints that may name the same checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from builders import Noisy, loader, make_model
from paceline import CheckpointPolicy, MetricMonitor, Resume, Trainer
from paceline.checkpoint import load_tree
from paceline.errors import ConfigError, MetricError, MismatchError, ResumeError
from paceline.testing import StopAt, bits, rows
from paceline.trainer.events import EVENTS
from small import batches, settings


class Example(Trainer):
    """A subclass in AccelHydra's style: both steps its own, results of validation on itself."""

    scores: tuple[float, ...] = ()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, _ = batch
        return ((self.model(x) - y) ** 2).mean()

    def on_validation_start(self) -> None:
        self.errors: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y, _ = batch
        self.errors.append(float(((self.model(x) - y) ** 2).mean()))

    def get_val_metrics(self) -> dict[str, float]:
        if self.scores:
            return {"score": self.scores[self.current_epoch]}
        return {"score": -sum(self.errors) / len(self.errors)}


def make(run_dir: Path | None = None, kind: type[Trainer] = Example, **settings: Any) -> Any:
    model = settings.pop("model", None) or make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = settings.pop("scheduler", None)
    defaults: dict[str, Any] = {
        "train_dataloader": loader(Noisy()),
        "val_dataloader": loader(Noisy(23), shuffle=False),
        "epochs": 3,
        "progress": False,
    }
    return kind(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler and scheduler(optimizer),
        run_dir=run_dir,
        **{**defaults, **settings},
    )


def steps_kept(run_dir: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step_*"))


def test_AH_04_hook_order(tmp_path: Path) -> None:
    """One epoch of two steps, with the epoch that each sees. On purpose metrics, monitor and
    schedule come before on_train_epoch_end, which still sees epoch 0, and the save is the last:
    AccelHydra saves first, and its on_train_epoch_end sees epoch 1."""
    seen: list[str] = []

    def heard(name: str, method: Any) -> Any:
        def hear(*args: Any) -> Any:
            seen.append(f"{name} {trainer.current_epoch}")
            return method(*args)

        return hear

    class Monitor(MetricMonitor):
        def __call__(self, metrics: dict[str, float]) -> bool:
            return heard("monitor", super().__call__)(metrics)

    class Schedule(ConstantLR):
        def step(self) -> None:
            done = self.last_epoch >= 0  # not the one of its constructor
            (heard("lr_scheduler.step", super().step) if done else super().step)()

    trainer = make(
        tmp_path,
        epochs=1,
        epoch_length=2,
        metric_monitor=Monitor("score", "max"),
        scheduler=Schedule,
        lr_scheduler_interval="epoch",
    )
    for name in (*EVENTS, "training_step", "validation_step", "get_val_metrics"):
        setattr(trainer, name, heard(name, getattr(trainer, name)))
    trainer.train()
    batch = ["on_train_batch_start 0", "training_step 0", "on_before_backward 0"]
    batch += ["on_after_backward 0", "on_train_batch_end 0", "on_before_optimizer_step 0"]
    validated = ["on_validation_batch_start 0", "validation_step 0", "on_validation_batch_end 0"]
    assert seen == [
        *["on_setup 0", "on_train_start 0", "on_train_epoch_start 0"],
        *[*batch, "on_step_end 0"] * 2,
        *["on_validation_start 0", *validated * 3, "on_validation_end 0"],
        *["get_val_metrics 0", "on_metrics 0", "monitor 0"],
        *["lr_scheduler.step 0", "on_train_epoch_end 0"],
        *["on_save_checkpoint 1", "on_checkpoint 1", "on_train_end 1", "on_teardown 1"],
    ]


def test_AH_06_epoch_longer_than_the_loader() -> None:
    """150 steps an epoch over 100 batches: each sample is seen exactly three times in 300 steps."""
    counts = torch.zeros(200, dtype=torch.long)
    ends: list[tuple[int, int]] = []

    class Counting(Example):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            counts[batch[2]] += 1
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            ends.append((self.current_epoch, self.global_step))

    data = loader(Noisy(200), batch_size=2)
    trainer = make(kind=Counting, train_dataloader=data, epoch_length=150, epochs=2)
    trainer.train()
    assert ends == [(0, 150), (1, 300)]
    assert (counts == 3).all()


def test_AH_07_one_cycle_horizon(tmp_path: Path) -> None:
    """The schedule spans the run's optimizer steps: it peaks at max_lr and anneals to the end."""
    trainer = make(
        tmp_path,
        scheduler=lambda optimizer: OneCycleLR(optimizer, 0.5, epochs=10, steps_per_epoch=10),
        epochs=10,
        log_every=1,
    )
    trainer.train()
    rates = [row["lr"] for row in rows(tmp_path) if "train/loss" in row]
    assert len(rates) == 100 == trainer.training_horizon
    assert max(rates) == pytest.approx(0.5)
    assert 25 <= rates.index(max(rates)) <= 35
    assert rates[-1] == pytest.approx(0.5 / 25 / 1e4, rel=1e-3)


def test_AH_10_best_does_not_push_out_the_newest(tmp_path: Path) -> None:
    """keep_last=1, each epoch better: the newest is there, and best names it."""

    class Improving(Example):
        scores = (1.0, 2.0, 3.0)

    make(tmp_path, Improving, metric_monitor=MetricMonitor("score", "max")).train()
    assert steps_kept(tmp_path) == [30]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000030"
    assert (tmp_path / "checkpoints" / "best").read_text().strip() == "step_00000030"


def test_AH_10_the_best_outlives_newer_ones(tmp_path: Path) -> None:
    class Peaking(Example):
        scores = (1.0, 3.0, 2.0)

    result = make(tmp_path, Peaking, metric_monitor=MetricMonitor("score", "max")).train()
    assert steps_kept(tmp_path) == [20, 30]
    assert (tmp_path / "checkpoints" / "best").read_text().strip() == "step_00000020"
    assert result.best == 3.0


def test_AH_10_what_is_saved_as_the_best_alone_pushes_out_no_other(tmp_path: Path) -> None:
    """Better at each of the validations at 3, 6, ... 30, saved every 8: three of these, the end,
    and the best."""

    class Improving(Example):
        def get_val_metrics(self) -> dict[str, float]:
            return {"score": float(self.global_step if self.global_step < 30 else 0)}

    policy = CheckpointPolicy(every_epochs=None, every_steps=8, keep_last=3)
    monitor = MetricMonitor("score", "max")
    make(
        tmp_path, Improving, metric_monitor=monitor, validate_every=3, checkpoint=policy, epochs=3
    ).train()
    assert steps_kept(tmp_path) == [16, 24, 27, 30]


@pytest.mark.parametrize("broken_at", [None, 16])
def test_the_k_best_are_kept_beside_the_newest(tmp_path: Path, broken_at: int | None) -> None:
    """Validated at 4, 8, ... 28: the three lowest are at 8, 24 and 16, and 30 is the newest."""
    scores = {4: 9.0, 8: 1.0, 12: 8.0, 16: 3.0, 20: 7.0, 24: 2.0, 28: float("nan"), 30: 6.0}

    class Scored(Example):
        def get_val_metrics(self) -> dict[str, float]:
            return {"score": scores[self.global_step]}

    def run(*callbacks: Any) -> None:
        make(
            tmp_path,
            Scored,
            metric_monitor=MetricMonitor("score", "min"),
            validate_every=4,
            checkpoint=CheckpointPolicy(every_epochs=None, keep_best=3),
            callbacks=callbacks,
        ).train()

    if broken_at is not None:
        run(StopAt(broken_at))
    run()
    assert steps_kept(tmp_path) == [8, 16, 24, 30]
    assert (tmp_path / "checkpoints" / "best").read_text().strip() == "step_00000008"


def test_AH_11_the_newest_by_progress_are_kept(tmp_path: Path) -> None:
    """Two of all triggers together, newest by training progress, beside best and permanent ones."""

    class Peaking(Example):
        scores = (3.0, 2.0, 1.0)

    make(
        tmp_path,
        Peaking,
        metric_monitor=MetricMonitor("score", "max"),
        checkpoint=CheckpointPolicy(every_steps=4, keep_last=2, keep_every_steps=8),
    ).train()
    assert steps_kept(tmp_path) == [8, 10, 16, 24, 28, 30]


class Noting(Example):
    """Writes down the samples of each step; killed after step 14, unless it resumes."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with open("seen.jsonl", "a") as file:
            print(json.dumps([self.global_step + 1, *batch[2].tolist()]), file=file)
        return super().training_step(batch, batch_idx)

    def on_step_end(self, metrics: dict[str, Any]) -> None:
        if self.global_step == 14 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def noted(folder: Path) -> Any:
    os.chdir(folder)
    policy = CheckpointPolicy(every_steps=4, asynchronous=False)
    trainer = make(folder / "run", Noting, checkpoint=policy)
    trainer.train(seed=3)
    return bits(trainer.model.state_dict())


def test_AH_14_resume_in_mid_epoch(
    ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second epoch, two steps behind its last checkpoint, that of step 12: the
    resumed run sees exactly the samples that the epoch lacked there, each once, and ends with the
    uninterrupted run's weights."""
    monkeypatch.chdir(tmp_path)
    unbroken = make()
    unbroken.train(seed=3)
    assert ranks.outcomes(noted, 1, tmp_path)[0].code == -signal.SIGKILL
    assert steps_kept(tmp_path / "run") == [12]
    read = (tmp_path / "seen.jsonl").read_text
    before = [json.loads(line) for line in read().splitlines()]
    weights = noted(tmp_path)
    after = [json.loads(line) for line in read().splitlines()][len(before) :]
    assert [step for step, *_ in after] == list(range(13, 31))
    steps = [*before[:12], *after]
    assert sorted(i for step, *ids in steps if 10 < step <= 20 for i in ids) == list(range(97))
    assert weights == bits(unbroken.model.state_dict())


@pytest.mark.parametrize("place", ["kept", "copied", "copied to a new folder"])
def test_AH_17_a_run_resumes_from_a_kept_and_from_a_copied_checkpoint(
    tmp_path: Path, place: str
) -> None:
    """Whatever the folder, it ends with the bits of the run that it left at step 10."""
    policy = CheckpointPolicy(every_steps=5, keep_every_steps=10)
    whole = make(tmp_path / "run", checkpoint=policy)
    whole.train(seed=3)
    chosen = tmp_path / "run/checkpoints/step_00000010"
    if place != "kept":
        chosen = Path(shutil.copytree(chosen, tmp_path / "apart/mine"))
    folder = tmp_path / ("new" if place.endswith("folder") else "run")
    expected = [row for row in rows(tmp_path / "run") if folder.name == "run" or row["step"] > 10]
    again = make(folder, checkpoint=policy, resume=str(chosen))
    result = again.train(seed=3)
    assert bits(again.model.state_dict()) == bits(whole.model.state_dict())
    assert rows(folder) == expected
    assert steps_kept(folder) == ([10, 20, 30] if folder.name == "run" else [20, 30])
    assert result.checkpoint == folder / "checkpoints/step_00000030"


def on_two_ranks(folder: Path) -> None:
    line_on_its_way(folder / "run").train(seed=3)


def line_on_its_way(folder: Path | None, **changes: Any) -> Trainer:
    """Ten steps an epoch, of four samples of all ranks."""
    policy = CheckpointPolicy(every_epochs=None, every_steps=6, keep_last=None)
    given = {"train_dataloader": batches(40, 2, shuffle=True), "global_batch_size": 4}
    return Trainer(**settings(run_dir=folder, checkpoint=policy, **given, **changes))


def test_AH_17_a_copied_checkpoint_resumes_on_another_number_of_ranks(
    ranks: Any, tmp_path: Path
) -> None:
    """That of two ranks, on one: as if all had run there, but for the rounding; the steps' size,
    where it follows from the ranks, has to be said."""
    ranks(on_two_ranks, 2, tmp_path)
    copy = shutil.copytree(tmp_path / "run/checkpoints/step_00000006", tmp_path / "apart/mine")
    again, whole = line_on_its_way(tmp_path / "new", resume=str(copy)), line_on_its_way(None)
    for trainer in (again, whole):
        assert trainer.train(seed=3).global_step == 20
    assert again.local_batches < whole.local_batches
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict())
    smaller = line_on_its_way(tmp_path / "other", resume=str(copy))
    smaller.global_batch_size = None
    with pytest.raises(ResumeError, match=r"data.global_batch_size: 4 then, 2 now"):
        smaller.train(seed=3)


def test_a_copied_checkpoint_never_takes_the_place_of_another_run(tmp_path: Path) -> None:
    make(tmp_path / "one").train(seed=3)
    make(tmp_path / "two").train(seed=4)
    copy = shutil.copytree(tmp_path / "one/checkpoints/step_00000030", tmp_path / "apart/mine")
    with pytest.raises(ConfigError, match=r"no checkpoint of this run; .*give a run_dir"):
        make(tmp_path / "two", resume=str(copy)).train(seed=3)
    with pytest.raises(ConfigError, match=r"no checkpoint of this run \("):
        make(tmp_path / "three", resume=str(tmp_path)).train(seed=3)
    assert steps_kept(tmp_path / "two") == [30]


def test_AH_18_an_override_at_resume_wins_or_is_named(tmp_path: Path) -> None:
    """More epochs are trained; another batch size is refused by its key; nothing runs 0 steps."""
    make(tmp_path, epochs=1).train()
    longer = make(tmp_path, epochs=2)
    longer.train()
    assert longer.global_step == 20
    with pytest.raises(ResumeError, match=r"data.global_batch_size: 10 then, 20 now"):
        make(tmp_path, epochs=3, train_dataloader=loader(Noisy(), batch_size=20)).train()


def test_AH_19_a_renamed_module_is_refused(tmp_path: Path) -> None:
    make(tmp_path, epochs=1).train()
    renamed = nn.Sequential()
    renamed.add_module("body", make_model())
    with pytest.raises(MismatchError) as error:
        make(tmp_path, model=renamed).train()
    assert "body.0.weight" in str(error.value)
    assert "0.weight" in str(error.value)


class Frozen(nn.Module):
    """A frozen body and a trainable head; saves only what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if not name.startswith("body.")}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state, strict=False, assign=assign)


def test_AH_20_only_what_is_trained_is_saved(tmp_path: Path) -> None:
    model = Frozen()
    trainer = Example(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01),
        train_dataloader=loader(Noisy()),
        epochs=1,
        progress=False,
        run_dir=tmp_path,
    )
    result = trainer.train()
    stored = load_tree(result.checkpoint)["models"]["model"]
    assert {name.split(".")[0] for name in stored} == {"norm", "head"}
    assert bits(stored) == bits(model.state_dict())


def test_AH_21_ranks_with_different_metrics_stop_together(ranks: Any) -> None:
    assert ranks(stop_early, 2) == [(2, "early stop")] * 2


def stop_early() -> tuple[int, str]:
    """A run whose ranks see opposite metrics; their mean never improves."""

    class Disagreeing(Example):
        def get_val_metrics(self) -> dict[str, float]:
            return {"score": self.current_epoch * (1.0 if self.world.rank else -1.0)}

    even = loader(Noisy(20), shuffle=False)
    monitor = MetricMonitor("score", "max")
    trainer = make(
        kind=Disagreeing, metric_monitor=monitor, early_stop=1, epochs=9, val_dataloader=even
    )
    result = trainer.train()
    return result.epoch, result.stopped_by


def test_AH_22_gradient_norm_at_every_row(tmp_path: Path) -> None:
    """Accumulation 4, a row every 5 steps: each has the mean of the steps' unclipped norms."""
    norms: list[float] = []

    class Norms(Example):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            gradients = [p.grad.norm() for p in self.model.parameters()]
            norms.append(float(torch.stack(gradients).norm()))

    make(
        tmp_path, Norms, gradient_accumulation_steps=4, log_every=5, max_grad_norm=1e-3, epochs=10
    ).train()
    logged = [row["grad_norm"] for row in rows(tmp_path) if "grad_norm" in row]
    means = [sum(norms[i : i + 5]) / 5 for i in range(0, 30, 5)]
    assert logged == pytest.approx(means, rel=1e-5)


def test_AH_23_a_metric_that_never_comes_is_said_at_once() -> None:
    trainer = make(metric_monitor=MetricMonitor("scroe", "max"))
    with pytest.raises(MetricError, match="did you mean 'score'"):
        trainer.train()
    assert trainer.current_epoch == 0


class Tally:
    """A stateful object of the user's own."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_AH_25_checkpoint_objects_come_back_by_name(tmp_path: Path) -> None:
    class WithObjects(Example):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.fast, self.slow = Tally(), Tally()

        @property
        def checkpoint_objects(self) -> dict[str, Any]:
            return {"fast": self.fast, "slow": self.slow}

        def on_step_end(self, metrics: dict[str, Any]) -> None:
            self.fast.count += 1
            self.slow.count += self.global_step % 10 == 0

    make(tmp_path, WithObjects, callbacks=[StopAt(15)]).train()
    resumed = make(tmp_path, WithObjects)
    resumed.train()
    assert (resumed.fast.count, resumed.slow.count) == (30, 3)


def test_AH_26_permanent_checkpoints_survive(tmp_path: Path) -> None:
    make(
        tmp_path,
        checkpoint=CheckpointPolicy(
            every_epochs=None, every_steps=5, keep_every_steps=10, keep_last=1
        ),
    ).train()
    assert steps_kept(tmp_path) == [10, 20, 30]


def test_AH_27_hooks_need_no_super() -> None:
    class Overriding(Example):
        def on_train_start(self) -> None:
            self.began = True

        def on_train_end(self) -> None:
            self.ended = True

    trainer = make(kind=Overriding, epochs=1)
    trainer.train()
    assert trainer.began
    assert trainer.ended
    assert trainer.global_step == 10


# What AccelHydra got wrong


def test_accumulation_goes_on_after_a_validation() -> None:
    """epoch_length 20, accumulation 4: five updates in every epoch, and the scheduler with them."""
    trainer = make(
        gradient_accumulation_steps=4,
        epoch_length=20,
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
    )
    trainer.train()
    assert trainer.global_step == 15
    assert trainer.lr_scheduler.last_epoch == 15


def test_the_monitor_is_saved_with_the_epoch_it_has_seen(tmp_path: Path) -> None:
    class Worsening(Example):
        scores = (3.0, 2.0, 1.0)

    result = make(tmp_path, Worsening, metric_monitor=MetricMonitor("score", "max")).train()
    assert load_tree(result.checkpoint)["monitor"] == {"best_value": 3.0, "worse_count": 2}


def test_the_order_of_checkpoints_is_numeric(tmp_path: Path) -> None:
    """Step 100 is newer than step 90, whatever their names would sort to."""
    make(tmp_path, epochs=10, checkpoint=CheckpointPolicy(keep_last=2)).train()
    assert steps_kept(tmp_path) == [90, 100]
    assert make(tmp_path, epochs=10).train().checkpoint.name == "step_00000100"


def test_early_stop_without_a_monitor_or_validation_is_refused() -> None:
    with pytest.raises(ConfigError, match="early_stop"):
        make(early_stop=2, val_dataloader=None).train()


def test_an_error_in_validation_leaves_gradients_and_modes_as_they_were() -> None:
    class Failing(Example):
        def on_validation_end(self) -> None:
            raise RuntimeError("broken")

    trainer = make(kind=Failing)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert torch.is_grad_enabled()
    assert trainer.model.training


def test_buffers_of_the_loss_function_are_saved_and_learnt_losses_learn(tmp_path: Path) -> None:
    """A loss with a weight of its own is placed, trained and saved like any module."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return ((outputs - targets) ** 2).mean() / self.scale**2 + self.scale.log()

    model, loss = nn.Linear(3, 1), Scaled()
    x = torch.randn(32, 3)
    trainer = Trainer(
        model=model,
        loss_fn=loss,
        optimizer=torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1),
        train_dataloader=DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8),
        epochs=1,
        progress=False,
        run_dir=tmp_path,
    )
    stored = load_tree(trainer.train().checkpoint)["models"]
    assert stored["loss_fn"]["scale"].item() == loss.scale.item() != 2.0


def test_a_schedule_can_follow_the_metric() -> None:
    """ReduceLROnPlateau works; AccelHydra's wrapper raised a TypeError."""
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    trainer = make(
        kind=Trainer,
        scheduler=lambda optimizer: plateau(optimizer, patience=0),
        lr_scheduler_interval="metric",
        loss_fn=nn.MSELoss(),
        train_dataloader=DataLoader(TensorDataset(torch.randn(8, 8), torch.randn(8, 1)), 4),
        val_dataloader=DataLoader(TensorDataset(torch.randn(8, 8), torch.randn(8, 1)), 4),
        epochs=6,
    )
    trainer.train()
    assert trainer.lr_scheduler.last_epoch == 6


def test_what_ran_is_written_down_without_being_asked(tmp_path: Path) -> None:
    make(tmp_path, epochs=1, resume=Resume("auto")).train()
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "complete"


@dataclass(kw_only=True)
class Weighted(Example):
    """A trainer in the way of AccelHydra: a dataclass, with a field and another default."""

    weight: float = 1.0
    epochs: int = 2  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        self.half = self.weight / 2

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight * super().training_step(batch, batch_idx)


def test_a_trainer_may_be_a_dataclass(tmp_path: Path) -> None:
    """It takes the Trainer's settings beside its own, and trains as it would without."""
    model, plain = make_model(), make_model()
    kept: dict[str, Any] = {"train_dataloader": loader(Noisy()), "progress": False}
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, plain))
    trainer: Any = Weighted(model=model, optimizer=optimizer, weight=3.0, **kept)
    assert (trainer.weight, trainer.half, trainer.epochs) == (3.0, 1.5, 2)
    assert trainer.train(seed=1).global_step == 20

    class Tripled(Example):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return 3.0 * super().training_step(batch, batch_idx)

    Tripled(model=plain, optimizer=other, epochs=2, **kept).train(seed=1)
    assert bits(model.state_dict()) == bits(plain.state_dict())
    longer: Any = Weighted(model=model, optimizer=optimizer, epochs=3, run_dir=tmp_path, **kept)
    assert (longer.epochs, longer.train(seed=1).epoch) == (3, 3)
    assert len({trainer, longer}) == 2
    assert len(repr(trainer)) < 200
    with pytest.raises(TypeError, match="wieght"):
        Weighted(wieght=1.0)  # pyright: ignore[reportCallIssue]

"""Validation: when it comes, what it measures, what follows from it, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline import Callback, CheckpointPolicy, MetricMonitor, Trainer, ValidationPolicy
from paceline.callbacks import EarlyStopping
from paceline.checkpoint import load_tree
from paceline.errors import ConfigError, DataError, MetricError
from paceline.testing import rows
from small import batches, checkpoints, fitted, line, points, same, settings, weights


class Scripted(Trainer):
    """The n-th validation measures the n-th of given numbers."""

    numbers: list[float]

    def on_validation_start(self) -> None:
        self.number = self.numbers[self.validations]
        self.validations += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/score", self.number)


def scripted(*numbers: float, **changes: Any) -> Scripted:
    """A trainer that validates once an epoch of 5 steps to `numbers`, after its run."""
    given = {"metric_monitor": MetricMonitor("val/score", mode="max"), **changes}
    trainer = Scripted(
        **settings(**{"val_dataloader": batches(4), "epochs": len(numbers), **given})
    )
    trainer.numbers, trainer.validations = list(numbers), 0
    trainer.fit()
    return trainer


def validated_at(**changes: Any) -> list[int]:
    steps: list[int] = []
    trainer = Trainer(**settings(val_dataloader=batches(8), **changes))
    trainer.on_validation_start = lambda: steps.append(trainer.global_step)
    trainer.fit()
    return steps


def test_when_a_run_validates() -> None:
    assert validated_at() == [5, 10]
    assert validated_at(validate_every=2) == [2, 4, 6, 8, 10]
    assert validated_at(validate_every=4) == [4, 8, 10]  # and once more at the end
    assert validated_at(validate_every=100) == [10]
    assert validated_at(validate_every="1 epoch") == [5, 10]
    assert validated_at(validate_every="2 epochs") == [10]
    assert validated_at(validate_every="2 epochs", epochs=3) == [10, 15]  # ... and at the end
    assert validated_at(max_steps=7) == [5, 7]
    assert validated_at(validate_every=5, max_steps=5) == [5]
    assert validated_at(gradient_accumulation_steps=2, validate_every=2) == [2, 4, 6]


def test_metrics_are_means_over_all_items_whatever_the_batches() -> None:
    x, y = points(10).tensors
    for size in (1, 3, 4, 10):
        trainer = fitted(val_dataloader=batches(10, size))
        error = nn.functional.mse_loss(trainer.model(x), y).item()
        assert trainer.result.final_val_loss == pytest.approx(error, rel=1e-5)


def test_a_step_may_enter_autocast_within_itself() -> None:
    """Nothing of it is left behind."""

    class Nested(Trainer):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with self.autocast:
                assert self.model(batch[0]).dtype == torch.bfloat16
            assert self.model(batch[0]).dtype == torch.bfloat16

        def on_validation_end(self) -> None:
            assert self.model(torch.ones(1, 3)).dtype == torch.float32

    Nested(**settings(val_dataloader=batches(4), precision="bf16")).fit()
    assert not torch.is_autocast_enabled("cpu")


def test_logged_metrics_and_those_of_get_val_metrics_are_joined() -> None:
    class Both(Trainer):
        def on_validation_start(self) -> None:
            self.largest = 0.0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.largest = max(self.largest, batch[1].abs().max().item())

        def on_validation_end(self) -> None:
            self.ended = True

        def get_val_metrics(self) -> dict[str, Any]:
            assert self.ended
            return {"val/largest": torch.tensor(self.largest)}

    trainer = fitted(Both, val_dataloader=batches(8))
    assert list(trainer.result.metrics) == ["val/loss", "val/largest"]
    assert trainer.result.metrics["val/largest"] == points(8).tensors[1].abs().max().item()


@pytest.mark.parametrize(
    ("returned", "message"),
    [({"val/x": "high"}, "'high', which is no number"), ([("val/x", 1.0)], "returns a dictionary")],
)
def test_what_get_val_metrics_may_not_return(returned: Any, message: str) -> None:
    trainer = Trainer(**settings(val_dataloader=batches(8)))
    trainer.get_val_metrics = lambda: returned
    with pytest.raises(MetricError, match=message):
        trainer.fit()


class Normed(nn.Module):
    """A line with batch normalisation and dropout, to see which mode it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.line, self.drop = nn.BatchNorm1d(3), line(), nn.Dropout(0.3)
        self.frozen = nn.BatchNorm1d(3).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(self.drop(self.frozen(self.norm(x))))


def test_validation_changes_no_weight_no_buffer_and_no_mode() -> None:
    def run(**changes: Any) -> Trainer:
        torch.manual_seed(0)
        return fitted(model=Normed(), **changes)

    plain, validated = run(), run(val_dataloader=batches(8), validate_every=1)
    assert same(weights(plain), weights(validated))


class Taught(Trainer):
    """Notes the modes of a student, and of a teacher that must not move."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        parts = (part for model in self.model.values() for part in model.modules())
        self.modes = [part.training for part in parts]
        x, _ = batch
        return (self.model["student"](x) - self.model["teacher"](x)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not any(part.training for part in self.model["student"].modules())


def test_what_its_owner_put_into_eval_mode_stays_so() -> None:
    """Given a teacher, and a norm of the student, in eval mode, then only the rest trains."""
    student = nn.Sequential(line(), nn.BatchNorm1d(1), nn.Dropout(0.5))
    teacher = nn.Sequential(line(), nn.BatchNorm1d(1))
    student[1].eval()
    teacher.requires_grad_(False).eval()
    before = [value.clone() for value in [*student.buffers(), *teacher.buffers()]]
    trainer = fitted(
        Taught,
        model={"student": student, "teacher": teacher},
        optimizer=torch.optim.SGD(student.parameters(), lr=0.01),
        val_dataloader=batches(4),
    )
    assert trainer.modes == [True, True, False, True, False, False, False]
    assert all(map(torch.equal, before, [*student.buffers(), *teacher.buffers()]))
    assert any("eval mode" in str(x) and "student.1, teacher" in str(x) for x in trainer.plan)


def test_modes_and_gradients_in_a_validation() -> None:
    seen: list[Any] = []

    class Looks(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((self.model.training, self.model.frozen.training, torch.is_grad_enabled()))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append((self.model.training, self.model.frozen.training, torch.is_grad_enabled()))

    model = Normed()

    def freeze() -> None:
        model.frozen.eval()

    trainer = Looks(
        **settings(
            model=model,
            train_dataloader=batches(4),
            val_dataloader=batches(4),
        )
    )
    trainer.on_train_start = freeze
    trainer.fit()
    assert seen == [(True, False, True), (False, False, False)] * 2


def test_an_error_in_a_validation_leaves_gradients_on_and_models_in_training() -> None:
    trainer = Trainer(**settings(val_dataloader=batches(8)))
    trainer.validation_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert torch.is_grad_enabled()
    assert trainer.model.training


def test_a_validation_may_draw_random_numbers_without_disturbing_training() -> None:
    class Draws(Trainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return self.loss_fn(self.model(x + torch.randn_like(x)), y)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("val/loss", self.loss_fn(self.model(x + torch.randn_like(x)), y))

    plain = fitted(Draws)
    often = fitted(Draws, val_dataloader=batches(8), validate_every=1)
    seldom = fitted(Draws, val_dataloader=batches(8), validate_every=5)
    assert same(weights(plain), weights(often))
    assert often.result.metrics == seldom.result.metrics


# What follows from a validation


def test_early_stop_counts_validations_without_a_better_one() -> None:
    trainer = scripted(1, 3, 2, 2.5, 9, early_stop=2)
    assert (trainer.validations, trainer.result.stopped_by) == (4, "early stop")
    assert trainer.result.complete
    assert (trainer.result.best, trainer.result.epoch) == (3.0, 4)


def test_early_stop_counts_validations_not_epochs() -> None:
    trainer = scripted(3, 2, 1, epochs=1, validate_every=1, early_stop=2)
    assert (trainer.global_step, trainer.result.stopped_by) == (3, "early stop")


def test_a_run_that_keeps_getting_better_is_not_stopped() -> None:
    assert scripted(1, 2, 3, early_stop=1).result.stopped_by == "epochs"


def test_patience_survives_a_resume(tmp_path: Path) -> None:
    scripted(3, 2, early_stop=2, run_dir=tmp_path)
    resumed = scripted(1, epochs=9, early_stop=2, run_dir=tmp_path)
    assert (resumed.result.stopped_by, resumed.result.epoch) == ("early stop", 3)
    assert resumed.result.best == 3.0


def manifest(run_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((run_dir / "checkpoints" / name / "manifest.json").read_text())


def test_the_best_and_the_last_checkpoint_are_kept(tmp_path: Path) -> None:
    scripted(1, 3, 2, run_dir=tmp_path)
    assert checkpoints(tmp_path) == ["step_00000010", "step_00000015"]
    assert (tmp_path / "checkpoints" / "best").read_text().strip() == "step_00000010"
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000015"
    assert [manifest(tmp_path, name)["best"] for name in checkpoints(tmp_path)] == [True, False]


def test_saving_the_best_removes_no_rolling_checkpoint(tmp_path: Path) -> None:
    policy = CheckpointPolicy(keep_last=3)
    scripted(1, 2, 3, 4, run_dir=tmp_path, checkpoint=policy)
    assert checkpoints(tmp_path) == ["step_00000010", "step_00000015", "step_00000020"]


def test_the_best_is_saved_when_no_checkpoint_is_due(tmp_path: Path) -> None:
    policy = CheckpointPolicy(every_epochs=None)
    scripted(1, 3, 2, run_dir=tmp_path, checkpoint=policy)
    assert checkpoints(tmp_path) == ["step_00000010", "step_00000015"]
    policy = CheckpointPolicy(every_epochs=None, save_best=False)
    scripted(1, 3, 2, run_dir=tmp_path / "other", checkpoint=policy)
    assert checkpoints(tmp_path / "other") == ["step_00000015"]


def test_a_checkpoint_knows_the_validation_of_its_own_epoch(tmp_path: Path) -> None:
    scripted(1, 3, 2, run_dir=tmp_path, checkpoint=CheckpointPolicy(keep_last=None))
    seen = [load_tree(tmp_path / "checkpoints" / n)["monitor"] for n in checkpoints(tmp_path)]
    assert seen == [
        {"best_value": 1.0, "worse_count": 0},
        {"best_value": 3.0, "worse_count": 0},
        {"best_value": 3.0, "worse_count": 1},
    ]


def test_a_worse_model_never_replaces_the_best_after_a_resume(tmp_path: Path) -> None:
    scripted(5, run_dir=tmp_path)
    scripted(4, epochs=2, run_dir=tmp_path)
    assert (tmp_path / "checkpoints" / "best").read_text().strip() == "step_00000005"


def test_each_validation_is_a_row(tmp_path: Path) -> None:
    scripted(1, 3, run_dir=tmp_path)
    assert [(r["step"], r["val/score"]) for r in rows(tmp_path) if "val/score" in r] == [
        (5, 1),
        (10, 3),
    ]


def test_the_result_of_a_run(tmp_path: Path) -> None:
    result = scripted(1, 3, 2, run_dir=tmp_path).result
    assert result.complete
    assert (result.stopped_by, result.global_step, result.epoch) == ("epochs", 15, 3)
    assert (result.metrics, result.best, result.final_val_loss) == ({"val/score": 2.0}, 3.0, None)
    assert result.checkpoint == tmp_path / "checkpoints" / "step_00000015"
    bare = fitted().result
    assert (bare.metrics, bare.best, bare.final_val_loss, bare.checkpoint) == ({}, None, None, None)


def test_a_stopped_run_says_so_in_its_result(tmp_path: Path) -> None:
    class Enough(Callback):
        def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
            if trainer.global_step == 3:
                trainer.request_stop("enough")

    result = fitted(run_dir=tmp_path, callbacks=[Enough()]).result
    assert (result.complete, result.stopped_by, result.global_step) == (False, "enough", 3)
    assert result.checkpoint.name == "step_00000003"


def test_a_second_run_of_one_trainer_begins_without_the_firsts_best() -> None:
    trainer = scripted(5, 6)
    trainer.numbers, trainer.validations = [1, 2], 0
    assert trainer.train().best == 2.0


def test_no_monitor_no_best(tmp_path: Path) -> None:
    trainer = scripted(1, 2, metric_monitor=None, run_dir=tmp_path)
    assert trainer.result.best is None
    assert not (tmp_path / "checkpoints" / "best").exists()


def test_a_monitored_metric_that_never_appears_is_named_after_the_first_validation(
    tmp_path: Path,
) -> None:
    monitor = MetricMonitor("val/scor", mode="max")
    with pytest.raises(
        MetricError, match=r"'val/scor'.*did you mean 'val/score'.*There is: val/score"
    ):
        scripted(1, 2, metric_monitor=monitor, run_dir=tmp_path, validate_every=2)
    assert rows(tmp_path)[-1]["val/score"] == 1  # what was measured is not lost


class Rarely(Trainer):
    """Measures its score in every other validation: 1, 0.5 and worse ones."""

    scores = iter(())

    def on_train_start(self) -> None:
        self.scores = iter([1.0, 0.5, 0.6, 0.7])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 0.0)
        if self.current_epoch % 2 == 0:
            self.log("val/score", next(self.scores))


@pytest.mark.parametrize("own", [True, False])
def test_a_validation_without_the_metric_counts_for_nothing(own: bool) -> None:
    """Given a metric of every other validation, then patience is a number of those that have it."""
    monitor = {"metric_monitor": MetricMonitor("val/score"), "early_stop": 2}
    callback = {"callbacks": [EarlyStopping("val/score", patience=2)]}
    changes: dict[str, Any] = monitor if own else callback
    trainer = fitted(Rarely, val_dataloader=batches(20, 20), epochs=9, **changes)
    assert (trainer.current_epoch, trainer.result.stopped_by) == (7, "early stop")
    assert trainer.result.best == (0.5 if own else None)


def test_a_validation_without_data_is_an_error() -> None:
    with pytest.raises(DataError, match="val"):
        fitted(val_dataloader=[])
    with pytest.raises(DataError, match="val_dataloader"):
        fitted(val_dataloader=batches(0))


def test_a_validation_that_measures_nothing_says_so_once(capsys: Any) -> None:
    class Returns(Trainer):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

    assert fitted(Returns, val_dataloader=batches(8)).result.metrics == {}
    assert capsys.readouterr().err.count("the validation measured nothing") == 1


def test_a_validation_may_be_limited_to_the_first_batches(capsys: Any) -> None:
    """Given 20 samples in batches of 4, when 2 batches are read of them, then the loss is that of
    the first 8 samples, and the plan says what is left out."""
    policy = ValidationPolicy(every=4, max_batches=2)
    trainer = fitted(val_dataloader=batches(20), validate_every=policy, progress=True)
    x, y = points(20).tensors
    expected = nn.functional.mse_loss(trainer.model(x[:8]), y[:8]).item()
    assert trainer.result.final_val_loss == pytest.approx(expected)
    said = capsys.readouterr().out
    assert "validates on 2 of 5 batches a rank: 3 left out" in said
    assert "validates every" not in said, "the user has said so"
    assert any(line.decision == "validates every 4" for line in trainer.plan)


def limited() -> float | None:
    policy = ValidationPolicy(max_batches=1)
    return fitted(val_dataloader=batches(20), validate_every=policy, lr=0.0).result.final_val_loss


def test_a_limit_counts_the_batches_of_each_rank(ranks: Any) -> None:
    """One batch of four on each of two ranks: the first eight samples."""
    x, y = points(20).tensors
    with torch.no_grad():
        expected = nn.functional.mse_loss(line()(x[:8]), y[:8]).item()
    assert ranks(limited, 2) == [pytest.approx(expected)] * 2


def test_a_limit_of_no_batches_is_no_validation() -> None:
    none = ValidationPolicy(max_batches=0)
    trainer = fitted(val_dataloader=batches(20), validate_every=none)
    assert (trainer.result.metrics, trainer.has_validation) == ({}, False)
    monitor = {"metric_monitor": MetricMonitor()}
    with pytest.raises(ConfigError, match="metric_monitor: nothing is ever validated"):
        fitted(val_dataloader=batches(20), validate_every=none, early_stop=1, **monitor)
    with pytest.raises(ConfigError, match=r"max_batches=-1\): expected a number of batches"):
        ValidationPolicy(max_batches=-1)
    with pytest.raises(ConfigError, match=r"validate_every='step': expected 'epoch' or a number"):
        fitted(validate_every=ValidationPolicy("step"))  # pyright: ignore[reportArgumentType]

"""EarlyStopping ends training by a metric of its own, on every rank alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paceline import MetricMonitor, Trainer
from paceline.callbacks import EarlyStopping
from paceline.errors import ConfigError, MetricError
from paceline.testing import Ranks
from small import batches, fitted, settings


class Scripted(Trainer):
    """Its validations come to `script`, one an epoch; "val/loss" always gets better."""

    script: tuple[float, ...]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", -self.current_epoch)
        self.log("score", self.script[self.current_epoch])


def run(*script: float, stopping: EarlyStopping | None = None, **changes: Any) -> Any:
    kind = type("Fixed", (Scripted,), {"script": script})
    callbacks = [EarlyStopping("score", "max", patience=2)] if stopping is None else [stopping]
    more = {"val_dataloader": batches(4), "epochs": len(script), "callbacks": callbacks}
    return fitted(kind, **{**more, **changes}).result


def test_training_is_over_after_so_many_validations_without_a_better_one(tmp_path: Path) -> None:
    result = run(1, 3, 2, 2.5, 9, run_dir=tmp_path)
    assert (result.stopped_by, result.complete, result.epoch) == ("early stop", True, 4)
    assert result.checkpoint.name == "step_00000020"


def test_what_gets_better_goes_on() -> None:
    assert run(1, 2, 3, 4).stopped_by == "epochs"


def test_the_margin_may_be_relative() -> None:
    """The best gets better by a tenth each time: too little for 0.2, absolutely or relatively."""
    slow = (-10.0, -9.0, -8.1, -7.3)
    assert run(*slow, stopping=EarlyStopping("score", "max", 2, 0.05, True)).epoch == 4
    assert run(*slow, stopping=EarlyStopping("score", "max", 2, 0.2, True)).epoch == 3
    assert run(*slow, stopping=EarlyStopping("score", "max", 2, 0.2)).epoch == 4


def test_its_metric_need_not_be_the_one_that_is_best(tmp_path: Path) -> None:
    """The trainer's own monitor keeps its metric and its count."""
    result = run(3, 2, 1, 1, 1, metric_monitor=MetricMonitor("val/loss"), early_stop=3)
    assert (result.stopped_by, result.epoch, result.best) == ("early stop", 3, -2.0)


def test_its_own_patience_and_the_trainers_do_not_fight() -> None:
    """Whichever runs out first ends the run."""
    monitor = {"metric_monitor": MetricMonitor("score", "max")}
    assert run(3, 2, 1, 1, 1, **monitor, early_stop=1).epoch == 2
    assert run(3, 2, 1, 1, 1, **monitor, early_stop=4).epoch == 3


def test_it_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    run(3, 2, 1)
    assert "score has not improved in 2 validations; the best was 3.0" in capsys.readouterr().err


def test_a_run_that_ran_out_of_patience_goes_on_with_more(tmp_path: Path) -> None:
    def again(patience: int) -> Any:
        stopping = EarlyStopping("score", "max", patience)
        return run(*[0.0] * 9, stopping=stopping, run_dir=tmp_path)

    assert (again(2).epoch, again(2).epoch) == (3, 3)
    assert (again(4).epoch, again(4).stopped_by) == (5, "early stop")
    assert (again(9).epoch, again(9).stopped_by) == (9, "epochs")


def test_a_metric_that_never_appears_is_told_of_after_the_first_validation() -> None:
    with pytest.raises(MetricError, match=r"'scores' .* mean 'score'\? There is: score, val/loss"):
        run(1, 2, 3, stopping=EarlyStopping("scores"))


def test_without_validation_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is ever validated"):
        run(1, 2, val_dataloader=None)


def test_patience_mode_and_delta_may_come_in_this_order() -> None:
    """As in pytorch_template: two epochs improve the loss by 0.6, which is less than 0.7."""

    def ends(stopping: EarlyStopping) -> int:
        class Told(Trainer):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("val/loss", -0.3 * self.current_epoch)

        made = settings(val_dataloader=batches(8), callbacks=[stopping], epochs=9)
        return Told(**made).train(seed=1).epoch

    assert ends(EarlyStopping(2, "min", 0.7)) == 3
    assert ends(EarlyStopping(2, "min")) == 9
    assert ends(EarlyStopping(2, "max")) == 3


@pytest.mark.parametrize(
    "wrong", [{"patience": 0}, {"mode": "lower"}, {"min_delta": -1.0}, {"min_delta": float("nan")}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EarlyStopping(**wrong)


class Disagreeing(Trainer):
    """One rank's score rises and the other's falls: their mean stands still."""

    def get_val_metrics(self) -> dict[str, float]:
        return {"score": self.current_epoch * (1.0 if self.world.rank else -1.0)}


def stop_early(folder: Path) -> Any:
    stopping = EarlyStopping("score", "max", patience=2)
    made = settings(val_dataloader=batches(8), callbacks=[stopping], epochs=9, run_dir=folder)
    result = Disagreeing(**made).train(seed=1)
    return result.epoch, result.stopped_by, stopping.state_dict()


def test_ranks_that_measure_differently_stop_together(ranks: Ranks, tmp_path: Path) -> None:
    ended = (3, "early stop", {"best_value": 0.0, "worse_count": 2})
    assert ranks(stop_early, 2, tmp_path) == [ended] * 2

"""An `evaluate()` of the user's own: called without a loader, and all that follows a validation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from builders import Noisy, Regression, loader
from paceline import Callback, CheckpointPolicy, MetricMonitor, Trainer
from paceline.callbacks import AveragedWeights, EarlyStopping
from paceline.errors import ConfigError, MetricError
from paceline.testing import Ranks, Trace, bits, rows
from small import checkpoints, fitted, same, settings, weights


class Simulated(Regression):
    """Is judged by a simulation that draws its own inputs, here and there for good."""

    leave_at: int | None = None  # the step whose evaluation the run is to stop in

    def evaluate(self) -> dict[str, Any] | None:
        if self.global_step == self.leave_at:
            self.request_stop("test")
            while not self.stopping():  # all ranks have to hear of it
                time.sleep(0.01)
            return None
        assert not torch.is_grad_enabled()
        inputs = torch.randn(32, 8)
        outputs = self.model(inputs)
        self.log("val/spread", outputs.std())
        return {"val/return": -(outputs - inputs.sum(1, keepdim=True)).square().mean()}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1)
        )


def simulated(
    run_dir: Path | None, *, leave_at: int | None = None, kind: Any = Simulated, **changes: Any
) -> Simulated:
    """A trainer without any validation loader, before its run of 15 steps."""
    model = network()
    trainer = kind(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        train_dataloader=loader(Noisy(60), 6),
        progress=False,
        run_dir=run_dir,
        **{
            "max_steps": 15,
            "validate_every": 2,
            "metric_monitor": MetricMonitor("val/return", mode="max"),
            "log_every": 1,
            **changes,
        },
    )
    trainer.leave_at = leave_at
    return trainer


def come_to(trainer: Simulated) -> dict[str, Any]:
    """All that the run came to, to be compared bit by bit."""
    result = trainer.train(seed=5)
    assert result.complete
    return bits(
        {
            "weights": weights(trainer),
            "optimizer": trainer.optimizer.state_dict(),
            "metrics": result.metrics,
            "best": result.best,
            "seen": trainer.seen,
        }
    )


def whole_and_stopped(folder: Path, step: int) -> list[dict[str, Any]]:
    """One run; and another, left in the evaluation after `step` and started again."""
    whole = come_to(simulated(folder / "whole"))
    stopped = simulated(folder / "parts", leave_at=step)
    assert stopped.train(seed=5).stopped_by == "test"
    assert stopped.progress.pending == ["validation"]
    assert stopped.global_step == step
    resumed = simulated(folder / "parts")
    after = come_to(resumed)
    after["seen"] = bits({**stopped.seen, **resumed.seen})
    return [whole, after]


def test_a_run_that_is_stopped_in_it_evaluates_at_its_resume_and_ends_the_same(
    tmp_path: Path,
) -> None:
    whole, parts = whole_and_stopped(tmp_path, 6)
    assert parts == whole
    one, other = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    assert other == one
    assert [row["step"] for row in one if "val/return" in row] == [2, 4, 6, 8, 10, 12, 14, 15]


def test_so_it_does_on_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    for whole, parts in ranks(whole_and_stopped, 2, tmp_path, 6):
        assert parts == whole
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


class Ranked(Trainer):
    """Measures its rank."""

    def evaluate(self) -> dict[str, float] | None:
        self.log("val/mean", float(self.world.rank))
        return {"val/rank": 7.0} if self.world.rank == 0 else None


def of_rank_0() -> dict[str, float]:
    return fitted(Ranked, metric_monitor=MetricMonitor("val/rank")).result.metrics


def test_what_rank_0_returns_counts_and_what_all_log_is_averaged(ranks: Ranks) -> None:
    assert ranks(of_rank_0, 2) == [{"val/mean": 0.5, "val/rank": 7.0}] * 2


def test_weights_and_rows_of_training_are_those_without_it(tmp_path: Path) -> None:
    judged = simulated(tmp_path / "judged")
    plain = simulated(tmp_path / "plain", kind=Regression, metric_monitor=None)
    judged.train(seed=5)
    plain.train(seed=5)
    assert same(weights(judged), weights(plain))
    assert judged.seen == plain.seen
    trained = [row for row in rows(tmp_path / "judged") if "val/return" not in row]
    assert trained == rows(tmp_path / "plain")


class Scripted(Trainer):
    """The n-th evaluation measures the n-th of given numbers."""

    numbers: tuple[float, ...]
    calls = 0

    def evaluate(self) -> dict[str, Any] | None:
        self.calls += 1
        return {"score": self.numbers[self.calls - 1]}


def scripted(*numbers: float, **changes: Any) -> Scripted:
    """A trainer that evaluates once an epoch of 5 steps to `numbers`, after its run."""
    given = {"metric_monitor": MetricMonitor("score", mode="max"), "epochs": len(numbers)}
    trainer = Scripted(**settings(**{**given, **changes}))
    trainer.numbers = numbers
    trainer.fit()
    return trainer


def test_it_stops_early_and_saves_the_best(tmp_path: Path) -> None:
    policy = CheckpointPolicy(every_epochs=None)
    trainer = scripted(1, 3, 2, 2.5, 9, early_stop=2, run_dir=tmp_path, checkpoint=policy)
    result = trainer.result
    assert (trainer.calls, result.stopped_by, result.best) == (4, "early stop", 3.0)
    assert (result.metrics, result.final_val_loss) == ({"score": 2.5}, None)
    assert checkpoints(tmp_path) == ["step_00000010", "step_00000020"]
    assert (tmp_path / "checkpoints" / "best").read_text().strip() == "step_00000010"
    stopping = EarlyStopping(monitor="score", mode="max", patience=2)
    assert scripted(1, 3, 2, 2.5, 9, callbacks=[stopping]).calls == 4


def test_a_schedule_follows_what_it_measures() -> None:
    given = settings()
    optimizer = given["optimizer"]
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.1, patience=0)
    scripted(
        3, 4, 2, 1,
        model=given["model"], optimizer=optimizer, lr_scheduler=schedule,
        lr_scheduler_interval="metric",
    )  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.01)


def test_validation_hooks_come_around_it_once() -> None:
    """So that averaged weights are the ones it judges."""
    recorder = Trace()
    averaged = AveragedWeights()
    judged: list[torch.Tensor] = []

    class Looks(Trainer):
        def evaluate(self) -> dict[str, Any] | None:
            judged.append(self.model.weight.clone())
            return {"val/x": 1.0}

    trainer = Looks(**settings(epochs=1, callbacks=[recorder, averaged]))
    trainer.fit()
    around = [event for event, _ in recorder.events if "validation" in event or "metric" in event]
    assert around == ["on_validation_start", "on_validation_end", "on_metrics"]
    assert not torch.equal(judged[0], trainer.model.weight)


def test_it_may_call_the_trainers_own_and_add_to_it() -> None:
    class More(Trainer):
        def evaluate(self) -> dict[str, Any] | None:
            self.log("val/before", 2.0)
            metrics = super().evaluate()
            if metrics is None:
                return None
            self.log("val/after", 3.0)
            return {**metrics, "val/double": 2 * metrics["val/loss"]}

    trainer = fitted(More, val_dataloader=loader(settings()["train_dataloader"].dataset))
    loss = trainer.result.final_val_loss
    assert trainer.result.metrics == {
        "val/before": 2.0,
        "val/after": 3.0,
        "val/loss": loss,
        "val/double": 2 * loss,
    }


@pytest.mark.parametrize(
    ("returned", "error"),
    [(3.0, "evaluate\\(\\) returned 3.0; it returns a dictionary"), ({"x": "y"}, "'x'.*no number")],
)
def test_what_it_may_not_return(returned: Any, error: str) -> None:
    trainer = Trainer(**settings())
    trainer.evaluate = lambda: returned
    with pytest.raises(MetricError, match=error):
        trainer.fit()


def test_without_it_and_without_a_loader_a_monitor_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"metric_monitor.*evaluate\(\)"):
        fitted(metric_monitor=MetricMonitor("score"))


def test_nobody_stops_it_but_a_stop() -> None:
    asked: list[bool] = []

    class Asks(Callback):
        def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
            asked.append(trainer.stopping())

        def on_metrics(self, trainer: Any, metrics: dict[str, float]) -> None:
            asked.append(trainer.stopping())

    scripted(1, callbacks=[Asks()])
    assert asked == [False] * 6
    assert not Trainer(**settings()).stopping()

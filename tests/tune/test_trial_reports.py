"""What a trial's run reports to its study, and what it takes from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline import CheckpointPolicy, Trainer
from paceline.callbacks import TimeLimit
from paceline.errors import ConfigError, MetricError
from paceline.log.run_record import read_run
from paceline.testing import bits, rows
from paceline.tune.reporting import TrialReports

X = torch.linspace(-1, 1, 24).view(-1, 1)


class Fit(Trainer):
    """Validates with a value that depends on the step alone."""

    def evaluate(self) -> dict[str, float]:
        return {"val/loss": value_at(self.global_step)}


def value_at(step: int) -> float:
    return 1.0 / (1 + step)


def fit(reports: TrialReports, folder: Path | None = None, **settings: Any) -> Fit:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    data = torch.utils.data.TensorDataset(X, X)
    return Fit(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        loss_fn=torch.nn.MSELoss(),
        train_dataloader=torch.utils.data.DataLoader(data, 4, shuffle=True),
        run_dir=folder,
        progress=False,
        callbacks=[reports],
        checkpoint=None if folder is None else CheckpointPolicy(every_steps=1, asynchronous=False),
        **{"epochs": 2, "validate_every": 3, **settings},
    )


def by_hand(validated: list[int], horizon: int, count: int) -> list[tuple[int, float]]:
    """Report i is the last validation at or before share i of the horizon."""
    found = []
    for i in range(1, count + 1):
        before = [step for step in validated if step * count <= i * horizon]
        if before:
            found.append((i, value_at(before[-1])))
    return found


@given(st.integers(1, 7), st.integers(1, 25), st.integers(1, 12))
def test_reports_are_at_equal_shares_of_the_run(every: int, count: int, steps: int) -> None:
    heard: list[tuple[int, float]] = []
    reports = TrialReports(
        ["val/loss"], ["min"], reports=count, ask=lambda new: heard.extend(new) or False
    )
    trainer = fit(reports, epochs=None, max_steps=steps, validate_every=every)
    trainer.train(seed=1)
    validated = sorted({*range(every, steps + 1, every), steps})
    assert heard == by_hand(validated, steps, count)
    assert reports.reports == heard
    assert reports.values("last") == reports.values("best") == [value_at(steps)]


def pruning_at(report: int) -> TrialReports:
    return TrialReports(["val/loss"], ["min"], reports=4, ask=lambda new: new[-1][0] >= report)


def test_a_pruned_trial_stays_so_and_a_forgiven_one_goes_on_bitwise(tmp_path: Path) -> None:
    pruned = fit(pruning_at(2), tmp_path / "run").train(seed=1)
    assert (pruned.stopped_by, pruned.global_step) == ("pruned", 6)
    assert read_run(tmp_path / "run")["status"] == "pruned"

    def nobody(new: Any) -> bool:
        raise AssertionError("nothing is asked of one that was pruned")

    again = TrialReports(["val/loss"], ["min"], reports=4, ask=nobody)
    assert fit(again, tmp_path / "run").train(seed=1).global_step == 6
    assert again.out_of_patience

    whole = fit(TrialReports(["val/loss"], ["min"], reports=4), tmp_path / "whole")
    whole.train(seed=1)
    forgiven = TrialReports(["val/loss"], ["min"], reports=4, ask=nobody, forgive=True)
    revived = fit(forgiven, tmp_path / "run")
    revived.train(seed=1)
    assert revived.global_step == 12
    assert bits(revived.model.state_dict()) == bits(whole.model.state_dict())
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert forgiven.reports == whole.callbacks[0].reports


def test_a_trial_that_goes_on_reports_what_it_would_have(tmp_path: Path) -> None:
    class Stop(TimeLimit):
        def on_step_end(self, trainer: Any, metrics: Any) -> None:
            if trainer.global_step == 7:
                trainer.request_stop("stop file")

    def start(folder: str, *more: Any) -> list[tuple[int, float]]:
        heard: list[tuple[int, float]] = []
        ask = lambda new: heard.extend(new) or False  # noqa: E731
        reports = TrialReports(["val/loss"], ["min"], ask=ask)
        trainer = fit(reports, tmp_path / folder)
        trainer.callbacks = [*trainer.callbacks, *more]
        trainer.train(seed=1)
        return heard

    whole = start("whole")
    first, second = start("parts", Stop(hours=1)), start("parts")
    assert 0 < len(first) < len(whole)
    assert first + second == whole


def test_the_best_value_is_kept_by_direction() -> None:
    for direction, best in (("min", value_at(12)), ("max", value_at(3))):
        reports = TrialReports(["val/loss"], [direction])
        fit(reports).train(seed=1)
        assert reports.values("best") == [best]
        assert reports.values("last") == [value_at(12)]
    assert TrialReports(["val/loss"], ["min"]).values("last") is None


def test_a_value_that_is_no_result_is_an_error() -> None:
    class Bad(Fit):
        def evaluate(self) -> dict[str, float]:
            return {"val/loss": float("inf") if self.global_step > 3 else 1.0}

    trainer = fit(TrialReports(["val/loss"], ["min"]))
    trainer.__class__ = Bad
    with pytest.raises(MetricError, match="val/loss is inf at step 6"):
        trainer.train(seed=1)
    with pytest.raises(MetricError, match="did not measure 'val/accuracy'; it gave: val/loss"):
        fit(TrialReports(["val/accuracy"], ["max"])).train(seed=1)


def test_what_cannot_be_judged_is_said_before_the_first_step() -> None:
    trainer = fit(TrialReports(["val/loss"], ["min"]))
    trainer.__class__ = Trainer
    with pytest.raises(ConfigError, match="has no validation"):
        trainer.train(seed=1)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            yield from zip(X, X, strict=True)

    trainer = fit(TrialReports(["val/loss"], ["min"], ask=lambda new: False))
    trainer.train_dataloader = torch.utils.data.DataLoader(Stream(), 4)
    with pytest.raises(ConfigError, match=r"tune.pruner: .* length is unknown"):
        trainer.train(seed=1)


def test_an_error_of_the_study_ends_the_run() -> None:
    def ask(new: Any) -> bool:
        raise OSError("the database is gone")

    with pytest.raises(OSError, match="the database is gone"):
        fit(TrialReports(["val/loss"], ["min"], ask=ask)).train(seed=1)

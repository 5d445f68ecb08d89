"""What a trial's run reports to its study, and what it takes from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import CheckpointPolicy, Trainer
from paceline.callbacks import TimeLimit
from paceline.errors import ConfigError
from paceline.log.run_record import read_run
from paceline.testing import bits, rows
from paceline.tune.reporting import TrialReports

optuna.logging.set_verbosity(optuna.logging.WARNING)
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


def reports_to(
    pruner: optuna.pruners.BasePruner | None = None, reports: int = 20, **settings: Any
) -> tuple[TrialReports, optuna.Trial]:
    trial = optuna.create_study(pruner=pruner or optuna.pruners.NopPruner()).ask()
    return TrialReports(["val/loss"], ["min"], reports, trial, **settings), trial


def heard(trial: optuna.Trial) -> list[tuple[int, float]]:
    """What the study was told."""
    stored = trial.study._storage.get_trial(trial._trial_id)
    return sorted(stored.intermediate_values.items())


@settings(max_examples=40)
@given(st.integers(1, 7), st.integers(1, 25), st.integers(1, 12))
def test_reports_are_at_equal_shares_of_the_run(every: int, count: int, steps: int) -> None:
    reports, trial = reports_to(reports=count)
    trainer = fit(reports, epochs=None, max_steps=steps, validate_every=every)
    trainer.train(seed=1)
    validated = sorted({*range(every, steps + 1, every), steps})
    assert heard(trial) == by_hand(validated, steps, count)
    assert reports.best == {"val/loss": value_at(steps)}


def pruning_below(value: float, **settings: Any) -> TrialReports:
    return reports_to(optuna.pruners.ThresholdPruner(lower=value), 4, **settings)[0]


def test_a_pruned_trial_stays_so_and_a_forgiven_one_goes_on_bitwise(tmp_path: Path) -> None:
    pruned = fit(pruning_below(value_at(5)), tmp_path / "run").train(seed=1)
    assert (pruned.stopped_by, pruned.global_step) == ("pruned", 6)
    assert read_run(tmp_path / "run")["status"] == "pruned"
    again, asked = reports_to(reports=4)
    assert fit(again, tmp_path / "run").train(seed=1).global_step == 6
    assert again.out_of_patience
    assert heard(asked) == []

    whole = fit(reports_to(reports=4)[0], tmp_path / "whole")
    whole.train(seed=1)
    forgiven = pruning_below(value_at(5), heeded=False)
    revived = fit(forgiven, tmp_path / "run")
    revived.train(seed=1)
    assert revived.global_step == 12
    assert bits(revived.model.state_dict()) == bits(whole.model.state_dict())
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_trial_that_goes_on_reports_what_it_would_have(tmp_path: Path) -> None:
    class Stop(TimeLimit):
        def on_step_end(self, trainer: Any, metrics: Any) -> None:
            if trainer.global_step == 7:
                trainer.request_stop("stop file")

    def start(folder: str, *more: Any) -> list[tuple[int, float]]:
        reports, trial = reports_to()
        trainer = fit(reports, tmp_path / folder)
        trainer.callbacks = [*trainer.callbacks, *more]
        trainer.train(seed=1)
        return heard(trial)

    whole = start("whole")
    first, second = start("parts", Stop(hours=1)), start("parts")
    assert 0 < len(first) < len(whole)
    assert first + second == whole


def test_the_best_value_is_kept_by_direction() -> None:
    for direction, best in (("min", value_at(12)), ("max", value_at(3))):
        reports = TrialReports(["val/loss"], [direction], 20, judged=False)
        fit(reports).train(seed=1)
        assert reports.best == {"val/loss": best}


def test_a_run_without_a_known_length_cannot_be_judged() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            yield from zip(X, X, strict=True)

    trainer = fit(reports_to()[0])
    trainer.train_dataloader = torch.utils.data.DataLoader(Stream(), 4)
    with pytest.raises(ConfigError, match=r"tune\.pruner: .* only the end of the data"):
        trainer.train(seed=1)


def test_an_error_of_the_study_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reports, trial = reports_to()
    monkeypatch.setattr(trial, "report", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(reports).train(seed=1)

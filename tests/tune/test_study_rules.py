"""Rules of studies: which seed reports, what is tried first, and who hears the pruner's verdict."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from tuned_recipes import RECIPE, write

from endings import ending
from paceline import CheckpointPolicy, Trainer
from paceline.log.run_record import read_run
from paceline.recipe.recipe import load_recipe
from paceline.runs.listing import find_runs
from paceline.testing import Ranks, rows
from paceline.tune import Study
from paceline.tune.reporting import TrialReports, value_over_seeds

SHORT = RECIPE.replace("epochs: 10", "epochs: 4")


def validated(folder: Path) -> list[float]:
    return [row["val/loss"] for row in rows(folder) if "val/loss" in row]


def test_only_the_first_seed_reports_and_a_survivor_trains_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tune = """\
tune:
  {trials: 3, reports: 4, seeds: [3, 4], sampler: random,
   pruner: {type: median, n_startup_trials: 1, n_warmup_steps: 2},
   first: [{optimizer.lr: 0.3}, {optimizer.lr: 0.01}, {optimizer.lr: 0.4}],
   space: {optimizer.lr: {float: [0.001, 0.5]}}}
"""
    study = Study(write(tmp_path, tune, SHORT)).optimize()
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    for trial in study.trials:
        folder = study.folder.trial(trial.number)
        first = validated(folder / "seed_3")
        assert list(trial.intermediate_values.items()) == list(enumerate(first, 1))
        assert len(first) == (2 if trial.number == 1 else 4)
        if trial.number == 1:
            assert [path.name for path in folder.iterdir()] == ["seed_3"]
            assert trial.value == first[-1]
            continue
        ends = [first[-1], validated(folder / "seed_4")[-1]]
        assert ends[0] != ends[1]
        assert [trial.value] == [math.fsum(ends) / 2]
        assert trial.user_attrs["seeds"] == {"3": ends[:1], "4": ends[1:]}
    statuses = {run.name: run.status for run in find_runs(study.folder.path)}
    assert statuses.pop("trials/trial_0001/seed_3") == "pruned"
    assert list(statuses.values()) == ["complete"] * 4


def test_the_value_over_seeds() -> None:
    assert value_over_seeds([0.1, 0.2, 0.6], "mean", "min") == pytest.approx(0.3)
    assert value_over_seeds([0.1, 0.6, 0.2], "worst", "min") == 0.6
    assert value_over_seeds([0.1, 0.6, 0.2], "worst", "max") == 0.1


def test_wilcoxon_compares_the_seeds_and_ends_a_trial_behind_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tune = """\
tune:
  {trials: 2, seeds: [1, 2, 3, 4], sampler: random,
   pruner: {type: wilcoxon, p_threshold: 0.2},
   first: [{optimizer.lr: 0.3}, {optimizer.lr: 0.001}],
   space: {optimizer.lr: {float: [0.001, 0.5]}}}
"""
    study = Study(write(tmp_path, tune, RECIPE.replace("epochs: 10", "epochs: 1"))).optimize()
    best, worse = study.trials
    assert (best.state.name, worse.state.name) == ("COMPLETE", "PRUNED")
    for trial, seeds in ((best, 4), (worse, 3)):  # of 3 pairs that all lose, p is 1/8
        folder = study.folder.trial(trial.number)
        ran = sorted(path.name for path in folder.iterdir())
        assert ran == [f"seed_{n}" for n in range(1, seeds + 1)]
        ends = [validated(folder / name)[-1] for name in ran]
        assert [value for _, value in sorted(trial.intermediate_values.items())] == ends
        assert list(trial.user_attrs["seeds"].values()) == [[end] for end in ends]
        assert {run.status for run in find_runs(folder)} == {"complete"}


def test_the_first_trials_take_the_values_given_and_a_killed_one_takes_them_again(
    tmp_path: Path,
) -> None:
    killed = False

    def function(trial: Any) -> float:
        nonlocal killed
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        if trial.number == 1 and not killed:
            killed = True
            raise KeyboardInterrupt
        return x + y

    settings = {"first": [{"x": 0.25}, {"y": 0.5, "x": 0.125}], "sampler": "random"}
    study = Study(function, tmp_path / "s", settings=settings)
    with pytest.raises(KeyboardInterrupt):
        study.optimize(3)
    first, second, third = study.optimize(3).trials
    drawn = Study(function, tmp_path / "drawn", settings={"sampler": "random"}).optimize(3).trials
    assert first.params == {"x": 0.25, "y": drawn[0].params["y"]}  # what is not given is drawn
    assert second.params == {"x": 0.125, "y": 0.5}
    assert third.params == drawn[2].params


def test_a_component_may_be_tried_first_by_its_name_or_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tune = """\
tune:
  trials: 2
  first: [{optimizer: Adam}, {optimizer: {_target_: torch.optim.Adam, lr: 0.2}}]
  space:
    optimizer: [{_target_: torch.optim.SGD, lr: 0.1}, {_target_: torch.optim.Adam, lr: 0.2}]
"""
    study = Study(write(tmp_path, tune, RECIPE.replace("epochs: 10", "epochs: 1"))).optimize()
    assert [trial.params for trial in study.trials] == [{"optimizer": "Adam"}] * 2
    tree = load_recipe(study.folder.trial(1) / "recipe.yaml").tree
    assert tree["optimizer"]["_target_"] == "torch.optim.Adam"


@pytest.mark.parametrize(
    ("sampler", "goes_on"),
    [
        ({"type": "tpe", "n_startup_trials": 3}, True),
        ({"type": "cmaes", "n_startup_trials": 2, "popsize": 4}, False),
        ({"type": "nsga2", "population_size": 3}, False),
    ],
    ids=["tpe", "cmaes", "nsga2"],
)
def test_behind_a_lost_storage_evolution_begins_anew_from_the_trials(
    tmp_path: Path, sampler: dict[str, Any], goes_on: bool
) -> None:
    """No trial is lost, but the generation is: only Optuna's storage has it (docs/studies.md)."""

    def function(trial: Any) -> float:
        return trial.suggest_float("x", -1, 1) ** 2 + trial.suggest_float("y", -1, 1)

    settings = {"sampler": sampler}
    whole = Study(function, tmp_path / "whole", settings=settings).optimize(11).trials
    Study(function, tmp_path / "s", settings=settings).optimize(7)._close()
    for file in (tmp_path / "s").glob("study.db*"):
        file.unlink()
    again = Study(function, tmp_path / "s", settings=settings).optimize(11).trials
    same = [old.params == new.params for old, new in zip(whole, again, strict=True)]
    assert same[:7] == [True] * 7
    assert all(same) == goes_on
    assert [trial.state.name for trial in again] == ["COMPLETE"] * 11


def run_study(folder: Path, kill_at: int) -> None:
    """Two trials of 8 steps each; killed behind a step of this process."""
    os.chdir(folder)
    left = kill_at
    step = torch.optim.SGD.step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        result = step(self, *args, **kwargs)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    torch.optim.SGD.step = counted
    Study(folder / "toy.yaml").optimize()


def test_a_killed_trial_goes_on_from_its_checkpoint_under_its_own_number(
    ranks: Ranks, tmp_path: Path
) -> None:
    tune = "tune: {trials: 2, sampler: random, space: {optimizer.lr: {float: [0.1, 0.3]}}}\n"
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, tune, SHORT)
    ranks(run_study, 1, tmp_path / "whole", 0)
    [killed] = ranks.outcomes(run_study, 1, tmp_path / "killed", 15)  # step 7 of the second
    assert killed.code == -signal.SIGKILL
    ranks(run_study, 1, tmp_path / "killed", 0)
    trials = [tmp_path / name / "runs/p/s/trials" for name in ("whole", "killed")]
    for number in ("trial_0000", "trial_0001"):
        assert ending(trials[1] / number) == ending(trials[0] / number)
    assert sorted(path.name for path in trials[1].iterdir()) == ["trial_0000", "trial_0001"]
    plan = str(read_run(trials[1] / "trial_0001")["plan"])
    assert "resumes from step_" in plan, plan


class Fit(Trainer):
    """Validates with a value that depends on the step alone."""

    def evaluate(self) -> dict[str, float]:
        return {"val/loss": 1.0 / self.global_step}


def pruned_on_ranks(folder: Path) -> tuple[int, str | None, bool, bool]:
    """A run that is pruned at step 4 of 8: where it has ended, and what the callback keeps."""
    trial = None
    if os.environ["RANK"] == "0":
        study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(lower=0.3))
        trial = study.ask()
    reports = TrialReports(["val/loss"], ["min"], 4, trial)
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    x = torch.linspace(-1, 1, 16).view(-1, 1)
    trainer = Fit(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=torch.nn.MSELoss(),
        train_dataloader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x), 1),
        run_dir=folder,
        progress=False,
        epochs=1,
        validate_every=2,
        callbacks=[reports],
        checkpoint=CheckpointPolicy(every_steps=4, asynchronous=False),
    )
    result = trainer.train(seed=1)
    state = reports.state_dict()["verdict"]
    return result.global_step, result.stopped_by, reports.out_of_patience, state


def test_every_rank_hears_the_verdict_and_keeps_it(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(pruned_on_ranks, 2, tmp_path) == [(4, "pruned", True, True)] * 2
    kept = json.loads((tmp_path / "run.json").read_text())
    assert (kept["status"], kept["stopped_by"]) == ("pruned", "pruned")

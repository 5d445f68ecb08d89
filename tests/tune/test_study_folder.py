"""A study's folder: lines of trials that survive a crash, and rebuild a lost database."""

from __future__ import annotations

import json
import math
from pathlib import Path

import optuna
import pytest

from paceline.errors import ConfigError
from paceline.log.lock import FolderLock
from paceline.tune.folder import StudyFolder
from paceline.tune.history import line_of, rebuild

optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_the_last_line_of_a_trial_counts_and_a_torn_one_is_cut(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    assert folder.lines() == {}
    folder.record({"number": 1, "state": "RUNNING"})
    folder.record({"number": 0, "state": "RUNNING"})
    with open(tmp_path / "trials.jsonl", "a") as file:
        file.write('{"number": 7, "sta' + "x" * 70000)
    assert list(folder.lines()) == [0, 1]
    folder.record({"number": 1, "state": "COMPLETE", "values": [math.nan]})
    assert [line["state"] for line in folder.lines().values()] == ["RUNNING", "COMPLETE"]
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [1, 0, 1]


def test_study_json_is_read_again(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "new")
    assert folder.read_study() is None
    folder.write_study({"trials": 3})
    assert folder.read_study() == {"format": 1, "trials": 3}
    (tmp_path / "new" / "study.json").write_text("{")
    with pytest.raises(ConfigError, match=r"study\.json is damaged"):
        folder.read_study()


def test_a_trial_is_left_once_no_process_trains_it(tmp_path: Path, ranks) -> None:
    folder = StudyFolder(tmp_path)
    assert folder.is_left(3) is None
    (folder.trial(3) / "seed_1").mkdir(parents=True)
    assert ranks(_is_left, 1, tmp_path) == [True]
    for place in (folder.trial(3), folder.trial(3) / "seed_1"):
        lock = FolderLock()
        assert lock.try_to_take(place)
        assert ranks(_is_left, 1, tmp_path) == [False]
        lock.release()
    assert ranks(_is_left, 1, tmp_path) == [True]


def _is_left(path: Path) -> bool | None:
    return StudyFolder(path).is_left(3)


def test_a_lost_database_is_made_again(tmp_path: Path) -> None:
    """Numbers, values, reports and what waits; the sampler goes on as it would have."""

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 1e-3, 1, log=True)
        kind = trial.suggest_categorical("kind", ["a", "b"])
        trial.report(x, 1)
        if kind == "b":
            raise optuna.TrialPruned
        return x * trial.suggest_int("n", 1, 9, step=2)

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    study.optimize(objective, n_trials=6)
    running = study.ask()
    x = running.suggest_float("x", 1e-3, 1, log=True)
    folder = StudyFolder(tmp_path)
    for trial in study.trials:
        if trial.number != 2:  # nobody recorded it
            folder.record(line_of(trial, folder=f"trials/trial_{trial.number:04d}"))
    again = optuna.create_study()
    assert rebuild(again, folder.lines()) == 7
    assert [t.number for t in again.trials] == [*range(7)]
    for before, after in zip(study.trials[:6], again.trials[:6], strict=True):
        if before.number == 2:
            assert after.state.name == "FAIL"
            continue
        assert (after.state, after.values) == (before.state, before.values)
        assert (after.params, after.distributions) == (before.params, before.distributions)
        assert after.intermediate_values == before.intermediate_values
    waiting = again.ask()
    assert waiting.number == 6
    assert waiting.suggest_float("x", 1e-3, 1, log=True) == x

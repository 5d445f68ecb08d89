"""Several worker processes of one study."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from paceline.tune import Study, TrialsFailed


def lines(folder: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    ended: list[int] = []
    for text in (folder / "trials.jsonl").read_text().splitlines():
        record = json.loads(text)
        found[record["number"]] = record
        ended += [record["number"]] * (record["state"] != "RUNNING")
    assert sorted(ended) == sorted(set(ended)), "a trial has ended twice"
    return found


def test_workers_share_the_trials_and_none_is_lost_or_doubled(tmp_path: Path) -> None:
    def noted(trial: Any) -> float:
        with open(tmp_path / f"by_{trial.number}", "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.02)
        return trial.suggest_float("x", -1, 1) ** 2

    study = Study(noted, tmp_path / "s").optimize(12, workers=3)
    assert [trial.number for trial in study.trials] == list(range(12))
    assert sorted(lines(tmp_path / "s")) == list(range(12))
    by = [(tmp_path / f"by_{number}").read_text().split() for number in range(12)]
    assert all(len(pids) == 1 for pids in by)
    assert 1 < len({pids[0] for pids in by}) <= 3


def test_a_worker_that_dies_is_replaced_and_its_trial_goes_on_under_its_number(
    tmp_path: Path,
) -> None:
    def dies(trial: Any) -> float:
        x = trial.suggest_float("x", -1, 1)
        if trial.number == 1:
            with open(tmp_path / "tries", "a") as file:
                file.write(f"{x}\n")
            if len((tmp_path / "tries").read_text().split()) < 3:
                os.kill(os.getpid(), signal.SIGKILL)
        if trial.number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    settings = {"max_restarts": 2}
    study = Study(dies, tmp_path / "s", settings=settings).optimize(5, workers=2)
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    tries = (tmp_path / "tries").read_text().split()
    assert (len(tries), len(set(tries))) == (3, 1)
    found = lines(tmp_path / "s")
    assert found[1]["restarts"] == 2
    cause = "its worker was killed by SIGKILL; tried 3 times (tune.max_restarts)"
    assert found[2]["cause"] == cause


def test_failures_in_a_row_end_all_workers(tmp_path: Path) -> None:
    def fails(trial: Any) -> float:
        raise ValueError("on purpose")

    study = Study(fails, tmp_path, settings={"max_failures": 4})
    with pytest.raises(TrialsFailed, match="ValueError: on purpose"):
        study.optimize(50, workers=2)
    assert 4 <= len(lines(tmp_path)) < 12

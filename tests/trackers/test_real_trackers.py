"""Trackers have each row once, whoever was killed meanwhile; the real libraries' files are read."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from tracked import ALL, At, offline, read_back, rows_of, run, run_offline, wait_until_gone

from paceline.log.sinks import read_rows
from paceline.testing import Ranks
from paceline.trackers.sync import sync


def test_each_row_is_there_once_after_kills_of_the_trainer_and_of_the_followers(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed at step 25 the trainer's followers send what there is; it resumes at step 20 with new
    ones, which are killed at step 35; what is then missing is sent later."""
    for key, value in offline(tmp_path).items():
        monkeypatch.setenv(key, value)
    run_dir = tmp_path / "run"
    kill = At(25, 15, trainer=True)
    [done] = ranks.outcomes(run_offline, 1, tmp_path, run_dir, ALL, kill, limit=180)
    assert done.code == -signal.SIGKILL
    wait_until_gone(run_dir)
    for name in ALL:  # the kill has lost no row
        assert read_back(name, tmp_path, run_dir) == rows_of(run_dir), name

    run(run_dir, ALL, At(35, 33, trainer=False))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(ALL), said
    assert all("its process has failed" in line for line in said)
    assert all(f"paceline sync {run_dir} --to" in line for line in said)

    rows = len(list(read_rows(run_dir / "metrics.jsonl")))
    for name in ALL:
        assert sync(run_dir, name) == rows
    expected = rows_of(run_dir)
    assert {len(values) for values in expected.values()} == {1}
    for name in ALL:
        found = read_back(name, tmp_path, run_dir)
        assert found == expected, name
    assert os.environ["WANDB_MODE"] == "offline"
    for name in ALL:
        cursor = json.loads((run_dir / "trackers" / f"{name}.json").read_text())
        assert (cursor["complete"], cursor["problem"]) == (True, None)

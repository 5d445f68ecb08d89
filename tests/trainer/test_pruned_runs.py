"""A run that a callback ends for a reason of its own, and that may go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from endings import ending
from paceline import Callback
from paceline.log.run_record import RunRecord
from paceline.runs.listing import find_runs
from paceline.testing import rows
from paceline.trainer.run import Run
from small import batches, fitted

STEPS = 10


class Prunes(Callback):
    """Ends the run after `at` validations, by a verdict that its state keeps."""

    ends_with = "pruned"

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    @property
    def out_of_patience(self) -> bool:
        return self.seen >= self.at

    def on_metrics(self, trainer: Any, metrics: dict[str, float]) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def trained(folder: Path, at: int) -> Any:
    """Validates every 2 steps and writes a row every 3: rows are open at boundaries."""
    return fitted(
        run_dir=folder,
        epochs=None,
        max_steps=STEPS,
        val_dataloader=batches(8),
        validate_every=2,
        log_every=3,
        callbacks=[Prunes(at)],
    ).result


def record(folder: Path) -> tuple[str, str]:
    found = json.loads((folder / "run.json").read_text())
    return found["status"], found["stopped_by"]


def test_the_reason_is_the_callbacks_and_the_status_is_pruned(tmp_path: Path) -> None:
    result = trained(tmp_path / "one", 2)
    assert (result.stopped_by, result.complete, result.global_step) == ("pruned", True, 4)
    assert record(tmp_path / "one") == ("pruned", "pruned")
    assert [run.status for run in find_runs(tmp_path)] == ["pruned"]
    assert rows(tmp_path / "one")[-1]["step"] == 4  # the open row too


def test_a_pruned_run_goes_on_bitwise_once_nothing_prunes_it(tmp_path: Path) -> None:
    trained(tmp_path / "pruned", 2)
    again = trained(tmp_path / "pruned", 2)
    assert (again.stopped_by, again.global_step) == ("pruned", 4)
    assert rows(tmp_path / "pruned")[-1]["step"] == 4
    assert trained(tmp_path / "pruned", 99).stopped_by == "max_steps"
    trained(tmp_path / "never", 99)
    assert ending(tmp_path / "pruned") == ending(tmp_path / "never")
    assert record(tmp_path / "pruned") == ("complete", "max_steps")


def test_killed_behind_its_last_checkpoint_it_still_gets_its_last_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "whole", 2)
    finish = RunRecord.finish
    monkeypatch.setattr(RunRecord, "finish", lambda *_, **__: None)
    trained(tmp_path / "killed", 2)
    monkeypatch.setattr(RunRecord, "finish", finish)
    for _ in range(2):
        trained(tmp_path / "killed", 2)
        assert ending(tmp_path / "killed") == ending(tmp_path / "whole")
        assert record(tmp_path / "killed") == ("pruned", "pruned")
    assert not Run.lacks_end

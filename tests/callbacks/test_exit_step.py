"""ExitStep leaves a run after a step of the whole run or of a start, and the next start resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_runs import STEPS, build

from paceline.callbacks import ExitStep
from paceline.errors import ConfigError
from paceline.testing import Ranks, bits, rows


def test_each_start_takes_so_many_steps_until_the_step_at_which_all_leave(tmp_path: Path) -> None:
    """Then nothing more happens until the step is raised; it ends as a run that never left."""
    ends, checkpoints = [], []
    for _ in range(4):
        trainer = build(tmp_path / "parts", ExitStep(6, this_run=2))
        result = trainer.train(seed=5)
        ends.append((result.global_step, result.stopped_by))
        assert result.checkpoint is not None
        folder = tmp_path / "parts" / "checkpoints"
        checkpoints.append({p.name: p.stat().st_mtime_ns for p in folder.glob("step_*")})
    assert ends == [(2, "exit_step_this_run"), (4, "exit_step_this_run")] + 2 * [(6, "exit_step")]
    assert checkpoints[3] == checkpoints[2]
    again = build(tmp_path / "parts", ExitStep(3))
    assert again.train(seed=5).global_step == 6  # it is behind that step, and stops at once
    whole, last = build(tmp_path / "whole"), build(tmp_path / "parts", ExitStep(STEPS))
    assert whole.train(seed=5).complete
    assert last.train(seed=5).complete
    assert bits(last.model.state_dict()) == bits(whole.model.state_dict())
    assert bits(last.optimizer.state_dict()) == bits(whole.optimizer.state_dict())
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def leave(folder: Path) -> list[int]:
    starts = [build(folder, ExitStep(this_run=n)) for n in (1, 3)]
    return [trainer.train(seed=5).global_step for trainer in starts]


def test_all_ranks_leave_after_the_same_step(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(leave, 2, tmp_path) == [[1, 4], [1, 4]]


def test_a_number_of_steps_is_needed() -> None:
    for wrong in ({}, {"step": 0}, {"step": 3, "this_run": -1}):
        with pytest.raises(ConfigError, match=r"ExitStep\(.*give a number of steps, 1 or more"):
            ExitStep(**wrong)

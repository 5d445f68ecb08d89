"""Several processes save together and load apart, and fail together."""

from __future__ import annotations

import signal
from pathlib import Path

from rank_scenes import WHOLE, play

from faults import leftovers, opened
from paceline.testing import Ranks


def test_what_two_ranks_save_is_loaded_by_one_and_by_four(tmp_path: Path, ranks: Ranks) -> None:
    ranks(play, 2, "save", tmp_path)
    with opened(tmp_path) as checkpoints:
        newest = checkpoints.newest()
        assert newest is not None
        tree = checkpoints.load(newest.path)
        assert (tree["model"]["sharded"] == WHOLE + 2).all()
        assert list(tree["rank"]) == ["0", "1"]
    ranks(play, 4, "load", tmp_path)


def test_a_failure_on_one_rank_is_everyones_and_the_next_save_succeeds(
    tmp_path: Path, ranks: Ranks
) -> None:
    ranks(play, 2, "failures", tmp_path)


def test_a_rank_killed_in_a_save_leaves_the_old_checkpoint_and_no_one_waiting(
    tmp_path: Path, ranks: Ranks
) -> None:
    outcomes = ranks.outcomes(play, 2, "killed", tmp_path)
    assert [one.code for one in outcomes] == [0, -signal.SIGKILL], outcomes
    with opened(tmp_path) as checkpoints:
        checkpoints.recover()
        assert [c.step for c in checkpoints.list()] == [1]
        assert checkpoints.newest() is not None
        assert leftovers(tmp_path) == []

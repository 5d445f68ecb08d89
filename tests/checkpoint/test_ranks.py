"""Several processes save together and load apart, and fail together."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import leftovers, opened
from ranks_program import WHOLE

PROGRAM = Path(__file__).with_name("ranks_program.py")


Play = Callable[[str, Path, int], list[int]]


@pytest.fixture(scope="module")
def play() -> Iterator[Play]:
    """Plays a scene of `ranks_program` on so many processes; returns their exit codes."""
    program = subprocess.Popen(
        [sys.executable, str(PROGRAM)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    orders, answers = program.stdin, program.stdout

    def one(scene: str, folder: Path, size: int) -> list[int]:
        orders.write(json.dumps([scene, str(folder), size]).encode() + b"\n")
        orders.flush()
        assert select.select([answers], [], [], 120)[0], f"{scene}: the ranks wait for ever"
        return json.loads(answers.readline())

    with program:
        try:
            yield one
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)


@pytest.mark.slow
def test_what_two_ranks_save_is_loaded_by_one_and_by_four(tmp_path: Path, play: Play) -> None:
    assert play("save", tmp_path, 2) == [0, 0]
    with opened(tmp_path) as checkpoints:
        newest = checkpoints.newest()
        assert newest is not None
        tree = checkpoints.load(newest.path)
        assert (tree["model"]["sharded"] == WHOLE + 2).all()
        assert list(tree["rank"]) == ["0", "1"]
    assert play("load", tmp_path, 4) == [0] * 4


@pytest.mark.slow
def test_a_failure_on_one_rank_is_everyones_and_the_next_save_succeeds(
    tmp_path: Path, play: Play
) -> None:
    assert play("failures", tmp_path, 2) == [0, 0]


@pytest.mark.slow
def test_a_rank_killed_in_a_save_leaves_the_old_checkpoint_and_no_one_waiting(
    tmp_path: Path, play: Play
) -> None:
    assert play("killed", tmp_path, 2) == [0, -signal.SIGKILL]
    with opened(tmp_path) as checkpoints:
        checkpoints.recover()
        assert [c.step for c in checkpoints.list()] == [1]
        assert checkpoints.newest() is not None
        assert leftovers(tmp_path) == []

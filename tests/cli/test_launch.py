"""`--nproc`: several processes behave as one command."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SLOW = ("trainer.epochs=1000", "trainer.pause=0.05")


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_two_processes_train_one_run_and_only_rank_0_prints(paceline, tmp_path: Path):
    code, out, err = paceline("train", "toy.yaml", "--nproc", "2")
    assert code == 0, err
    assert "hello from rank 0" in out
    assert "rank 1" not in out
    record = json.loads((tmp_path / "runs/p/n/run.json").read_text())
    assert (record["world_size"], record["step"]) == (2, 16)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_launcher_is_a_clean_stop_of_all(paceline, wait_for, tmp_path, number):
    process = paceline.start("train", "toy.yaml", "--nproc", "2", *SLOW)
    wait_for("three1")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    record = json.loads((tmp_path / "runs/p/n/run.json").read_text())
    assert record["stopped_by"] == f"signal {signal.Signals(number).name}"


def test_a_signal_to_one_worker_stops_all(paceline, wait_for):
    process = paceline.start("train", "toy.yaml", "--nproc", "2", *SLOW)
    wait_for("three1")
    os.kill(int(wait_for("pid1").read_text()), signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err


def test_a_rank_that_fails_is_named_with_its_error_and_code(paceline):
    words = ("train", "toy.yaml", "--nproc", "2", "trainer.bad=1", "trainer.how=raise")
    code, _, err = paceline(*words)
    assert code == 1
    assert "rank 1 failed" in err
    assert "ValueError: a fault on purpose" in err
    assert "paceline: rank 1 left with code 1" in err


def test_a_rank_that_is_killed_is_named(paceline):
    words = ("train", "toy.yaml", "--nproc", "2", "trainer.bad=1", "trainer.how=kill")
    code, _, err = paceline(*words)
    assert code == 1
    assert "rank 1 was killed by SIGKILL" in err


def test_workers_stop_when_the_launcher_dies(paceline, wait_for, tmp_path: Path):
    process = paceline.start("train", "toy.yaml", "--nproc", "2", *SLOW)
    wait_for("three1")
    pids = [int(wait_for(f"pid{rank}").read_text()) for rank in (0, 1)]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers went on without their launcher"
        time.sleep(0.1)


def test_a_rank_that_leaves_later_than_the_others_is_left_the_time(paceline, wait_for):
    words = ("train", "toy.yaml", "--nproc", "2", *SLOW, "trainer.bad=0", "trainer.how=linger")
    process = paceline.start(*words)
    wait_for("three1")
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err


def test_a_signal_stops_ranks_that_wait_for_one_that_has_not_come(paceline, wait_for, tmp_path):
    with (tmp_path / "toy.py").open("a") as file:
        file.write("if os.environ.get('RANK') == '1':\n")
        file.write("    open('late', 'w').close()\n    time.sleep(100)\n")
    process = paceline.start("train", "toy.yaml", "--nproc", "2")
    wait_for("late")
    time.sleep(5)  # rank 0 gets to where it waits
    process.terminate()
    _, err = process.communicate(timeout=45)
    assert process.returncode == 75, err


def test_an_override_reaches_the_workers_as_it_was_written(paceline, tmp_path: Path):
    folder = "runs/a$$b"
    code, _, err = paceline("train", "toy.yaml", "--nproc", "2", f"run.dir='{folder}'")
    assert code == 0, err
    assert (tmp_path / folder / "run.json").exists()

"""`--nproc`: several processes behave as one command."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from paceline.world.launch import Rendezvous

pytestmark = pytest.mark.slow
SLOW = ("trainer.epochs=1000", "trainer.pause=0.05")
EACH_STEP = "+checkpoint={every_steps: 1}"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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


def test_processes_that_srun_has_started_train_one_run(paceline, tmp_path: Path):
    """Given two processes that know nothing but Slurm's variables, then they are one run's ranks,
    and only rank 0 prints."""
    step = {
        "SLURM_JOB_ID": str(os.getpid()),  # a port of its own
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [
        paceline.start("train", "toy.yaml", SLURM_PROCID=rank, SLURM_LOCALID=rank, **step)
        for rank in ("0", "1")
    ]
    outputs = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert [out.count("hello from rank") for out, _ in outputs] == [1, 0]
    record = json.loads((tmp_path / "runs/p/n/run.json").read_text())
    assert (record["world_size"], record["step"]) == (2, 16)


def test_launchers_of_several_machines_train_one_run_and_stop_together(
    paceline, wait_for, tmp_path
):
    """Given two launchers with one process each, when one of them gets a signal, then both stop
    cleanly."""
    meeting = ("--nnodes", "2", "--rdzv-endpoint", f"localhost:{free_port()}")
    launchers = [
        paceline.start("train", "toy.yaml", "--nproc", "1", *meeting, *SLOW) for _ in range(2)
    ]
    wait_for("three0")
    wait_for("three1")
    launchers[1].terminate()
    errors = [launcher.communicate(timeout=60)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [75, 75], errors
    record = json.loads((tmp_path / "runs/p/n/run.json").read_text())
    assert (record["world_size"], record["stopped_by"]) == (2, "signal SIGTERM")


def test_a_launcher_that_waits_for_others_can_be_stopped(paceline):
    port = free_port()
    meeting = ("--nnodes", "2", "--rdzv-endpoint", f"localhost:{port}")
    process = paceline.start("train", "toy.yaml", *meeting)
    while not listens(port):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (75, "")


@pytest.mark.parametrize("launcher", ["paceline", "torchrun"])
def test_after_a_failure_all_ranks_start_again_and_go_on(paceline, tmp_path: Path, launcher: str):
    """Given an earlier run in the folder, when one begins afresh, fails at step 3 and is restarted,
    then it goes on from its own checkpoint to the end, and the earlier one is moved aside once."""
    assert paceline("train", "toy.yaml", "trainer.epochs=1")[0] == 0
    words = ["train", "toy.yaml", "--fresh", "trainer.bad=1", "trainer.how=kill_once", EACH_STEP]
    if launcher == "paceline":
        code, _, err = paceline(*words, "--nproc", "2", "--max-restarts", "1")
        assert "paceline: rank 1 was killed by SIGKILL" in err
    else:
        agent = ("--nproc-per-node=2", "--max-restarts=1", "-m", "paceline")
        code, _, err = paceline.torchrun(*agent, *words)
    assert code == 0, err
    record = json.loads((tmp_path / "runs/p/n/run.json").read_text())
    assert (record["status"], record["step"], record["world_size"]) == ("complete", 16, 2)
    assert any(line["decision"].startswith("goes on from step_") for line in record["plan"]), record
    assert sorted(path.name for path in (tmp_path / "runs/p").iterdir()) == ["n", "n.1"]


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (("--nnodes", "2"), {}, "say with --rdzv-endpoint HOST:PORT"),
        (("--nnodes", "2", "--rdzv-endpoint", "here"), {}, "it has to be HOST:PORT"),
        (("--rdzv-endpoint", "here:1"), {}, "say with --nnodes how many"),
        (("--max-restarts", "1"), {"RANK": "0", "WORLD_SIZE": "2"}, "give it to what has started"),
        (("--nproc", "4"), {"RANK": "0", "WORLD_SIZE": "2"}, "started as one of 2 already"),
    ],
)
def test_options_that_start_nothing_are_mistakes(paceline, words, environment, said):
    code, _, err = paceline("train", "toy.yaml", *words, **environment)
    assert code == 2
    assert said in err


def test_launchers_meet_under_the_name_they_are_given():
    assert Rendezvous(2, "here:1", "mine").parameters().run_id == "mine"
    assert (
        Rendezvous(2, "here:1").parameters().run_id == Rendezvous(2, "here:1").parameters().run_id
    )

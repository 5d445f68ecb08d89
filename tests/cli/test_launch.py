"""Several processes behave as one command, whoever started them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from command import Paceline, be_paceline
from paceline.testing import Ranks, free_port

SLOW = ("trainer.epochs=1000", "trainer.pause=0.05")
EACH_STEP = "+checkpoint={every_steps: 1}"


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def by_srun(rank: int, port: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(port),  # a port of its own
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def by_accelerate(rank: int, port: int) -> dict[str, str]:
    """What `accelerate launch --multi_gpu` leaves to its processes, but for an agent's store."""
    return {
        "ACCELERATE_MIXED_PRECISION": "no",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": "2",
    }


def test_processes_that_other_launchers_have_started_train_one_run(
    paceline: Paceline, tmp_path: Path
):
    """Given the variables of a launcher alone, then two processes are ranks of one run, of which
    rank 0 prints; started by another launcher with more to do, they go on with it."""
    for variables, epochs in ((by_srun, 1), (by_accelerate, 2)):
        words, port = ("train", "toy.yaml", f"trainer.epochs={epochs}"), free_port()
        ended = paceline.together([words] * 2, [variables(rank, port) for rank in (0, 1)])
        assert [code for code, _, _ in ended] == [0, 0], ended
        assert [out.count("hello from rank") for _, out, _ in ended] == [1, 0]
        run = record(tmp_path / "runs/p/n")
        assert (run["world_size"], run["step"]) == (2, 8 * epochs)
    assert any(line["decision"] == "resumes from step_00000008" for line in run["plan"])


def test_launchers_of_several_machines_train_one_run_and_stop_together(
    paceline: Paceline, tmp_path: Path
):
    """Given two launchers with one process each, when one of them gets a signal, then both stop
    cleanly."""
    meeting = ("--nnodes", "2", "--rdzv-endpoint", f"localhost:{free_port()}")
    stops = ("trainer.bad=1", "trainer.how=stop_launcher")
    ended = paceline.launch_together([("train", "toy.yaml", *meeting, *SLOW, *stops)] * 2)
    assert [code for code, _, _ in ended] == [75, 75], ended
    run = record(tmp_path / "runs/p/n")
    assert (run["world_size"], run["stopped_by"]) == (2, "signal SIGTERM")


def test_a_mistake_on_one_machine_ends_the_launchers_that_wait_for_it(paceline: Paceline):
    """Whichever of them has the place where they meet, or comes first."""
    for mistaken in (0, 1):
        meeting = ("--nnodes", "2", "--rdzv-endpoint", f"localhost:{free_port()}")
        commands = [["train", "toy.yaml", *meeting] for _ in range(2)]
        commands[mistaken] += ["trainer.epochz=2"]
        ended = paceline.launch_together(commands)
        assert [code for code, _, _ in ended] == [2, 2], ended
        assert "epochz" in ended[mistaken][2]
        assert "has failed: RecipeError: " in ended[1 - mistaken][2]
        assert "epochz" in ended[1 - mistaken][2]


EARLY = """
class Early(nn.Linear):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        if os.environ["RANK"] == "1":
            raise ValueError("on purpose")
"""


def test_a_rank_that_fails_before_they_meet_ends_the_launchers_of_all_machines(
    paceline: Paceline, tmp_path: Path
):
    """For what it says itself."""
    (tmp_path / "toy.py").write_text((tmp_path / "toy.py").read_text() + EARLY)
    meeting = ("--nnodes", "2", "--rdzv-endpoint", f"localhost:{free_port()}")
    command = ("train", "toy.yaml", *meeting, "model._target_=toy.Early")
    ended = paceline.launch_together([command] * 2)
    assert [code for code, _, _ in ended] == [2, 2], ended
    told = [err for _, _, err in ended if "the launcher on" in err]
    assert len(told) == 1
    assert "has failed: rank 1: RecipeError: " in told[0]
    assert "on purpose" in told[0]


def test_two_processes_train_one_run_and_after_a_failure_go_on(paceline: Paceline, tmp_path: Path):
    """Given an earlier run in the folder, when one begins afresh, fails at step 3 and is restarted,
    then it goes on from its own checkpoint to the end, and the earlier one is moved aside once.
    Only rank 0 prints; an override that a template would read gets to the workers as written."""
    train = ("train", "toy.yaml", "run.dir='runs/a$$b'")
    assert paceline(*train, "trainer.epochs=1")[0] == 0
    fails = ("--fresh", "trainer.bad=1", "trainer.how=kill_once", EACH_STEP)
    restarts = ("--nproc", "2", "--max-restarts", "1")
    [(code, out, err)] = paceline.launch_together([(*train, *fails, *restarts)])
    assert code == 0, err
    assert "hello from rank 0" in out
    assert "rank 1" not in out
    assert "paceline: rank 1 was killed by SIGKILL" in err
    run = record(tmp_path / "runs/a$$b")
    assert (run["status"], run["step"], run["world_size"]) == ("complete", 16, 2)
    assert any(line["decision"].startswith("resumes from step_") for line in run["plan"]), run
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["a$$b", "a$$b.1"]


def test_a_worker_stops_cleanly_when_its_launcher_dies(
    paceline: Paceline, ranks: Ranks, wait_for: Callable[[str], Path], tmp_path: Path
):
    environment = paceline._environment({})
    [launcher] = ranks.outcomes(launch_and_die, 1, tmp_path, environment)
    assert launcher.code == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while record(tmp_path / "runs/p/n")["status"] == "running":
        assert time.monotonic() < deadline, "it went on without its launcher"
        time.sleep(0.05)
    assert record(tmp_path / "runs/p/n")["stopped_by"] == "signal SIGTERM"


def launch_and_die(folder: Path, environment: dict[str, str]) -> None:
    environment["PACELINE_LAUNCHER"] = str(os.getpid())
    if os.fork() == 0:
        be_paceline(folder, [("train", "toy.yaml", *SLOW)], [environment], folder)
    while not (folder / "three0").exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_signal_stops_ranks_that_wait_for_one_that_has_not_come(
    paceline: Paceline, ranks: Ranks, tmp_path: Path
):
    environment = paceline._environment({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"})
    waits, _ = ranks.outcomes(be_late, 2, tmp_path, environment)
    assert waits.code == 75, waits.output
    assert waits.seconds < 45


def be_late(folder: Path, environment: dict[str, str]) -> None:
    """Rank 0 finds the agent of its launcher, which is rank 1, but no other rank."""
    port = os.environ["MASTER_PORT"]
    agent = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    if os.environ["RANK"] == "0":
        (folder / "waits").write_text(str(os.getpid()))
        be_paceline(folder, [("train", "toy.yaml")], [environment | agent], folder)
    store = TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
    at_rest = store.num_keys()
    while store.num_keys() == at_rest:  # until rank 0 has left its mark there
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(int((folder / "waits").read_text()), signal.SIGTERM)
    time.sleep(2)  # a store that goes would end rank 0 as well


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (("--nnodes", "2"), {}, "give --rdzv-endpoint HOST:PORT"),
        (("--rdzv-endpoint", "here:1"), {}, "give their number with --nnodes"),
        (("--max-restarts", "1"), {"RANK": "0", "WORLD_SIZE": "2"}, "give it to the launcher"),
        (("--nproc", "4"), {"RANK": "0", "WORLD_SIZE": "2"}, "already started as one of 2"),
    ],
)
def test_options_that_start_nothing_are_mistakes(paceline: Paceline, words, environment, said):
    [(code, _, err)] = paceline.together([("train", "toy.yaml", *words)], [environment])
    assert code == 2
    assert said in err

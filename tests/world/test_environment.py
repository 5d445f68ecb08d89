"""A process finds its place in the run from torchrun's variables or from Slurm's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ConfigError
from paceline.testing import Ranks
from paceline.world import environment, world
from paceline.world.environment import (
    ReplicaGroup,
    began_before_restart,
    first_host,
    from_slurm,
)
from paceline.world.world import World

TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[01-08]",
    "SLURM_NTASKS": "64",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}


def without(*names: str, **more: str) -> dict[str, str]:
    return {**{name: value for name, value in TASK.items() if name not in names}, **more}


def test_a_task_of_srun_gets_what_torchrun_would_have_set():
    """Given a step on two of a job's eight nodes, then its own tasks and hosts count."""
    found = from_slurm(TASK)
    port = int(found.pop("MASTER_PORT"))
    assert found == {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "MASTER_ADDR": "gpu07"}
    assert 10_000 <= port < 30_000


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({}, id="no-slurm"),
        pytest.param(without("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"), id="shell-of-sbatch"),
        pytest.param(
            without(SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1"), id="shell-of-salloc"
        ),
        pytest.param(without(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"), id="one-task"),
        pytest.param(without(RANK="2", WORLD_SIZE="4", LOCAL_RANK="2"), id="torchrun-in-a-task"),
    ],
)
def test_no_other_process_is_taken_for_a_task_of_srun(other: dict[str, str]):
    assert from_slurm(other) == {}


def test_the_tasks_of_a_step_meet_at_one_port_and_other_steps_at_another():
    ports = {
        (job, step): {
            from_slurm(without(SLURM_JOB_ID=job, SLURM_STEP_ID=step, SLURM_PROCID=task))[
                "MASTER_PORT"
            ]
            for task in ["0", "1", "15"]
        }
        for job in ("1234", "1235")
        for step in ("0", "1")
    }
    assert all(len(chosen) == 1 for chosen in ports.values())
    assert len(set.union(*ports.values())) == 4


NAME = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)
NUMBER = st.integers(0, 999).map(lambda n: f"{n:03d}")


@given(NAME, NUMBER, st.lists(NUMBER, max_size=3), st.sampled_from(",-"), st.lists(NAME))
def test_the_first_host_of_a_list(name: str, first: str, more: list[str], by: str, rest: list[str]):
    assert first_host(",".join([name, *rest])) == name
    bracket = by.join([first, *more])
    assert first_host(",".join([f"{name}[{bracket}]-ib", *rest])) == f"{name}{first}-ib"


def test_a_world_of_the_library_is_that_of_srun(ranks: Ranks):
    """Given nothing but Slurm's variables, when two processes open a World, then they are two."""
    assert ranks(place_under_srun, 2) == [(0, 2, 0, 1.0), (1, 2, 1, 1.0)]


def place_under_srun() -> tuple[int, int, int, float]:
    import os

    import torch

    rank, port = os.environ.pop("RANK"), os.environ["MASTER_PORT"]
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        del os.environ[name]
    own = without("SLURM_STEP_NODELIST", SLURM_JOB_NODELIST="localhost", SLURM_PROCID=rank)
    os.environ |= {**own, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": port}
    here = World().open()
    try:
        total = here.all_reduce(torch.tensor(float(here.rank)))
        return here.rank, here.size, here.local_rank, total.item()
    finally:
        here.close()


@pytest.mark.parametrize(("slurm", "device"), [(TASK, "cuda:0"), ({}, None)])
def test_a_task_that_is_shown_one_device_uses_it(
    slurm: dict[str, str], device: str | None, monkeypatch: pytest.MonkeyPatch
):
    """Given one visible device, when local rank 3 looks for its own, then it is that one if srun
    has chosen it, and a mistake under any other launcher."""
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)

    class OneGpu:
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 1)
        current_accelerator = staticmethod(lambda: world.torch.device("cuda"))

    monkeypatch.setattr(world.torch, "accelerator", OneGpu)
    if device is None:
        with pytest.raises(world.ConfigError, match="process 3 of this machine has no device"):
            world._device(3)
    else:
        assert str(world._device(3)) == device


@pytest.mark.parametrize(("count", "name"), environment._STARTS.items())
@pytest.mark.parametrize(
    ("times", "recorded", "expected"),
    [("1", "mine", True), ("0", "mine", False), ("1", "another", False), ("1", None, False)],
)
def test_a_restart_goes_on_with_what_it_has_begun_itself(
    count: str, name: str, times: str, recorded: Any, expected: bool, monkeypatch
):
    monkeypatch.setenv(count, times)
    monkeypatch.setenv(name, "mine")
    assert began_before_restart({} if recorded is None else {name: recorded}) is expected


@pytest.mark.parametrize(
    ("number", "groups", "told"),
    [
        (None, "2", "REPLICA_GROUP_ID has to be a whole number of at least 0, and is 'not set'"),
        ("1", "two", "NUM_REPLICA_GROUPS has to be a whole number of at least 1, and is 'two'"),
        ("2", "2", "NUM_REPLICA_GROUPS=2 groups have the numbers 0 to 1"),
    ],
)
def test_a_replica_group_knows_which_it_is(
    number: str | None, groups: str, told: str, monkeypatch: pytest.MonkeyPatch
):
    assert environment.replica_group() is None
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://node1:29510")
    monkeypatch.setenv("REPLICA_GROUP_ID", "1")
    monkeypatch.setenv("NUM_REPLICA_GROUPS", "4")
    assert environment.replica_group() == ReplicaGroup("http://node1:29510", 1, 4)
    monkeypatch.setenv("NUM_REPLICA_GROUPS", groups)
    if number is None:
        monkeypatch.delenv("REPLICA_GROUP_ID")
    else:
        monkeypatch.setenv("REPLICA_GROUP_ID", number)
    with pytest.raises(ConfigError, match=told):
        environment.replica_group()

"""A process's rank in its run, in torchrun's environment variables, whatever the launcher.

The library, torch and users' own datasets read `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`
and `MASTER_PORT`. srun sets none of them, so its own variables are translated, once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paceline.errors import ConfigError, in_a_line
from paceline.world.orphans import signal_when_parent_dies

LAUNCHER = "PACELINE_LAUNCHER"
"""The environment variable that tells a worker the process that launched it."""

# Below the ports that Linux uses for outgoing connections (32768 and up).
_FIRST_PORT, _PORTS = 10_000, 20_000
_STARTS = {
    "TORCHELASTIC_RESTART_COUNT": "TORCHELASTIC_RUN_ID",
    "SLURM_RESTART_COUNT": "SLURM_JOB_ID",
}
"""Variables that count restarts, with the variables that identify what was restarted."""


def follow_launcher() -> bool:
    """Prepares a worker of `launch`: it stops cleanly if `launch` dies, and only rank 0 prints.

    Returns:
        Whether this process is a worker of `launch`, not of another launcher or none.
    """
    if os.environ.get("RANK", "0") != "0":
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
    if os.environ.get(LAUNCHER) != str(os.getppid()):
        return False
    signal_when_parent_dies(signal.SIGTERM)
    return True


def tell_launcher(error: BaseException) -> None:
    """Leaves a worker's error for `launch`, which tells it to the other machines.

    Args:
        error: with which this process ends.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None or LAUNCHER not in os.environ:
        return
    said = {"message": in_a_line(error), "timestamp": int(time.time())}
    with contextlib.suppress(OSError):
        Path(file).write_text(json.dumps(said))


def adopt_slurm() -> None:
    """Sets the variables that torchrun would have set, if this process is a task of srun.

    Does nothing under another launcher, in a step of one task, or in a shell of `salloc` or
    `sbatch`. A `MASTER_ADDR` or `MASTER_PORT` that is already set is kept.
    """
    for name, value in from_slurm(os.environ).items():
        os.environ.setdefault(name, value)


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of srun; empty for any other process.

    The tasks rendezvous on the host of task 0, the first of the step, at a port derived from job
    and step. Variables: https://slurm.schedmd.com/srun.html, "output environment variables".

    Args:
        environment: this process's variables.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment or not is_srun_task(environment):
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": _tasks(environment),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": first_host(nodes) or "localhost",
        "MASTER_PORT": str(_FIRST_PORT + (31 * job + step) % _PORTS),
    }


def is_srun_task(environment: Mapping[str, str]) -> bool:
    """Whether a process is one of several that srun started.

    A shell inside an allocation also has a rank and the job's number of tasks, but belongs to no
    step or, if `salloc` opens an interactive step, to a step of a single task.
    """
    return "SLURM_STEP_ID" in environment and int(_tasks(environment)) > 1


def _tasks(environment: Mapping[str, str]) -> str:
    # The step's number: the allocation may pass on the job's.
    return environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")


def first_host(nodes: str) -> str:
    """The first host in a list of Slurm's: `"gpu01"` for `"gpu[01-03,7],cpu2"`."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


@dataclass(frozen=True)
class ReplicaGroup:
    """A process's replica group in a run, in the variables of torchft's examples.

    Attributes:
        lighthouse: the address of torchft's lighthouse, through which the groups connect.
        number: this group's number, which no other group has.
        groups: the number of groups if all of them are up, into which each step's samples are
            split.
    """

    lighthouse: str
    number: int
    groups: int


def replica_group() -> ReplicaGroup | None:
    """This process's replica group; None if `TORCHFT_LIGHTHOUSE` is not set.

    Raises:
        ConfigError: it is set, but this group's number or the number of groups is not.
    """
    lighthouse = os.environ.get("TORCHFT_LIGHTHOUSE")
    if lighthouse is None:
        return None
    numbers: list[int] = []
    for name, least in (("REPLICA_GROUP_ID", 0), ("NUM_REPLICA_GROUPS", 1)):
        text = os.environ.get(name, "")
        if not text.isdecimal() or int(text) < least:
            raise ConfigError(
                f"TORCHFT_LIGHTHOUSE is set, so this is one of several replica groups: {name} has "
                f"to be a whole number of at least {least}, and is {text or 'not set'!r}. Unset "
                "TORCHFT_LIGHTHOUSE to train without them."
            )
        numbers.append(int(text))
    if numbers[0] >= numbers[1]:
        raise ConfigError(
            f"REPLICA_GROUP_ID={numbers[0]}: NUM_REPLICA_GROUPS={numbers[1]} groups have the "
            f"numbers 0 to {numbers[1] - 1}."
        )
    return ReplicaGroup(lighthouse, *numbers)


def refuse_replica_groups(what: str) -> None:
    """Checks that this process is not a replica group; groups can only train a single run.

    Args:
        what: the subject of the message, ending in an auxiliary verb ("`paceline preview` does").

    Raises:
        ConfigError: this process is a replica group.
    """
    if "TORCHFT_LIGHTHOUSE" in os.environ:
        raise ConfigError(
            f"TORCHFT_LIGHTHOUSE is set, and {what} not exist for replica groups: unset it."
        )


def began_before_restart(recorded: Mapping[str, str]) -> bool:
    """Whether a launcher restarted this process, and the run had started before that.

    Args:
        recorded: the environment variables in the run's record of its last start.
    """
    return any(
        int(os.environ.get(count, 0)) > 0 and recorded.get(name) == os.environ.get(name, "")
        for count, name in _STARTS.items()
    )

"""A process's place among those of its run, in torchrun's variables, whoever started it.

Everything reads `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT`: the library,
torch and users' own datasets. srun sets none of them, so its own variables are translated, once.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping

from paceline.errors import ConfigError
from paceline.world.orphans import signal_when_parent_dies

LAUNCHER = "PACELINE_LAUNCHER"
"""The environment variable by which a worker knows the process that launched it."""

# Below the ports that Linux gives to outgoing connections (32768 and up).
_FIRST_PORT, _PORTS = 10_000, 20_000
_STARTS = {
    "TORCHELASTIC_RESTART_COUNT": "TORCHELASTIC_RUN_ID",
    "SLURM_RESTART_COUNT": "SLURM_JOB_ID",
}
"""Variables that count restarts, and those that name what was restarted."""


def follow_launcher() -> bool:
    """In a worker: stop cleanly should `launch` die, and leave the printing to rank 0.

    Returns:
        Whether this process is a worker of `launch`, rather than of another launcher or of none.
    """
    if os.environ.get("RANK", "0") != "0":
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
    if os.environ.get(LAUNCHER) != str(os.getppid()):
        return False
    signal_when_parent_dies(signal.SIGTERM)
    return True


def adopt_slurm() -> None:
    """Gives this process the variables that torchrun would have set, if it is a task of srun.

    Does nothing under another launcher, in a step of one task, or in a shell of `salloc` or
    `sbatch`. A `MASTER_ADDR` or `MASTER_PORT` that is set already stays.
    """
    for name, value in from_slurm(os.environ).items():
        os.environ.setdefault(name, value)


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of srun; none for any other process.

    The tasks meet on the host of task 0, the first of the step's, at a port that follows from job
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

    A shell inside an allocation has a rank and the job's number of tasks too, but belongs to no
    step, or, where `salloc` opens an interactive step, to one of a single task.
    """
    return "SLURM_STEP_ID" in environment and int(_tasks(environment)) > 1


def _tasks(environment: Mapping[str, str]) -> str:
    # The step's number: the job's may come through from the allocation.
    return environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: `"gpu01"` for `"gpu[01-03,7],cpu2"`."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


def refuse_replica_groups() -> None:
    """Refuses to train as one of torchft's replica groups, each of which would train by itself.

    Raises:
        ConfigError: this process was told where their lighthouse is.
    """
    if "TORCHFT_LIGHTHOUSE" in os.environ:
        raise ConfigError(
            "TORCHFT_LIGHTHOUSE is set: fault-tolerant replica groups (torchft) do not exist yet. "
            "Unset it, and have a run that fails start again from its newest checkpoint "
            "(--max-restarts)."
        )


def began_before_restart(recorded: Mapping[str, str]) -> bool:
    """Whether this process was restarted, and a run was begun by it before that.

    Args:
        recorded: the variables that the run's record keeps from its last start.
    """
    return any(
        int(os.environ.get(count, 0)) > 0 and recorded.get(name) == os.environ.get(name, "")
        for count, name in _STARTS.items()
    )

"""`paceline train --slurm`: submits the command as a Slurm job, through submitit."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from paceline.errors import ConfigError, MissingExtraError
from paceline.exit_codes import DONE, STOPPED
from paceline.world.signals import LeaveAtOnce, handling


def submit(name: str, folder: Path, words: Sequence[str], settings: Sequence[str]) -> str:
    """Submits `paceline train ...` as a job, each of whose tasks is one process of the run.

    Args:
        name: the job's name, unless the settings give one.
        folder: where submitit writes the job's script, its pickled call and its output.
        words: this command's arguments; the job gets them without `--slurm`.
        settings: `key=value`, as submitit's `AutoExecutor.update_parameters` takes them.

    Returns:
        The job's id.

    Raises:
        ConfigError: a setting is malformed, or submitit does not know it.
        MissingExtraError: submitit is not installed.
    """
    try:
        import submitit  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise MissingExtraError(
            '--slurm needs the package submitit: pip install "paceline[slurm]".'
        ) from None
    try:
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster="slurm")
        executor.update_parameters(**{"name": name, **_parsed(settings)})
    # submitit's own message about an unknown name, type or value, or about a missing srun
    except (NameError, AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--slurm: {error}") from error
    return executor.submit(Job(_without_slurm(words))).job_id


def _without_slurm(words: Sequence[str]) -> tuple[str, ...]:
    kept = [word for word in words if not word.startswith("--slurm=")]
    while "--slurm" in kept:
        at = kept.index("--slurm")
        del kept[at : at + 2]
    return tuple(kept)


def _parsed(settings: Sequence[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(
                f"--slurm {setting}: it has to be KEY=VALUE, as submitit's parameters are named: "
                "nodes, tasks_per_node, gpus_per_node, cpus_per_task, timeout_min, "
                "slurm_partition ..."
            )
        parsed[key] = yaml.safe_load(value)
    return parsed


@dataclass(frozen=True)
class Job:
    """One task of the job: `paceline *words`, in this process.

    Slurm's warning before it preempts the job (submitit asks for SIGUSR2) is a clean stop, after
    which the job is requeued and resumes. SIGTERM, which `scancel` sends, is a clean stop for good.
    """

    words: tuple[str, ...]

    def __call__(self) -> None:
        """Trains.

        Raises:
            SystemExit: with the command's code, unless it is 0 or the job was requeued.
        """
        warned = False

        def pass_on(number: int, frame: object) -> None:
            nonlocal warned
            warned = True
            signal.raise_signal(signal.SIGUSR1)  # a clean stop for a run

        leave = LeaveAtOnce(lambda: warned and _requeue())
        with handling({signal.SIGUSR2: pass_on, signal.SIGUSR1: leave, signal.SIGTERM: leave}):
            argv, sys.argv = sys.argv, ["paceline", *self.words]
            try:
                runpy.run_module("paceline", run_name="__main__")
            except SystemExit as leaving:
                if leaving.code == STOPPED and warned:
                    _requeue()
                elif leaving.code not in (DONE, None):
                    raise
            finally:
                sys.argv = argv


def _requeue() -> None:
    """Requeues this job, from its first task; that ends all of its tasks."""
    if os.environ.get("SLURM_PROCID", "0") == "0":
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)

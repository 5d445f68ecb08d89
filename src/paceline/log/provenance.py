"""Where a run happens: versions, git state, hardware, environment variables."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# Variables that can change a result or explain a layout; none of them ever holds a secret.
RECORDED_ENVIRONMENT = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "LOCAL_WORLD_SIZE",
    "MKL_NUM_THREADS",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_ID",
    "TORCHELASTIC_RUN_ID",
    "WORLD_SIZE",
)


def versions() -> dict[str, str | None]:
    """Versions of the packages that a result depends on; None for one that is not installed."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "paceline", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # e.g. run from a source tree
            found[package] = getattr(sys.modules.get(package), "__version__", None)
    found["platform"] = platform.platform()
    return found


def git_state(folder: Path | str | None = None, timeout: float = 5.0) -> dict[str, Any] | None:
    """The repository around `folder`: `{"commit", "branch", "dirty"}`, or None outside of one.

    Args:
        folder: where to look; the working directory by default.
        timeout: seconds to wait for a slow disk or file server.

    Returns:
        `commit` is None before the first commit and `branch` is None on a detached head; `dirty`
        ignores untracked files, since a run's own folder is usually untracked.
    """
    command = ["git", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        answer = subprocess.run(
            command,
            cwd=folder,
            # Without optional locks this does not disturb a commit made at the same moment.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.splitlines()
    header = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# "))
    commit, branch = header.get("branch.oid"), header.get("branch.head")
    return {
        "commit": None if commit == "(initial)" else commit,
        "branch": None if branch == "(detached)" else branch,
        "dirty": any(not line.startswith("# ") for line in lines),
    }


def hardware() -> dict[str, Any]:
    """This machine: `cpu`, `cores` (usable, of all), `memory_bytes`, `threads`, `devices`."""
    import torch

    devices: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(index)
            devices.append({"name": seen.name, "memory_bytes": seen.total_memory})
    elif torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        devices = [{"name": str(kind)} for _ in range(torch.accelerator.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": {"usable": _usable_cores(), "all": os.cpu_count()},
        "memory_bytes": _memory(),
        "threads": torch.get_num_threads(),
        "devices": devices,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    # A container or a batch system often grants fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None

"""Doctor: checks what this machine offers a run."""

from __future__ import annotations

import locale
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from paceline.checkup.preflight import alone
from paceline.checkup.report import Check, Report, readable_bytes, readable_seconds
from paceline.log.provenance import hardware

_LITTLE_DISK = 10**9
_LITTLE_SHARED_MEMORY = 256 * 10**6
_FEW_FILES = 1024
_SLOW_FSYNC = 1.0  # seconds
_FOR_DEVELOPERS = "dev"


def doctor(*, self_test: bool = True) -> Report:
    """Checks the machine.

    Args:
        self_test: also train a few tiny runs in a temporary folder, to test the promises on this
            machine. Takes seconds.

    Raises:
        ConfigError: this process is one of several.
    """
    alone("doctor")
    looks: list[Callable[[], list[Check]]] = [
        _software, _processors, _distributed, _disk, _encoding, _shared_memory, _open_files, extras,
    ]  # fmt: skip
    report = Report([check for look in looks for check in look()])
    if self_test:
        from paceline.checkup.selftest import self_tests

        report.checks += self_tests()
    return report


def _software() -> list[Check]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    return [
        Check("Python", "PASS", f"{platform.python_version()} at {sys.executable}"),
        Check("Paceline", "PASS", metadata.version("paceline")),
        Check("torch", "PASS", f"{torch.__version__}, built for {build}"),
    ]


def _processors() -> list[Check]:
    found = hardware()
    cores, threads = found["cores"], found["threads"]
    detail = f"{found['cpu']}; {cores['usable']} of {cores['all']} cores usable, {threads} threads"
    many = cores["usable"] is not None and threads > cores["usable"]
    hint = "; more threads than cores slow each other down: set OMP_NUM_THREADS" if many else ""
    memory = found["memory_bytes"]
    checks = [Check("CPU", "WARN" if many else "PASS", detail + hint)]
    if memory is not None:
        checks.append(Check("memory", "PASS", readable_bytes(memory)))
    for index, device in enumerate(found["devices"]):
        size = device.get("memory_bytes")
        text = device["name"] + (f", {readable_bytes(size)}" if size else "")
        checks.append(Check(f"device {index}", "PASS", text))
    if not found["devices"]:
        checks.append(Check("device", "PASS", "no accelerator: runs compute on the CPU"))
    return checks


def _distributed() -> list[Check]:
    if not dist.is_available():
        text = "torch was built without torch.distributed: runs take one process"
        return [Check("distributed", "WARN", text)]
    backends = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }
    there = [name for name, available in backends.items() if available]
    absent = [name for name, available in backends.items() if not available]
    needed = ["gloo"] + (["nccl"] if torch.cuda.is_available() else [])
    missing = [name for name in needed if not backends[name]]
    detail = f"{', '.join(there) or 'no back end'}; not in this build: {', '.join(absent) or '-'}"
    if missing:
        return [Check("distributed", "WARN", f"{detail}; several processes need {missing[0]}")]
    return [Check("distributed", "PASS", detail)]


def _disk() -> list[Check]:
    """The folder that runs are written to by default, and whether it can be written and synced."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    little = "; little for checkpoints" if free < _LITTLE_DISK else ""
    checks = [
        Check(
            "disk", "WARN" if little else "PASS", f"{readable_bytes(free)} free in {here}{little}"
        )
    ]
    try:
        seconds = _fsync_seconds(here)
    except OSError as error:
        text = f"nothing can be written and synced in {here}: {error}"
        return [*checks, Check("fsync", "WARN", text)]
    slow = "; slow: checkpoints have to wait for it" if seconds > _SLOW_FSYNC else ""
    detail = f"1 MB written and synced in {readable_seconds(seconds)}{slow}"
    return [*checks, Check("fsync", "WARN" if slow else "PASS", detail)]


def _fsync_seconds(folder: Path) -> float:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(10**6))
        file.flush()
        start = time.perf_counter()
        os.fsync(file.fileno())
        return time.perf_counter() - start


def _encoding() -> list[Check]:
    names = {
        "files": locale.getpreferredencoding(False),
        "file names": sys.getfilesystemencoding(),
        "output": getattr(sys.stdout, "encoding", None) or "unknown",
    }
    other = [what for what, name in names.items() if name.lower().replace("-", "") != "utf8"]
    detail = ", ".join(f"{what} {name}" for what, name in names.items())
    if other:
        detail += "; set PYTHONUTF8=1 or a UTF-8 locale"
    return [Check("encoding", "WARN" if other else "PASS", detail)]


def _shared_memory(folder: Path = Path("/dev/shm")) -> list[Check]:
    if not folder.is_dir():
        return [Check("shared memory", "SKIP", f"there is no {folder} on this system")]
    size = shutil.disk_usage(folder).total
    detail = f"{readable_bytes(size)} in {folder}, through which loader workers pass batches"
    if size < _LITTLE_SHARED_MEMORY:
        detail += "; little (in a container: --shm-size or --ipc=host)"
        return [Check("shared memory", "WARN", detail)]
    return [Check("shared memory", "PASS", detail)]


def _open_files() -> list[Check]:
    try:
        import resource  # absent on Windows
    except ImportError:
        return [Check("open files", "SKIP", "this system has no such limit")]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FEW_FILES:
        detail = f"at most {soft}; loader workers take many: ulimit -n {min(hard, 4096)}"
        return [Check("open files", "WARN", detail)]
    return [Check("open files", "PASS", f"at most {soft} ({hard} if asked for)")]


def extras() -> list[Check]:
    """Paceline's optional extras, and how to install those that are missing."""
    about = metadata.metadata("paceline")
    required = [Requirement(text) for text in metadata.requires("paceline") or []]
    checks = []
    for extra in about.get_all("Provides-Extra") or []:
        wanted = [r for r in required if r.marker and r.marker.evaluate({"extra": extra})]
        wanted = [r for r in wanted if not _always(r) and r.name != "paceline"]
        missing = [str(r.name) + str(r.specifier) for r in wanted if not _is_there(r)]
        if not missing:
            there = ", ".join(r.name for r in wanted)
            checks.append(Check(f"extra {extra}", "PASS", f"installed: {there}"))
        elif extra != _FOR_DEVELOPERS:
            how = f"pip install 'paceline[{extra}]'"
            text = f"not installed: {', '.join(missing)}; {how} installs it"
            checks.append(Check(f"extra {extra}", "SKIP", text))
    return checks


def _always(requirement: Requirement) -> bool:
    """Whether a requirement with a marker (e.g. for a system) applies without any extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _is_there(requirement: Requirement) -> bool:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)

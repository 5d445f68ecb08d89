"""run.json: what a run was, where it ran, and why it stopped.

No secrets are written: values that look like credentials are masked wherever they occur, and only
the environment variables in `RECORDED_ENVIRONMENT` are kept.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import platform
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from paceline.log.floats import as_text, revived

RUN_FILE = "run.json"
FORMAT = 1
STATUSES = ("running", "complete", "stopped", "failed")
MASK = "***"
_MAX_RECORD = 16 << 20

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

_log = logging.getLogger(__name__)

# The END of a name makes it secret: `hf_token` and `apikey` are, `tokenizer` and `max_tokens` are
# not. Masking a harmless `sort_key` costs nothing; showing a secret would.
_SECRET_NAME = (
    r"[\w./@-]*(?:token|key|passwords?|passwd|passphrase|pwd|secrets?|credentials?|auth"
    r"|authorization|bearer)"
)
_SECRET_KEY = re.compile(_SECRET_NAME, re.IGNORECASE)
_SECRET_FLAG = re.compile(rf"-+{_SECRET_NAME}", re.IGNORECASE)
_SECRET_ASSIGNMENT = re.compile(rf"([-+~]*{_SECRET_NAME}\s*=).+", re.IGNORECASE | re.DOTALL)
_VALUE = r"(?:\"[^\"]*\"|'[^']*'|[^\s,;&}\]\"']+)"
_SECRET_INSIDE = re.compile(rf"(\b{_SECRET_NAME}[\"']?\s*=\s*){_VALUE}", re.IGNORECASE)
# After a colon only if it is certainly a field (`{token: x}`, `"api_key": "x"`, `password: x`): an
# error message that ends in "no such key: x" has to stay readable.
_SECRET_FIELD = re.compile(
    rf"((?:[{{,\"']\s*[\w.-]*(?:token|key)|\b\w+[_-](?:token|key)|\b[\w.-]*(?:passwords?|passwd"
    rf"|secrets?|authorization))[\"']?\s*:\s*(?:bearer\s+)?){_VALUE}",
    re.IGNORECASE,
)
_URL_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)
_KNOWN_TOKENS = re.compile(
    r"\b(?:hf_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abps]-|AKIA)[A-Za-z0-9_-]{12,}"
)


def mask_text(text: str) -> str:
    """`text` with logins in addresses, `secret=value` pairs and well-known tokens masked."""
    text = _URL_LOGIN.sub(rf"\g<1>{MASK}@", text)
    text = _SECRET_INSIDE.sub(rf"\g<1>{MASK}", text)
    text = _SECRET_FIELD.sub(rf"\g<1>{MASK}", text)
    return _KNOWN_TOKENS.sub(MASK, text)


def mask_command(argv: Sequence[str]) -> list[str]:
    """`argv` with the values of secret-looking options and overrides masked.

    Args:
        argv: a command line as in `sys.argv`; masks `--token x`, `--token=x` and `a.token=x`.
    """
    masked: list[str] = []
    secret_follows = False
    for word in argv:
        if secret_follows and not word.startswith("--"):
            masked.append(MASK)
        elif _SECRET_ASSIGNMENT.fullmatch(word):
            masked.append(_SECRET_ASSIGNMENT.sub(rf"\g<1>{MASK}", word))
        else:
            masked.append(mask_text(word))
        secret_follows = _SECRET_FLAG.fullmatch(word) is not None
    return masked


def masked(value: Any, name: str = "") -> Any:
    """Plain data with what looks like a credential masked.

    Args:
        value: mappings and lists of any depth. Strings pass through `mask_text`.
        name: the key at which `value` stands: a string at one that sounds secret is masked whole,
            unless it is an interpolation (`${oc.env:TOKEN}`).
    """
    if isinstance(value, str):
        secret = _SECRET_KEY.fullmatch(name) is not None and not value.startswith("${")
        return MASK if secret else mask_text(value)
    if isinstance(value, Mapping):
        return {str(key): masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, name) for item in value]
    return value


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A new text file that replaces `path` when the block ends without an error.

    After a crash, and for any reader, there is the old file or the new one, never a part of it.

    Raises:
        OSError: nothing was replaced.
    """
    # A fixed name: a file that a killed process left behind is overwritten.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` (a rename, a new file) durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunRecord:
    """Writes the `run.json` of one run folder. Only rank 0 may call it.

    The file holds the current start of the run at its top level and every earlier start, oldest
    first, in the list `starts`.

    Args:
        run_dir: the run folder, or None, in which case nothing is written.

    Attributes:
        record: the file's content (empty before `start`).
    """

    def __init__(self, run_dir: Path | str | None) -> None:
        self.path = None if run_dir is None else Path(run_dir) / RUN_FILE
        self.record: dict[str, Any] = {}

    def start(
        self,
        *,
        seed: int | None,
        plan: Sequence[Any] = (),
        world_size: int = 1,
        argv: Sequence[str] | None = None,
        fresh: bool = False,
        **fields: Any,
    ) -> None:
        """Writes the record of a run that starts or resumes, with status "running".

        Args:
            seed: the run's seed.
            plan: the plan's lines as plain data (`Plan.as_list()`).
            world_size: processes in the run.
            argv: the command; by default this process's own, interpreter and `-m` included.
            fresh: discard the starts of an earlier run in the same folder.
            **fields: more top-level fields, as in `update`.

        Raises:
            OSError: the file cannot be written.
        """
        if self.path is None:
            return
        starts = [] if fresh else self._earlier_starts()
        command = list(sys.orig_argv if argv is None else argv)
        self.record = {
            "format": FORMAT,
            **masked(fields),
            "status": "running",
            "stopped_by": None,
            "started": _now(),
            "ended": None,
            "command": mask_command(command),
            "folder": os.getcwd(),
            "seed": seed,
            "world_size": world_size,
            "hostname": socket.gethostname(),
            "pid": os.getpid(),
            "versions": versions(),
            "git": git_state(),
            "hardware": hardware(),
            "environment": {k: os.environ[k] for k in RECORDED_ENVIRONMENT if k in os.environ},
            "plan": masked(list(plan)),
            "starts": starts,
        }
        self._write()

    def update(self, **fields: Any) -> None:
        """Adds or changes top-level fields (plain JSON data), e.g. `best={"val/loss": 0.1}`.

        Raises:
            OSError: the file cannot be written.
        """
        if self.path is None:
            return
        self.record.update(masked(fields))
        self._write()

    def finish(self, status: str, stopped_by: str | None = None, **fields: Any) -> None:
        """Writes how the run ended.

        A failing disk is reported, not raised: this runs on every exit path, and must not replace
        the error that led there.

        Args:
            status: "complete", "stopped" or "failed".
            stopped_by: the reason in words, e.g. "epochs", "SIGTERM", "NonFiniteError: ...".
            **fields: more top-level fields, as in `update`.
        """
        if status not in STATUSES:
            raise ValueError(f"no such status: {status!r}; one of {', '.join(STATUSES)}")
        if self.path is None or not self.record:
            return
        try:
            self.update(status=status, stopped_by=stopped_by, ended=_now(), **fields)
        except OSError as error:
            _log.warning(
                "%s could not be written (%s): it does not record that the run is %s",
                self.path,
                error,
                status,
            )

    def _earlier_starts(self) -> list[dict[str, Any]]:
        assert self.path is not None
        try:
            old = json.loads(self.path.read_text(encoding="utf-8"))
            starts = list(old.pop("starts", []))
        except FileNotFoundError:
            return []
        except (ValueError, AttributeError, TypeError) as error:
            aside = self.path.with_name("run.damaged.json")
            os.replace(self.path, aside)
            _log.warning("%s is damaged (%s); set aside as %s", self.path, error, aside.name)
            return []
        if old.get("status") == "running":
            old["status"] = "failed"
            old["stopped_by"] = "unknown: the process was killed, or the machine went down"
        return [*starts, old]

    def _write(self) -> None:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = dict(self.record)
        if "metrics" in written:
            written["metrics"] = {name: as_text(v) for name, v in written["metrics"].items()}
        text = json.dumps(written, indent=2, default=str)
        with replacing(self.path) as file:
            file.write(text + "\n")


def regular(path: str, flags: int) -> int:
    """An `opener` for `open` that rejects links, and pipes that would block.

    For files of unknown origin.

    Args:
        path: the file to open.
        flags: as `open` passes them.

    Raises:
        OSError: it is not a regular file.
    """
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return handle


def read_run(run_dir: Path | str) -> dict[str, Any]:
    """The record in a run folder's `run.json`; nothing is imported or executed.

    Raises:
        OSError: it does not exist, or is not a regular file.
        ValueError: it is not a JSON object of a sensible size.
    """
    with open(Path(run_dir) / RUN_FILE, "rb", opener=regular) as file:
        text = file.read(_MAX_RECORD + 1)
    if len(text) > _MAX_RECORD:
        raise ValueError(f"it has more than {_MAX_RECORD} bytes")
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    if isinstance(metrics := record.get("metrics"), dict):
        record["metrics"] = {key: revived(value) for key, value in metrics.items()}
    return record


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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

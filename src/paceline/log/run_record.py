"""run.json: what a run was, where it ran, and why it stopped.

No secrets are written: values that look like credentials are masked wherever they occur, and only
the environment variables in `RECORDED_ENVIRONMENT` are kept.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paceline.log.files import replacing
from paceline.log.floats import as_text, revived
from paceline.log.provenance import RECORDED_ENVIRONMENT, git_state, hardware, versions
from paceline.log.secrets import mask_command, masked
from paceline.reading import patiently, read_file

RUN_FILE = "run.json"
FORMAT = 1
PRUNED = "pruned"
"""The status of a run that a study has ended since others are better; it is the reason too."""
STATUSES = ("running", "complete", PRUNED, "stopped", "failed")
_MAX_RECORD = 16 << 20

_log = logging.getLogger(__name__)


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
        self._starts: list[dict[str, Any]] | None = None

    def open(self) -> None:
        """Reads what earlier starts have left; before anything else of the run is changed.

        Raises:
            OSError: a damaged file cannot be moved aside.
            UnreadableError: the file could not be read.
        """
        self._starts = self._earlier_starts()

    @property
    def was_complete(self) -> bool:
        """Whether the last start has brought the run to its end."""
        ended = ("complete", PRUNED)
        return bool(self._starts) and self._starts[-1].get("status") in ended

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
            UnreadableError: an earlier one could not be read.
        """
        if self.path is None:
            return
        if self._starts is None:
            self.open()
        starts = [] if fresh else self._starts
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
            status: "complete", "pruned", "stopped" or "failed".
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
        if self.path is None:
            return []
        try:
            old = patiently(lambda: _read(self.path))
            starts = list(old.pop("starts", []))
        except FileNotFoundError:
            return []
        except (ValueError, TypeError) as error:
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
        if isinstance(written.get("best"), float):
            written["best"] = as_text(written["best"])
        text = json.dumps(written, indent=2, default=str)
        with replacing(self.path) as file:
            file.write(text + "\n")


def read_run(run_dir: Path | str) -> dict[str, Any]:
    """The record in a run folder's `run.json`; nothing is imported or executed.

    Raises:
        OSError: it does not exist, or is not a regular file.
        ValueError: it is not a JSON object of a sensible size.
    """
    record = _read(Path(run_dir) / RUN_FILE)
    if isinstance(metrics := record.get("metrics"), dict):
        record["metrics"] = {key: revived(value) for key, value in metrics.items()}
    if "best" in record:
        record["best"] = revived(record["best"])
    return record


def _read(path: Path | None) -> dict[str, Any]:
    assert path is not None
    text = read_file(path, _MAX_RECORD, links=False)
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    return record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

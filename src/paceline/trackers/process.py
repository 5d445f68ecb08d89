"""Starts followers, and waits for them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.trackers.cursor import FOLDER, Cursor, read_cursor

_OFF = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")


class Following:
    """A follower in a process of its own.

    Args:
        folder: the run folder.
        name: of the tracker's files in `trackers/`.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def cursor(self) -> Cursor | None:
        """How far it has got, by its file."""
        return read_cursor(self.folder / FOLDER / f"{self.name}.json")

    @property
    def log(self) -> Path:
        """The file with what it and its library print."""
        return self.folder / FOLDER / self.name / "log.txt"

    def start(self, todo: Mapping[str, Any]) -> None:
        """Starts it. Terminal, signals and environment of this process stay its own.

        Args:
            todo: what it is to do, as plain data.

        Raises:
            OSError: no process can be started, or the log cannot be written.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if k not in _OF_RANKS} | _OFF
        ours = str(Path(__file__).resolve().parents[2])
        paths = [ours, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        command = [sys.executable, "-P", "-m", "paceline.trackers.follower"]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [*command, str(self.folder.resolve()), self.name],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self._tell(todo)

    def end(self, status: str) -> None:
        """Says how the run has ended: the follower sends what is left, and ends too.

        Args:
            status: of run.json.
        """
        self._tell({"status": status})
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    @property
    def has_failed(self) -> bool:
        """Whether its process has ended before everything was sent."""
        return self._process is None or self._process.poll() not in (None, 0)

    def wait(self, deadline: float) -> bool:
        """Waits until it has ended.

        Args:
            deadline: by `time.monotonic`.

        Returns:
            Whether it has sent everything.
        """
        if self._process is None:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(max(0.0, deadline - time.monotonic())) == 0
        # It continues by itself, and no one waits for it.
        self._process.returncode = 0
        return False

    def _tell(self, line: Mapping[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError):  # it has ended already
            self._process.stdin.write(json.dumps(line, default=str).encode() + b"\n")
            self._process.stdin.flush()

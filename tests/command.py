"""The command line in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


class Paceline:
    """Starts `paceline` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen] = []

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "paceline", *words],
            cwd=self.folder,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "NO_COLOR": "1",
                "TMPDIR": str(self.folder),  # a killed launcher cannot tidy up
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def __call__(self, *words: str, **environment: str) -> tuple[int, str, str]:
        """Runs a command to its end; returns its code, stdout and stderr."""
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

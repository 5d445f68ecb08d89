"""The command line in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra  # noqa: F401  imported here, so that forked commands need not

import paceline.recipe  # noqa: F401
from paceline.cli.main import main
from ranks import Ranks

LIMIT = 240.0  # seconds until a command that hangs is killed


class Paceline:
    """Runs `paceline` in a folder.

    A command that is only run to its end is forked from a helper that has done the imports. One
    that is to be signalled, starts processes itself or has an environment of its own is started as
    a shell would.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder = folder
        self.ranks = ranks
        self.started: list[subprocess.Popen] = []

    def torchrun(self, *words: str) -> tuple[int, str, str]:
        """Runs torchrun to its end, at a port that is free; returns its code, stdout and stderr."""
        process = self.start("--standalone", *words, module="torch.distributed.run")
        out, err = process.communicate(timeout=LIMIT)
        return process.returncode, out, err

    def start(self, *words: str, module: str = "paceline", **environment: str) -> subprocess.Popen:
        """Starts a command; what it prints is to be read by `communicate`."""
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=self.folder,
            env=self._environment(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def __call__(self, *words: str, **environment: str) -> tuple[int, str, str]:
        """Runs a command to its end; returns its code, stdout and stderr."""
        if "--nproc" in words or environment:  # which the interpreter reads as it starts
            process = self.start(*words, **environment)
            out, err = process.communicate(timeout=LIMIT)
            return process.returncode, out, err
        with TemporaryDirectory() as kept:
            asked = (self.folder, words, self._environment(environment), Path(kept))
            [outcome] = self.ranks.outcomes(be_paceline, 1, *asked, limit=LIMIT)
            assert outcome.code is not None, f"paceline {words} hung and was killed"
            out, err = (
                (Path(kept) / name).read_text(errors="replace") for name in ("stdout", "stderr")
            )
            return outcome.code, out, err + outcome.output

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        own = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        # A killed launcher cannot tidy up.
        return {**os.environ, **own, "TMPDIR": str(self.folder), **more}


def be_paceline(
    folder: Path, words: tuple[str, ...], environment: dict[str, str], kept: Path
) -> None:
    """Makes this forked process what `python -m paceline` would be."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["paceline", *words]
    sys.path.insert(0, str(folder))
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(kept / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    main()

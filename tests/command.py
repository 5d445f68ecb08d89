"""The command line in processes of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import hydra  # noqa: F401  imported here, so that forked commands need not

import paceline.recipe  # noqa: F401
from paceline.cli.main import main
from ranks import Ranks

LIMIT = 240.0  # seconds until a command that hangs is killed


class Paceline:
    """Runs `paceline` in a folder.

    A command that is only run to its end is forked from a helper that has done the imports; with
    `--nproc N` that makes N processes, which find what a launcher would tell them. One that is to
    be signalled or has an environment of its own is started as a shell would.
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
        if environment:  # which the interpreter reads as it starts
            process = self.start(*words, **environment)
            out, err = process.communicate(timeout=LIMIT)
            return process.returncode, out, err
        if "--nproc" not in words:
            return self.launch(*words)
        at = words.index("--nproc")
        kept, size = words[:at] + words[at + 2 :], int(words[at + 1])
        codes, outs, errors = zip(*self.together([kept] * size, _ranks(size)), strict=True)
        return next((code for code in codes if code), 0), outs[0], "".join(errors)

    def launch(self, *words: str) -> tuple[int, str, str]:
        """As a call, but what `--nproc` asks for is left to the launcher."""
        [ended] = self.together([words])
        return ended

    def together(
        self, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]] = ()
    ) -> list[tuple[int, str, str]]:
        """Runs commands at the same time, each to its end; the code, stdout and stderr of each.

        Args:
            commands: the words of each.
            environments: variables of each, beside the usual ones.
        """
        with TemporaryDirectory() as kept:
            more = environments or [{}] * len(commands)
            asked = (self.folder, commands, [self._environment(each) for each in more], Path(kept))
            ended = []
            size = len(commands)
            for rank, one in enumerate(self.ranks.outcomes(be_paceline, size, *asked, limit=LIMIT)):
                assert one.code is not None, f"paceline {commands[rank]} hung and was killed"
                out, err = (
                    (Path(kept) / f"{name}{rank}").read_text(errors="replace")
                    for name in ("stdout", "stderr")
                )
                ended.append((one.code, out, err + one.output))
            return ended

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        own = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        # A killed launcher cannot tidy up.
        return {**os.environ, **own, "TMPDIR": str(self.folder), **more}


def _ranks(size: int) -> list[dict[str, str]]:
    """What a launcher tells each of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["GLOO_SOCKET_IFNAME"] = "lo"
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def be_paceline(
    folder: Path,
    commands: Sequence[Sequence[str]],
    environments: Sequence[dict[str, str]],
    kept: Path,
) -> None:
    """Makes this forked process what `python -m paceline` would be."""
    rank = int(os.environ["RANK"])
    os.environ.clear()
    os.environ.update(environments[rank])
    os.chdir(folder)
    sys.argv = ["paceline", *commands[rank]]
    sys.path.insert(0, str(folder))
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(kept / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    main()

"""The command line in processes of its own."""

from __future__ import annotations

import atexit
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from paceline.cli.main import main
from paceline.testing import Ranks, Started, free_port
from paceline.world import signals

LIMIT = 240.0  # seconds until a command that hangs is killed
Ended = tuple[int, str, str]  # code, stdout, stderr


class Commands:
    """Commands under way, each in a process of its own.

    Attributes:
        pids: their process ids.
    """

    def __init__(self, started: Started, kept: Path) -> None:
        self.pids = started.pids
        self.signal = started.signal
        self._started = started
        self._kept = kept

    def each(self) -> list[Ended]:
        """Waits until all have ended."""
        outcomes, ended = self._started.wait(LIMIT), []
        for rank, one in enumerate(outcomes):
            assert one.code is not None, f"command {rank} of {len(outcomes)} hung and was killed"
            out, err = (
                (self._kept / f"{name}{rank}").read_text(errors="replace")
                for name in ("stdout", "stderr")
            )
            ended.append((one.code, out, err + one.output))
        shutil.rmtree(self._kept)
        return ended

    def end(self) -> Ended:
        """As one: the first code that is not 0, what the first printed, and all errors."""
        codes, outs, errors = zip(*self.each(), strict=True)
        return next((code for code in codes if code), 0), outs[0], "".join(errors)

    def close(self) -> None:
        """Kills those that nobody has waited for."""
        if not self._started.ended:
            self.signal(signal.SIGKILL)
            self.each()


class Paceline:
    """Runs `paceline` in a folder.

    A command is forked from a helper that has done the imports; with `--nproc N` that makes N
    processes, which find what a launcher would tell them.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder = folder
        self.ranks = ranks
        self._under_way: list[Commands] = []

    def __call__(self, *words: str, **environment: str) -> Ended:
        """Runs a command to its end; returns its code, stdout and stderr."""
        if "PYTHONPATH" in environment:  # read as an interpreter starts
            return self._interpreted("paceline", words, environment)
        return self.start(*words, **environment).end()

    def start(self, *words: str, **environment: str) -> Commands:
        """Starts a command, for tests that do something to it."""
        if "--nproc" not in words:
            return self.start_together([words], [environment])
        at = words.index("--nproc")
        kept, size = words[:at] + words[at + 2 :], int(words[at + 1])
        return self.start_together([kept] * size, [e | environment for e in _ranks(size)])

    def launch(self, *words: str) -> Ended:
        """As a call, but what `--nproc` asks for is left to the launcher."""
        return self.start_together([words]).end()

    def launch_together(self, commands: Sequence[Sequence[str]]) -> list[Ended]:
        """Launchers at the same time; the workers that they start are forked from them."""
        return self.start_together(commands, work=be_launcher).each()

    def together(
        self, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]] = ()
    ) -> list[Ended]:
        """Runs commands at the same time, each to its end; the code, stdout and stderr of each.

        Args:
            commands: the words of each.
            environments: variables of each, beside the usual ones.
        """
        return self.start_together(commands, environments).each()

    def start_together(
        self,
        commands: Sequence[Sequence[str]],
        environments: Sequence[dict[str, str]] = (),
        work: Callable[..., None] | None = None,
    ) -> Commands:
        """As `together`, without waiting."""
        kept, more = Path(mkdtemp()), environments or [{}] * len(commands)
        asked = (self.folder, commands, [self._environment(each) for each in more], kept)
        started = self.ranks.start(work or be_paceline, len(commands), *asked)
        under_way = Commands(started, kept)
        self._under_way.append(under_way)
        return under_way

    def torchrun(self, option: str, size: str, *words: str) -> Ended:
        """Runs `torchrun --nproc-per-node N` to its end; a script's ranks are forked."""
        if words[0] == "-m":
            words = ("--standalone", option, size, *words)
            return self._interpreted("torch.distributed.run", words, {})
        outcomes = self.ranks.outcomes(be_script, int(size), self.folder, words, limit=LIMIT)
        failed = any(one.code != 0 for one in outcomes)
        return int(failed), "", "".join(one.output for one in outcomes)

    def close(self) -> None:
        """Leaves nothing behind."""
        for commands in self._under_way:
            commands.close()

    def _interpreted(self, module: str, words: Sequence[str], environment: dict[str, str]) -> Ended:
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            cwd=self.folder,
            env=self._environment(environment),
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        return done.returncode, done.stdout, done.stderr

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        own = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        # A killed launcher cannot tidy up.
        return {**os.environ, **own, "TMPDIR": str(self.folder), **more}


def _ranks(size: int) -> list[dict[str, str]]:
    """What a launcher tells each of its processes."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["GLOO_SOCKET_IFNAME"] = "lo"
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def be_script(folder: Path, words: Sequence[str]) -> None:
    """Makes this forked rank what `python SCRIPT` would be."""
    os.chdir(folder)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


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
    for stream in (sys.stdout, sys.stderr):  # which were opened before this was said
        encoding = os.environ.get("PYTHONIOENCODING")
        stream.reconfigure(encoding=encoding, errors=stream.errors)  # pyright: ignore
    main()


def be_launcher(*asked: Any) -> None:
    """As `be_paceline`, for a launcher whose workers are forked from it: each of them would
    otherwise import torch anew, which takes longer than all that it does here."""
    subprocess_handler.Popen = Forked
    be_paceline(*asked)


class Forked(subprocess.Popen):
    """A new process of `python -m paceline WORDS`, but for what an interpreter does at its start.

    It has no file, handler or exit function of its parent's.
    """

    def _execute_child(self, args: Any, *more: Any) -> None:
        names = subprocess.Popen._execute_child.__code__.co_varnames[2:]  # pyright: ignore
        options = dict(zip(names, more, strict=False))
        self.pid = os.fork()
        self._child_created = True
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            for number in signals.STOPS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            signals._looking = False
            for file, number in ((options["c2pwrite"], 1), (options["errwrite"], 2)):
                if file != -1:
                    os.dup2(file, number)
            os.closerange(3, 4096)
            atexit._clear()
            for each in list(weakref.finalize._registry):  # pyright: ignore
                each.atexit = False
            os.environ.clear()
            os.environ.update(options["env"])
            sys.argv = ["paceline", *args[3:]]  # behind the interpreter, -m and paceline
            main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:  # noqa: BLE001  a fork must not go on as its parent
            traceback.print_exc()
        finally:
            threading._shutdown()  # pyright: ignore
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

"""Runs a function on several gloo ranks, each a process of its own, within a time limit.

A helper process that has done the imports forks the ranks, so that starting one costs
milliseconds. A rank is as good as new: the helper has joined no group, drawn no random number that
counts, and started no thread. A rank runs its exit handlers but leaves the interpreter as it is:
taking a forked one to pieces would cost two seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pickle
import pkgutil
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

LIMIT = 60.0  # seconds until ranks that hang are killed


@dataclass
class Outcome:
    """What came of one rank.

    Attributes:
        code: its exit code; minus a signal's number; None if it was killed for taking too long.
        value: what the function returned.
        output: what it printed, errors included.
        seconds: how long it lived.
    """

    code: int | None
    value: Any
    output: str
    seconds: float


def free_port() -> int:
    """A port of this machine at which nobody listens.

    Not one of those that the system hands out by itself, which another test's ranks could be given
    before anybody listens here.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


class RanksFailed(AssertionError):
    """A rank failed or hung; the message has the output of those that did."""


class Started:
    """Ranks that are under way.

    Attributes:
        pids: their process ids, by rank.
    """

    def __init__(self, ranks: Ranks, pids: list[int]) -> None:
        self.pids = pids
        self._ranks = ranks
        self._outcomes: list[Outcome] | None = None

    @property
    def ended(self) -> bool:
        """Whether somebody has waited for them."""
        return self._outcomes is not None

    def signal(self, number: int) -> None:
        """Sends a signal to each, as a launcher would."""
        for pid in self.pids:
            os.kill(pid, number)

    def wait(self, limit: float) -> list[Outcome]:
        """How each ended; those that take longer than so many seconds are killed."""
        if self._outcomes is None:
            self._outcomes = self._ranks.ask(("wait", self.pids, limit))
        return self._outcomes


class Ranks:
    """Starts ranks through one helper process.

    Attributes:
        mutant: the name of a defect (`mutants.py`) to put into every rank, or None.
        limit: seconds until ranks that hang are killed.
    """

    def __init__(self) -> None:
        self._helper: subprocess.Popen[bytes] | None = None
        self.mutant: str | None = None
        self.limit = LIMIT

    def __call__(self, function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        """Each rank's return value of `function(*args)`.

        Raises:
            RanksFailed: a rank did not leave with code 0.
        """
        outcomes = self.outcomes(function, size, *args)
        failed = {rank: one for rank, one in enumerate(outcomes) if one.code != 0}
        if failed:
            parts = [
                f"rank {rank} of {size} "
                + ("hung and was killed" if one.code is None else f"left with code {one.code}")
                + f" after {one.seconds:.1f} s:\n{one.output}"
                for rank, one in failed.items()
            ]
            raise RanksFailed("\n".join(parts))
        return [one.value for one in outcomes]

    def outcomes(
        self, function: Callable[..., Any], size: int, *args: Any, limit: float | None = None
    ) -> list[Outcome]:
        """How each rank ended, for tests in which some are meant to fail.

        Args:
            function: what each of them calls; importable by its name.
            size: number of ranks.
            args: its arguments.
            limit: in place of the attribute.
        """
        return self.start(function, size, *args).wait(self.limit if limit is None else limit)

    def start(self, function: Callable[..., Any], size: int, *args: Any) -> Started:
        """Starts ranks and leaves them to themselves, for tests that do something to them."""
        name = (function.__module__, function.__qualname__)
        pids = self.ask(("start", sys.path, name, pickle.dumps(args), size, self.mutant))
        return Started(self, pids)

    def ask(self, request: tuple[Any, ...]) -> Any:
        """The helper's answer."""
        if self._helper is None:
            self._helper = _start_helper()
        assert self._helper.stdin is not None
        assert self._helper.stdout is not None
        try:
            _send(self._helper.stdin, request)
            return _receive(self._helper.stdout)
        except BaseException:  # a test's time limit: the answer would be taken for the next one's
            self.close()
            raise

    def close(self) -> None:
        """Ends the helper."""
        if self._helper is not None:
            assert self._helper.stdin is not None
            self._helper.stdin.close()
            assert self._helper.stdout is not None
            self._helper.stdout.read()  # what nobody waits for any more
            self._helper.wait(10)
            self._helper.stdout.close()
            self._helper = None


def _start_helper() -> subprocess.Popen[bytes]:
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


def _send(pipe: BinaryIO, thing: Any) -> None:
    data = pickle.dumps(thing)
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def _receive(pipe: BinaryIO) -> Any:
    size = pipe.read(8)
    if len(size) < 8:
        raise EOFError("the helper process is gone")
    return pickle.loads(pipe.read(int.from_bytes(size, "little")))  # noqa: S301  our own process


# In the helper


def _serve() -> None:
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    gc.disable()  # until a rank begins: what is imported stays
    _import_what_is_slow()
    under_way: dict[tuple[int, ...], Path] = {}  # folders by the ranks' process ids
    while True:
        try:
            verb, *request = _receive(requests)
        except EOFError:
            for pids, folder in under_way.items():  # nobody has waited for
                _wait(pids, folder, 0)
                shutil.rmtree(folder)
            return
        if verb == "wait":
            pids, limit = request
            folder = under_way.pop(tuple(pids))
            _send(replies, _wait(pids, folder, limit))
            shutil.rmtree(folder)
            continue
        path, (module, name), args, size, mutant = request
        sys.path[:] = path
        importlib.import_module(module)
        gc.collect()
        gc.freeze()  # a rank's collections would otherwise touch, and so copy, all of this memory
        folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        pids = _fork(size)
        if isinstance(pids, int):  # a rank
            return _be_a_rank(pids, folder, module, name, args, mutant)
        under_way[tuple(pids)] = folder
        _send(replies, pids)


def _import_what_is_slow() -> None:
    """All that ranks and commands import as they go, which each would otherwise do anew."""
    import torch
    import torch.distributed.checkpoint
    from hydra.core.plugins import Plugins

    import paceline

    for module in pkgutil.walk_packages(paceline.__path__, "paceline."):
        if module.name != "paceline.__main__":
            importlib.import_module(module.name)
    # Of the recipes on digits, and of whoever compiles.
    for name in ("sklearn.datasets", "sklearn.model_selection", "functorch.compile", "networkx"):
        importlib.import_module(name)
    Plugins.instance()  # imports Hydra's
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    torch.optim.AdamW([parameter]).step()  # imports torch._dynamo
    for library in list(weakref.finalize._registry):  # pyright: ignore[reportAttributeAccessIssue]
        library.atexit = False  # torch's operators: each rank would take them to pieces, and leaves


def _fork(size: int) -> list[int] | int:
    """The ranks' process ids; in a rank, its number."""
    os.environ["MASTER_PORT"] = str(free_port())
    os.environ["WORLD_SIZE"] = str(size)
    pids: list[int] = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            return rank
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # so that its loader workers can be killed with it
        pids.append(pid)
    return pids


def _be_a_rank(
    rank: int, folder: Path, module: str, name: str, args: bytes, mutant: str | None
) -> None:
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    output = os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if mutant is not None:
        importlib.import_module("mutants").apply(mutant)
    code = 0
    gc.enable()
    try:
        value = getattr(sys.modules[module], name)(*pickle.loads(args))  # noqa: S301  our own
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(value))
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # noqa: BLE001  as the interpreter would
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pids: Sequence[int], folder: Path, limit: float) -> list[Outcome]:
    start = time.monotonic()
    ended: dict[int, tuple[int | None, float]] = {}
    while len(ended) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    seconds = time.monotonic() - start
                    ended[rank] = os.waitstatus_to_exitcode(status), seconds
        if time.monotonic() - start > limit:
            for rank, pid in enumerate(pids):
                if rank not in ended:
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    ended[rank] = None, time.monotonic() - start
        time.sleep(0.005)
    return [_outcome(rank, *ended[rank], folder) for rank in range(len(pids))]


def _outcome(rank: int, code: int | None, seconds: float, folder: Path) -> Outcome:
    output, value = folder / f"{rank}.txt", folder / f"{rank}.pickle"
    return Outcome(
        code,
        pickle.loads(value.read_bytes()) if value.exists() else None,  # noqa: S301  our own
        output.read_text(errors="replace") if output.exists() else "",
        seconds,
    )


if __name__ == "__main__":
    sys.modules["ranks"] = sys.modules["__main__"]  # one Outcome class for both ends
    Outcome.__module__ = "ranks"
    _serve()

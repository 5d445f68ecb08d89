"""Several ranks on one machine: gloo processes that run a function within a time limit.

A helper process imports torch and Paceline once and forks the ranks, so that starting one takes
milliseconds. A rank is as good as a new process: the helper has not joined a process group, seeded
anything or started a thread.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

LIMIT = 60.0  # seconds until ranks that hang are killed
_SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    "MASTER_ADDR": "127.0.0.1",
    "CUDA_VISIBLE_DEVICES": "",  # gloo on the CPU, whatever there is
    "HIP_VISIBLE_DEVICES": "",
}


class RanksFailed(AssertionError):
    """A rank raised an error or hung; the message has the output of those that did."""


@dataclass
class Outcome:
    """How one rank ended.

    Attributes:
        code: its exit code; minus the signal's number if a signal ended it; None if it hung.
        value: what the function returned, None if it did not return.
        output: what it printed, errors included; if it hung, also the stack of each thread.
        seconds: how long it ran.
    """

    code: int | None
    value: Any
    output: str
    seconds: float


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, limit: float = LIMIT
) -> list[Any]:
    """Runs a function on several ranks, each in a new process, and returns what each returned.

    The ranks have the environment variables that a launcher sets (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), so Trainers in them train together. They compute on the CPU.

    Args:
        function: defined at the top level of a module, which the ranks import; or a
            `functools.partial` of such a function.
        size: number of ranks.
        args: its arguments, the same on each rank. They are copied, and so is what it returns.
        limit: seconds after which ranks that still run are killed.

    Raises:
        RanksFailed: a rank did not exit with code 0 in time.
        TypeError: the function cannot be imported by its name.
        NotImplementedError: this system cannot fork processes (Windows).
    """
    return shared_ranks()(function, size, *args, limit=limit)


@functools.cache
def shared_ranks() -> Ranks:
    """The `Ranks` behind `run_ranks`, whose helper process ends with this one."""
    ranks = Ranks()
    atexit.register(ranks.close)
    return ranks


class Ranks:
    """Starts ranks through one helper process: for tests in which ranks fail or get signals.

    Attributes:
        preload: modules that the helper imports before the first rank, which each rank would
            otherwise import anew.
        limit: seconds after which ranks that still run are killed, unless a call says otherwise.
    """

    def __init__(self, preload: Sequence[str] = (), limit: float = LIMIT) -> None:
        self.preload = list(preload)
        self.limit = limit
        self._helper: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __call__(
        self, function: Callable[..., Any], size: int, *args: Any, limit: float | None = None
    ) -> list[Any]:
        """Each rank's return value of `function(*args)`; as `run_ranks`.

        Raises:
            RanksFailed: a rank did not exit with code 0 in time.
        """
        outcomes = self.outcomes(function, size, *args, limit=limit)
        failed = {rank: one for rank, one in enumerate(outcomes) if one.code != 0}
        if failed:
            parts = [
                f"rank {rank} of {size} "
                + ("hung and was killed" if one.code is None else f"exited with code {one.code}")
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
        """Starts ranks and returns at once, for tests that send them signals, say.

        Args:
            function: what each of them calls; importable by its name.
            size: number of ranks.
            args: its arguments.

        Raises:
            RanksFailed: the function's module raises an error.
            TypeError: the function cannot be imported by its name.
        """
        module = getattr(function, "func", function).__module__  # a partial's is its function's
        if module == "__main__":
            raise TypeError(f"{function} is defined in __main__: move it into a module.")
        try:
            call = packed((function, args))
        except (AttributeError, TypeError) as error:
            raise TypeError(
                f"{function} or its arguments cannot be sent to new processes ({error}): use a "
                "function at the top level of a module, not a lambda or a nested one."
            ) from error
        answer = self._ask("start", sys.path, module, call, size)
        if isinstance(answer, str):
            raise RanksFailed(f"the ranks cannot import {module}:\n{answer}")
        return Started(self, answer)

    def close(self) -> None:
        """Ends the helper process, and kills ranks that nobody has waited for."""
        if self._helper is not None and self._connection is not None:
            self._connection.close()
            self._helper.wait(10)
            self._helper = self._connection = None

    def _ask(self, *request: Any) -> Any:
        """The helper's answer."""
        if self._connection is None:
            self._connection = self._start_helper()
        try:
            self._connection.send_bytes(packed(request))
            return unpacked(self._connection.recv_bytes())
        except BaseException:  # a test's time limit: the answer would be taken for the next one's
            self.close()
            raise

    def _start_helper(self) -> Connection:
        if not hasattr(os, "fork"):
            raise NotImplementedError("ranks need os.fork, which this system does not have.")
        ours, theirs = Pipe()
        program = f"from paceline.testing.rank_server import serve; serve({theirs.fileno()})"
        self._helper = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **_SETTINGS, "PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        ours.send_bytes(packed(self.preload))
        return ours


class Started:
    """Ranks that are running.

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
        """How each ended; after `limit` seconds those that still run are killed."""
        if self._outcomes is None:
            answers = self._ranks._ask("wait", self.pids, limit)
            self._outcomes = [
                Outcome(code, None if value is None else unpacked(value), output, seconds)
                for code, value, output, seconds in answers
            ]
        return self._outcomes


def free_port() -> int:
    """A port of this machine at which nobody listens.

    Not one of those that the system hands out by itself, which another process could be given
    before anybody listens here.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


class _ByValue(ForkingPickler):
    """Copies tensors as bytes: torch would share their memory, which ends with the sender."""

    _extra_reducers = {}


def packed(thing: Any) -> bytes:
    """An object as bytes, for another process of this test alone."""
    buffer = io.BytesIO()
    _ByValue(buffer, -1).dump(thing)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    """What `packed` was given, for bytes from a process of this test alone."""
    return ForkingPickler.loads(data)  # pyright: ignore[reportAttributeAccessIssue]

"""Starts the processes of a run on this machine, through torch's elastic agent."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch.distributed.elastic.rendezvous.registry as rendezvous
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.api import WorkerState as State
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters

from paceline.world.orphans import signal_when_parent_dies

PREEMPTED = 75
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHER = "PACELINE_LAUNCHER"
"""The environment variable by which a worker knows the process that launched it."""

# The agent ends the other ranks as soon as one has left. After a clean stop that is seconds
# apart; one that is stuck for longer than this is ended after all.
_LAST_RANKS_SECONDS = 60.0
_ELASTIC = "torch.distributed.elastic"


def launch(nproc: int, argv: Sequence[str]) -> int:
    """Runs `python -m paceline *argv` in `nproc` processes that form one world.

    A SIGTERM, SIGINT or SIGUSR1 to this process is passed on to the workers once; they may then
    take the time they need to save. Workers live in sessions of their own, so a Ctrl-C in the
    terminal reaches them only in this way; a second one is passed on too, and ends them at once.
    Failed workers are not restarted.

    Args:
        nproc: the number of processes.
        argv: the arguments of the `paceline` command.

    Returns:
        0 if all ranks finished, 75 if all stopped at a signal, else the code of the first rank that
        failed (1 if it was killed).
    """
    with tempfile.TemporaryDirectory(prefix="paceline-") as logs, _environment(nproc), _quiet():
        parameters = RendezvousParameters(
            backend="c10d",
            endpoint="localhost:0",  # a free port
            run_id=uuid.uuid4().hex,
            min_nodes=1,
            max_nodes=1,
            local_addr="localhost",
        )
        spec = WorkerSpec(
            role="rank",
            local_world_size=nproc,
            rdzv_handler=rendezvous.get_rendezvous_handler(parameters),
            entrypoint=sys.executable,
            # The agent fills in $-templates; an override's own ${...} must come through it.
            args=("-m", "paceline", *(word.replace("$", "$$") for word in argv)),
            max_restarts=0,
            monitor_interval=0.1,
            local_addr="localhost",
        )
        agent = _Agent(spec, logs_specs=DefaultLogsSpecs(log_dir=logs))
        try:
            with agent.forwarding():
                result: RunResult = agent.run()  # pyright: ignore[reportAssignmentType] - @prof hides it
        finally:
            spec.rdzv_handler.shutdown()
    return _answer(result.failures)


def follow_launcher() -> None:
    """In a worker: stop cleanly should the launcher die, and leave the printing to rank 0.

    Does nothing in a process that `launch` did not start.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or int(launcher) != os.getppid():
        return
    signal_when_parent_dies(signal.SIGTERM)
    if os.environ["RANK"] != "0":
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)


class _Agent(LocalElasticAgent):
    """torch's agent, which here passes signals on and lets a clean stop come to its end."""

    _pids: tuple[int, ...] = ()
    _received: int | None = None
    _first_left: float | None = None

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[None]:
        """While it lasts, the first signal to this process goes to every worker."""
        before = {number: signal.signal(number, self._on_signal) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        # Job schedulers repeat themselves; a second Ctrl-C means: leave at once.
        if self._received is None or number == signal.SIGINT:
            self._received = number
            self._forward()

    def _forward(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, self._received or signal.SIGTERM)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids: dict[int, Any] = super()._start_workers(worker_group)  # pyright: ignore
        self._pids = tuple(pids.values())
        if self._received is not None:  # it came before there was anybody to tell
            self._forward()
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = [_exit_code(pid) for pid in self._pids]
        if PREEMPTED in codes and None in codes and set(codes) <= {0, None, PREEMPTED}:
            self._first_left = self._first_left or time.monotonic()
            if time.monotonic() - self._first_left < _LAST_RANKS_SECONDS:
                return RunResult(state=State.HEALTHY)
        return super()._monitor_workers(worker_group)  # pyright: ignore


def _exit_code(pid: int) -> int | None:
    """A child's exit code (minus the signal's number if one killed it), or None while it runs.

    The child is left for the agent to wait for.
    """
    try:
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # the agent has done so already
        return 0
    if status is None:
        return None
    return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status


def _answer(failures: dict[int, ProcessFailure]) -> int:
    """The code of the whole, and a line on stderr for what went wrong."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    if not codes:
        return 0
    if set(codes.values()) == {PREEMPTED}:
        return PREEMPTED
    for rank, code in sorted(codes.items()):
        how = (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with code {code}"
        )
        print(f"paceline: rank {rank} {how}", file=sys.stderr)
    # In the order in which the agent saw them; those that it ended itself come last.
    failed = [code for code in codes.values() if code != PREEMPTED]
    return next((code for code in failed if code > 0), 1)


def _signal(number: int) -> str:
    return signal.Signals(number).name


@contextlib.contextmanager
def _environment(nproc: int) -> Iterator[None]:
    """What workers inherit: the launcher's id, and their share of the cores."""
    changes = {
        LAUNCHER: str(os.getpid()),
        # Else the agent takes our signals for itself and kills the workers after 30 seconds.
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        # Every process would otherwise take all cores, which slows all of them down.
        changes["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // nproc))
    before = {name: os.environ.get(name) for name in changes}
    quit_handler = signal.getsignal(signal.SIGQUIT)
    os.environ.update(changes)
    try:
        yield
    finally:
        signal.signal(signal.SIGQUIT, quit_handler)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The agent's own log lines say again, in other words, what the ranks and `launch` say."""
    noisy = (f"{_ELASTIC}.agent.server.api", f"{_ELASTIC}.multiprocessing.api")
    loggers = [logging.getLogger(name) for name in noisy]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

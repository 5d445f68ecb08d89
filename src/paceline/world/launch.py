"""Starts a run's processes on this machine through torch's elastic agent."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.api import WorkerState as State
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from paceline.errors import PacelineError
from paceline.exit_codes import STOPPED
from paceline.world.environment import LAUNCHER
from paceline.world.launchers import FailedElsewhereError, Launchers
from paceline.world.rendezvous import ONE_MACHINE, Rendezvous
from paceline.world.signals import LEFT, SAME, STOPS, LeaveAtOnce, handling

# The agent terminates the other ranks as soon as one has exited. After a clean stop ranks exit
# seconds apart; one that takes longer than this is terminated after all.
_LAST_RANKS_SECONDS = 60.0
_ELASTIC = "torch.distributed.elastic"


def launch(
    nproc: int,
    argv: Sequence[str],
    *,
    machines: Rendezvous = ONE_MACHINE,
    max_restarts: int = 0,
) -> int:
    """Runs `python -m paceline *argv` in `nproc` processes, which join those of other machines.

    A signal that stops a run is forwarded from this process to the workers once; they may then take
    as long as they need to save. Workers run in sessions of their own, so a Ctrl-C in the
    terminal reaches them only in this way; a second one is forwarded too, and ends them at once.

    Args:
        nproc: the number of processes on this machine.
        argv: the arguments of the `paceline` command.
        machines: how this launcher finds those of other machines.
        max_restarts: how often to restart all workers after one has failed. They resume from the
            newest checkpoint. A clean stop is not a failure.

    Returns:
        0 if all ranks of this machine finished, 75 if all stopped at a signal, else the code of the
        first rank that failed (1 if it was killed).

    Raises:
        PacelineError: the launchers of the machines did not find each other, or another one failed.
    """
    folder = tempfile.TemporaryDirectory(prefix="paceline-")
    with folder as logs, _environment(nproc, logs), _quiet():
        with _meeting(machines):
            launchers = Launchers(machines)
        spec = WorkerSpec(
            role="rank",
            local_world_size=nproc,
            rdzv_handler=launchers.handler,
            entrypoint=sys.executable,
            # The agent expands $-templates; an override's own ${...} has to survive it.
            args=("-m", "paceline", *(word.replace("$", "$$") for word in argv)),
            max_restarts=max_restarts,
            monitor_interval=0.1,
            local_addr=launchers.local_addr,
        )
        agent = _Agent(spec, logs_specs=DefaultLogsSpecs(log_dir=logs))
        agent.launchers = launchers
        agent.leave = LeaveAtOnce(partial(shutil.rmtree, logs, ignore_errors=True))
        try:
            with agent.forwarding(), _meeting(machines):
                result: RunResult | None = agent.run()  # pyright: ignore[reportAssignmentType] - @prof hides it
                if result is None:
                    raise PacelineError(
                        f"more than {machines.nnodes} launchers joined at {machines.endpoint}; "
                        "this one has started nothing."
                    )
                _report(result.failures)
                if machines.nnodes > 1 and _all_stopped(result.failures):
                    agent._exit_barrier()  # others may still need the store that lives here
                if result.failures and not _all_stopped(result.failures):
                    launchers.tell(_answer(result.failures), _why(result.failures))
        finally:
            launchers.handler.shutdown()
    return _answer(result.failures)


@contextlib.contextmanager
def _meeting(machines: Rendezvous) -> Iterator[None]:
    try:
        yield
    except FailedElsewhereError as failed:
        raise failed.error from None
    except RendezvousError as error:
        raise PacelineError(
            f"the launchers of {machines.nnodes} machines did not meet at {machines.endpoint} "
            f"({error}): is it the address of one of them, can the others reach it, and was the "
            "same command started on each?"
        ) from None


class _Agent(LocalElasticAgent):
    """torch's agent, but it forwards signals and lets a clean stop finish."""

    launchers: Launchers
    leave: LeaveAtOnce
    _forwarded: float | None = None
    _pids: tuple[int, ...] = ()
    _received: int | None = None
    _first_left: float | None = None
    _meets = False

    def forwarding(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the first signal to this process is forwarded to every worker."""
        listened = [n for n in STOPS if signal.getsignal(n) is not signal.SIG_IGN]
        return handling(dict.fromkeys(listened, self._on_signal))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._meets:  # there are no workers yet, and the other machines may never join
            self.leave(number, frame)
        # Job schedulers repeat signals; a second Ctrl-C means: exit at once.
        if self._received is None or number == signal.SIGINT:
            self._received = number
            self._forward()

    def _forward(self) -> None:
        self._forwarded = time.monotonic() if self._forwarded is None else -math.inf
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, self._received or signal.SIGTERM)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._meets = True
        try:
            if self._received is not None:  # it came before the rendezvous began
                self.leave(self._received, None)
            super()._rendezvous(worker_group)  # pyright: ignore
            self.launchers.have_met()
        finally:
            self._meets = False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._first_left = None
        pids: dict[int, Any] = super()._start_workers(worker_group)  # pyright: ignore
        self._pids = tuple(pids.values())
        if self._received is not None:  # it came before there were workers
            self._forward()
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        codes = [_exit_code(pid) for pid in self._pids]
        if STOPPED in codes and None in codes and set(codes) <= {0, None, STOPPED}:
            self._first_left = self._first_left or time.monotonic()
            if self._received is None and os.path.exists(os.environ[LEFT]):
                self._received = signal.SIGTERM  # as that one: it had nothing to save
                self._forward()
            if time.monotonic() - self._first_left < _LAST_RANKS_SECONDS:
                return RunResult(state=State.HEALTHY)
        result: RunResult = super()._monitor_workers(worker_group)  # pyright: ignore
        for failure in result.failures.values():
            # One that listens takes no notice of a second signal so soon: this one did not yet.
            early = time.monotonic() - (self._forwarded or -math.inf) < SAME
            if early and failure.exitcode == -(self._received or 0):
                failure.exitcode = STOPPED
        if result.state is State.FAILED and self._remaining_restarts > 0:
            if self._received is not None or _all_stopped(result.failures):
                self._remaining_restarts = 0
            else:
                _report(result.failures)
                print("paceline: restarting all ranks of this machine", file=sys.stderr)
        return result


def _exit_code(pid: int) -> int | None:
    """A child's exit code (minus the signal's number if one killed it), or None while it runs.

    The child is not reaped: the agent waits for it.
    """
    try:
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # the agent has already reaped it
        return 0
    if status is None:
        return None
    return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status


def _all_stopped(failures: dict[int, ProcessFailure]) -> bool:
    return bool(failures) and all(one.exitcode == STOPPED for one in failures.values())


def _report(failures: dict[int, ProcessFailure]) -> None:
    """Prints to stderr how the ranks that failed ended."""
    if _all_stopped(failures):
        return
    codes = {failure.exitcode for failure in failures.values()}
    for code in sorted(codes):
        ranks = sorted(rank for rank, failure in failures.items() if failure.exitcode == code)
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        how = f"exited with code {code}"
        if code < 0:
            how = f"{'were' if len(ranks) > 1 else 'was'} killed by {signal.Signals(-code).name}"
        print(f"paceline: {who} {how}", file=sys.stderr)


def _why(failures: dict[int, ProcessFailure]) -> str:
    """What the first rank that failed has said of its error, or else how it ended."""
    rank, first = min(failures.items(), key=lambda each: each[1].timestamp)
    if os.path.isfile(first.error_file):
        return f"rank {rank}: {first.message}"
    if first.exitcode < 0:
        return f"rank {rank} was killed by {signal.Signals(-first.exitcode).name}"
    return f"rank {rank} exited with code {first.exitcode}"


def _answer(failures: dict[int, ProcessFailure]) -> int:
    """The launcher's exit code."""
    if not failures:
        return 0
    if _all_stopped(failures):
        return STOPPED
    # In the order in which the agent saw them; those that it terminated itself come last.
    failed = [one.exitcode for one in failures.values() if one.exitcode != STOPPED]
    return next((code for code in failed if code > 0), 1)


@contextlib.contextmanager
def _environment(nproc: int, folder: str) -> Iterator[None]:
    """Sets the environment of workers: whose they are, and their share of the cores."""
    changes = {
        LAUNCHER: str(os.getpid()),
        LEFT: os.path.join(folder, "left"),
        # Else the agent handles our signals itself and kills the workers after 30 seconds.
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        # Every process would otherwise use all cores, which slows all of them down.
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
    """Silences the agent's own log lines, which repeat what the ranks and `launch` print."""
    noisy = ("agent.server.api", "multiprocessing.api", "rendezvous.dynamic_rendezvous")
    loggers = [logging.getLogger(f"{_ELASTIC}.{name}") for name in noisy]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

"""Several worker processes of one study: started, watched, started again, and stopped together."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from paceline.errors import ConfigError, PacelineError
from paceline.exit_codes import FAILED, STOPPED
from paceline.world.forks import spare_parents_garbage
from paceline.world.orphans import signal_when_parent_dies
from paceline.world.signals import STOPS, handling, leave_at_once_on_signals

Work = Callable[[], None]
Died = Callable[[int, str], bool]


class Workers:
    """Runs the same work in several processes until each has ended it.

    Workers are forked, so that they begin at once and may run any function. They are in sessions of
    their own: a signal to this process is passed on once to each, and they stop as a run does. If
    this process is killed, they are told to stop.

    Args:
        count: how many.
        work: what each of them does; it may leave with `SystemExit`.
        died: called here with the process id of a worker that was killed, and with what has
            happened to it; whether another takes its place.
    """

    def __init__(self, count: int, work: Work, died: Died) -> None:
        self._count = count
        self._work = work
        self._died = died
        self._processes: dict[Any, tuple[Any, Connection, int]] = {}
        self._signalled: int | None = None

    def run(self) -> int:
        """Starts them, and waits until all have ended.

        Returns:
            0, or 75 if they were stopped.

        Raises:
            ConfigError: a CUDA device is in use here, so that no process can be forked.
            PacelineError: one has failed; the others were stopped. Its message is that error.
        """
        import torch

        if torch.cuda.is_initialized():
            raise ConfigError(
                "workers are forked, which CUDA does not allow once a process has used a device: "
                "start the study before, or with `paceline tune --workers`."
            )
        spare_parents_garbage()
        failed: list[str] = []
        code = 0
        with self._forwarding():
            for place in range(self._count):
                self._start(place)
            while self._processes:
                for sentinel in wait(list(self._processes), timeout=1.0):
                    process, told, place = self._processes.pop(sentinel)
                    process.join()
                    ended, said = process.exitcode, _said(told)
                    if ended == 0:
                        continue
                    if ended == STOPPED:
                        code = STOPPED
                        self._stop()
                    elif said is not None:
                        failed.append(said)
                        self._stop()
                    elif self._died(process.pid, _how(ended)) and self._signalled is None:
                        self._start(place)
        if failed:
            raise PacelineError(failed[0])
        return STOPPED if self._signalled is not None else code

    def _start(self, place: int) -> None:
        told, telling = multiprocessing.Pipe(duplex=False)
        process: Any = multiprocessing.get_context("fork").Process(
            target=self._be_worker, args=(place, telling, os.getpid())
        )
        sys.stdout.flush()
        sys.stderr.flush()
        process.start()
        telling.close()
        self._processes[process.sentinel] = process, told, place
        if self._signalled is not None:
            self._pass_on(self._signalled)

    def _be_worker(self, place: int, telling: Connection, parent: int) -> None:
        """What a worker is, from the fork to its end."""
        os.setsid()
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        leave_at_once_on_signals()
        signal_when_parent_dies(signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(STOPPED)
        _share_machine(place, self._count)
        try:
            self._work()
        except Exception as error:  # noqa: BLE001  told in the parent
            shown = str(error) if isinstance(error, PacelineError) else traceback.format_exc()
            with contextlib.suppress(OSError):
                telling.send_bytes(shown.encode(errors="replace"))
            sys.exit(FAILED)

    @contextlib.contextmanager
    def _forwarding(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [n for n in STOPS if signal.getsignal(n) is not signal.SIG_IGN]
        with handling(dict.fromkeys(heard, self._on_signal)):
            yield

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Schedulers repeat signals; a second Ctrl-C means: leave at once.
        if self._signalled is None or number == signal.SIGINT:
            self._signalled = number
            self._pass_on(number)

    def _stop(self) -> None:
        """One has stopped or failed: so do the others."""
        if self._signalled is None:
            self._signalled = signal.SIGTERM
            self._pass_on(signal.SIGTERM)

    def _pass_on(self, number: int) -> None:
        for process, _, _ in list(self._processes.values()):
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)


def _said(told: Connection) -> str | None:
    """The error of a worker that has ended, if it has left one."""
    try:
        return told.recv_bytes().decode() if told.poll() else None
    except (EOFError, OSError):
        return None
    finally:
        told.close()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"left with code {code}"


def _share_machine(place: int, count: int) -> None:
    """Gives a worker its share of the cores, and one of several devices."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // count))
    devices = torch.cuda.device_count()
    if devices > 1:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = named.split(",") if named else [str(i) for i in range(devices)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[place % len(names)]

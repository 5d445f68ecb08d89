"""The agreement on stopping: one boundary, the same on every rank, without a collective per step.

Whoever wants to stop (a signal, a time limit, a stop file, a callback) writes a request to the
process group's store. A watcher thread on each rank sees it, freezes what this rank is committed to
and publishes it; the largest of all ranks is where all stop. A rank that passes a boundary pays for
a lock, and waits only once there is a request.

Nothing is saved, sent or agreed inside a signal handler: it sets a flag. A second signal leaves at
once (one that comes on the heels of the first is the same wish: launchers and schedulers pass a
signal on that the process has got already).

Why no rank is left behind. A run passes numbered points: `behind_window(s)`, which is 3s, says "s
windows are done"; `behind_boundary(s)`, 3s + 1, "and all parts of the boundary behind them";
`behind_draw(s)`, 3s + 2, "and the next window is drawn". A rank passes a point only in `reached`,
and is always committed to a point ahead of it. Under one lock
either the rank passes a point, which moves its commitment on, or the watcher freezes the commitment
for good and publishes it. So
1. before the agreement no rank gets beyond what it has published: once frozen, it waits at the next
   point it comes to, and for that point's sake nobody else: agreeing takes watchers only;
2. the largest published point therefore lies behind no rank, and the rank that published it is on
   its way there. Windows and the parts of a boundary follow from the step and from values that all
   ranks share, so every rank's way leads there;
3. every rank continues to that point and no further.
Passing 3s commits to 3s + 3, since most boundaries have no parts. When one has, `hold` lowers the
commitment to 3s + 1, where the run can stop as well: nobody has seen the higher one, or it is
frozen and stays. A validation under way is left when 3s + 1 is agreed on. That point has a number
of its own because another rank may still stand at 3s, and has to come into the boundary first.
The batch before which it is left is agreed on in the same way, the commitment being to a point and
a batch: models that are spread over ranks, and metrics, exchange something in each.

A training source of the user's own may take minutes to collect a window, each rank for as long as
it needs. Such a run can stop at 3s + 2 as well (`leaves_draws`): passing 3s or 3s + 1 commits to
it. Each rank ends its draw, whether it has its window or gave it up, in one exchange with the
others (`data/custom.py`), and only then comes to 3s + 2. Stopping there saves the boundary before,
with the data's state from before the draw.
4. A rank gives up its draw only once 3s + 2 is agreed on (`agreed_on`). By then no rank has passed
   that point, nor will one (1, 2, 3): none is in the step, where it could not come back from a
   collective. Each is on its way to the exchange or waits in it, so all complete it and stop.
5. A rank that never asks, or has its window already, comes to the exchange by itself.
6. If a rank passes 3s + 2 before its commitment is frozen, a later point is agreed on. Then no rank
   has given up its draw, and all take the step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from paceline.errors import CheckpointError, ConfigError, PeerError, PeerFailure
from paceline.exit_codes import FAILED, USAGE
from paceline.log.traceback import FIRST
from paceline.trainer.stall import StallReport
from paceline.world import meeting
from paceline.world.signals import ASKED, SAME, STOPS, LeaveAtOnce, leave
from paceline.world.world import World

STOP_FILE = "stop file"
_SIGNAL = "signal "  # before its name, in the reason
TO_BE_RESUMED = ("time limit", STOP_FILE)  # beside signals
_POLL = 0.1  # seconds between a watcher's looks
_PATIENCE = 120.0  # seconds to wait for the other ranks' word
_PEER_GRACE = 15.0  # seconds a rank may stay in a collective that a failed peer has left
_LINGER = 5.0  # seconds in which the others may read why rank 0, whose store it is, has failed
_NOT_BEGUN = -1  # the point of a rank that has not come to its first
_runs = 0  # agreements opened in this process's life, equal on all ranks


def behind_window(step: int) -> int:
    """The point at which `step` windows are done."""
    return 3 * step


def behind_boundary(step: int) -> int:
    """The point at which `step` windows are done, and all parts of the boundary behind them."""
    return 3 * step + 1


def behind_draw(step: int) -> int:
    """The point at which, besides, the next window is drawn: for sources of the user's own."""
    return 3 * step + 2


class StopAgreement:
    """Lets a run end at one agreed boundary.

    Args:
        world: the ranks that have to agree.
        stop_file: a path whose appearance asks for a stop, or None. Rank 0 looks for it.

    Attributes:
        reason: why the run stops, once that is agreed on.
        leaves_draws: whether the run can stop while it draws a window; equal on all ranks.
    """

    def __init__(self, world: World, stop_file: Path | None) -> None:
        global _runs
        _runs += 1
        meeting.begin()
        self._prefix = f"paceline/{_runs}/"
        self._world = world
        self._stop_file = stop_file if world.is_main else None
        self._request: str | None = None
        self._everywhere = False  # every rank has made the request, in the same window
        self._signalled_at: float | None = None
        self._frozen = False
        self._committed = _NOT_BEGUN  # the next point at which this rank could stop
        self._batch = 0  # ... and the validation batch before which it could on the way there
        self._stop_at: int | None = None
        self._stop_batch = 0
        self._lock = threading.Lock()
        self._agreed = threading.Event()
        self._closed = threading.Event()
        self._peer_failure: PeerFailure | None = None
        self._thread: threading.Thread | None = None
        self._store: Any = None  # the main thread's connection, while others may be gone
        self._handlers: dict[int, Any] = {}
        self._leaves_at_once = False  # where a signal finds that no rank has begun
        self.reason: str | None = None
        self.leaves_draws = False

    @property
    def wish(self) -> str | None:
        """Why a stop was asked for here, if it was."""
        return self._request

    @property
    def by_signal(self) -> bool:
        """Whether the run stops for a signal, to this rank or another."""
        return self.reason is not None and self.reason.startswith(_SIGNAL)

    @property
    def signalled(self) -> bool:
        """Whether a signal has come to this process, in time to stop the run or not."""
        return self._signalled_at is not None

    def clear_file(self) -> bool:
        """Removes the stop file if there is one; it asked another run than the one to come."""
        try:
            if self._stop_file is not None:
                self._stop_file.unlink()
                return True
        except OSError:  # mostly, there is none
            pass
        return False

    def listen(self, *, begun: bool = False) -> bool:
        """Listens for signals from now on; returns False beside the main thread, where nobody can.

        A signal that the process ignores (as a shell's background jobs do Ctrl-C), or that is
        handled outside of Python, is left alone. A command that exits at once on a signal
        still does so, on several ranks once they have agreed.

        Args:
            begun: whether training begins now.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        for number in STOPS:
            handler = signal.getsignal(number)
            leaves = isinstance(handler, LeaveAtOnce)
            self._leaves_at_once = self._leaves_at_once or leaves
            waits = leaves and not begun and self._world.size == 1
            own = number not in ASKED and handler is not signal.SIG_DFL and not leaves
            if not (waits or own or handler in (signal.SIG_IGN, None, self._on_signal)):
                self._handlers[number] = signal.signal(number, self._on_signal)
                if leaves and handler.came == number:  # as the ranks met, which all of them heed
                    self._on_signal(number, None)
        meeting.end()
        return True

    def watch(self, where: Callable[[], str]) -> None:
        """Starts the watcher, if there is work: from now on another rank's failure ends this one.

        To be called as soon as the ranks have met, in the thread that trains. What is asked for
        before `open` is agreed on at the first point.

        Args:
            where: says which step and batch this rank is at, for the report if it stalls.
        """
        self._store = self._world.store()
        if self._world.size > 1 or self._stop_file is not None:
            seen_by_watcher = self._world.store(), StallReport(self._world, self._prefix, where)
            self._thread = threading.Thread(
                target=self._watch, args=seen_by_watcher, name="paceline-stop", daemon=True
            )
            self._thread.start()

    def open(self, point: int) -> None:
        """The loop begins at `point`."""
        with self._lock:
            if not self._frozen:
                self._committed = point

    def unwatch(self) -> None:
        """Ends the watcher: from here on this rank needs no other."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Puts the signal handlers back and ends the watcher."""
        for number, handler in self._handlers.items():
            if isinstance(handler, LeaveAtOnce):
                handler.when = "after training"
            signal.signal(number, handler)
        self._handlers.clear()
        self.unwatch()
        self._store = None
        if self.reason == STOP_FILE:
            self.clear_file()

    def request(self, reason: str, *, everywhere: bool = False) -> None:
        """Asks for a stop; the first reason counts.

        Args:
            reason: for `Result.stopped_by`.
            everywhere: every rank asks in this same window, so that the next point will do.
        """
        if self._request is None:
            self._request = reason
        self._everywhere = self._everywhere or everywhere

    def reached(self, point: int) -> bool:
        """Whether to stop at `point`; if not, this rank continues and is committed to the next.

        Raises:
            PeerError: another rank has failed.
        """
        if self._world.size == 1:
            if self._request is None:
                return False
            self._agree(point, self._request)
            return True
        if self._peer_failure is not None:
            raise PeerError(self._peer_failure)
        with self._lock:
            if not self._frozen and not self._everywhere:
                step = point // 3
                drawn = behind_draw(step)
                ahead = self.leaves_draws and point < drawn
                self._committed, self._batch = drawn if ahead else behind_window(step + 1), 0
                return False
        return point >= self._wait()

    def agreed_on(self, point: int) -> bool:
        """Whether the run stops at `point`; nothing is waited for, and no point is passed.

        Raises:
            PeerError: another rank has failed.
        """
        if self._world.size == 1:
            return self._request is not None
        if self._peer_failure is not None:
            raise PeerError(self._peer_failure)
        return self._agreed.is_set() and self._stop_at == point

    def abandons(self, point: int, batch: int = 0) -> bool:
        """Whether to abandon a validation before a batch; to be called after `hold`.

        Args:
            point: the point that follows the validation.
            batch: the index of the batch on this rank.

        Returns:
            True on every rank at the same batch, if the rank has that many.
        """
        if self._world.size == 1:
            return self._request is not None
        with self._lock:
            if not self._frozen:
                self._batch = batch + 1
                return False
        return self._wait() == point and batch >= self._stop_batch

    def hold(self, point: int) -> None:
        """Commits to `point` in place of the later one that the last `reached` committed to."""
        with self._lock:
            if not self._frozen:
                self._committed, self._batch = point, 0

    def fail(self, error: BaseException) -> PeerError | None:
        """Publishes this rank's failure to the other ranks.

        Returns:
            Another rank's error, if it came first and lost connections are all there is here.
        """
        if self._world.size == 1:
            return None
        try:
            first = self._publish(error)
        except Exception:  # noqa: BLE001  no store (yet, or any more): rank 0 may have left with it
            first = self._peer_failure
        if is_lost_connection(error):
            self._leave_if_none_has_begun()
            return None if first is None else PeerError(first)
        if first is not None:
            with contextlib.suppress(AttributeError):  # an error may take no attributes
                setattr(error, FIRST, first)
        return None

    def _publish(self, error: BaseException) -> PeerFailure | None:
        """Publishes the error unless another rank has; returns that rank's."""
        store = self._store
        if store is None:
            meeting.announce_exit(USAGE if isinstance(error, ConfigError) else FAILED, error)
            return None
        meeting.announced()
        how = "lost its connections" if is_lost_connection(error) else "failed"
        if timed_out(error):
            how = "has waited in a collective that another rank has not joined"
        own = PeerFailure(self._world.rank, how, f"{type(error).__name__}: {error}")
        told = store.compare_set(self._prefix + "error", "", json.dumps(asdict(own)))
        store.set(f"{self._prefix}knows/{self._world.rank}", "1")
        if self._world.is_main:
            keys = [f"{self._prefix}knows/{rank}" for rank in range(self._world.size)]
            # A dead rank never answers; others that merely lost it know as much as this one.
            patience = _LINGER if how == "failed" else _LINGER / 5
            deadline = time.monotonic() + patience
            while not store.check(keys) and time.monotonic() < deadline:
                time.sleep(_POLL / 4)
        first = _failure(told)
        return None if first == own else first

    def _wait(self) -> int:
        """The agreed point."""
        deadline = time.monotonic() + _PATIENCE
        while not self._agreed.wait(2 * _POLL):
            if self._peer_failure is not None:
                raise PeerError(self._peer_failure)
            if time.monotonic() > deadline:
                raise PeerError(
                    f"a stop was asked for, but not every rank answered within {_PATIENCE:.0f} s."
                )
        assert self._stop_at is not None
        return self._stop_at

    def _agree(self, point: int, reason: str) -> None:
        self._stop_at, self.reason = point, reason
        self._agreed.set()

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._signalled_at is not None:
            if number == getattr(signal, "SIGXCPU", None):
                return  # it comes each second, until the process has left
            if number == signal.SIGINT or now - self._signalled_at > SAME:
                # Asked twice: leave at once, as if nobody had listened.
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._signalled_at = now
        self.request(_SIGNAL + signal.Signals(number).name)

    def _watch(self, store: Any, stall: StallReport) -> None:
        while not self._closed.wait(_POLL):
            if self._stop_file is not None and self._stop_file.exists():
                self.request(STOP_FILE)
            if store is None:
                continue
            try:
                if self._look(store):
                    return
                stall.look(store, (self._committed, self._batch))
            except Exception as error:  # noqa: BLE001  the store went with its host
                self._leave_if_none_has_begun()
                if not self._closed.wait(_PEER_GRACE):
                    self._leave(f"the process group's store is gone ({error}).")
                return

    def _look(self, store: Any) -> bool:
        """One look at the store; returns whether there is nothing more to wait for."""
        key = self._prefix
        if store.check([key + "error"]):
            self._peer_failure = failure = _failure(store.get(key + "error"))
            store.set(f"{key}knows/{self._world.rank}", "1")
            if not self._closed.wait(_PEER_GRACE):
                self._leave(str(failure))
            return True
        if self._request is not None and not self._frozen:
            store.compare_set(key + "request", "", self._request)
        if not self._frozen and store.check([key + "request"]):
            with self._lock:
                self._frozen = True
            store.set(f"{key}at/{self._world.rank}", f"{self._committed} {self._batch}")
        if self._frozen and not self._agreed.is_set():
            keys = [f"{key}at/{rank}" for rank in range(self._world.size)]
            if store.check(keys):
                points = [tuple(map(int, store.get(name).split())) for name in keys]
                point, self._stop_batch = max(points)
                reason = store.get(key + "request").decode()
                if point == _NOT_BEGUN and self._leaves_at_once and reason.startswith(_SIGNAL):
                    self._leave_with_all(store, reason.removeprefix(_SIGNAL))
                self._agree(point, reason)
        return False

    def _leave_if_none_has_begun(self) -> None:
        """Ends this process if it was signalled, as those were that have left already."""
        if self.signalled and self._leaves_at_once and self._committed == _NOT_BEGUN:
            leave((self._request or "").removeprefix(_SIGNAL), tell=self._world.is_main)

    def _leave_with_all(self, store: Any, why: str) -> None:
        """Ends this process: no rank has begun, so that there is nothing to save."""
        store.set(f"{self._prefix}leaves/{self._world.rank}", "1")
        if self._world.is_main:  # whose store it is
            keys = [f"{self._prefix}leaves/{rank}" for rank in range(self._world.size)]
            deadline = time.monotonic() + _LINGER
            while not store.check(keys) and time.monotonic() < deadline:
                time.sleep(_POLL / 4)
        leave(why, tell=self._world.is_main)

    def _leave(self, why: str) -> None:
        """Ends a process that is stuck where Python cannot reach it, in a collective."""
        print(f"paceline: rank {self._world.rank} leaves, because {why}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(FAILED)


def _failure(told: bytes) -> PeerFailure:
    return PeerFailure(**json.loads(told))


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error is what a failed peer leads to, and no failure of this rank's own."""
    if isinstance(error, dist.DistError):
        return True
    if isinstance(error, CheckpointError) and error.__cause__ is not None:  # met while saving
        return is_lost_connection(error.__cause__)
    return type(error) is RuntimeError and bool(
        re.search(r"gloo|NCCL|[Cc]onnection|[Pp]eer|process group", str(error))
    )


def timed_out(error: BaseException) -> bool:
    """Whether an error is that of a collective which another rank has not joined in time."""
    return is_lost_connection(error) and bool(re.search(r"[Tt]imed out|[Tt]imeout", str(error)))

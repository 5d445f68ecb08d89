"""The agreement on stopping: one step, the same on every rank, without a collective per step.

Whoever wants to stop (a signal, a time limit, a stop file, a callback) writes a request to the
process group's store. A watcher thread on each rank sees it, freezes this rank's step counter and
publishes the window the rank is committed to; the largest of all ranks is where all stop. A rank
between two windows pays one attribute read, and waits only once a request stands.

Nothing is saved, sent or agreed inside a signal handler: it sets a flag. A second signal leaves at
once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from paceline.errors import PeerError
from paceline.world.world import World

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)
_POLL = 0.1  # seconds between a watcher's looks
_PATIENCE = 120.0  # seconds to wait for the other ranks' word
_PEER_GRACE = 15.0  # seconds a rank may stay in a collective that a failed peer has left
_runs = 0  # agreements opened in this process group's life, equal on all ranks


class StopAgreement:
    """Lets a run end at one agreed boundary.

    Args:
        world: the ranks that have to agree.
        stop_file: a path whose appearance asks for a stop, or None.
    """

    def __init__(self, world: World, stop_file: Path | None) -> None:
        global _runs
        _runs += 1
        self._prefix = f"paceline/{_runs}/"
        self._world = world
        self._stop_file = stop_file
        self._request: str | None = None
        self._signalled = False
        self._frozen = False
        self._committed = 0  # the window this rank has begun or may begin
        self._stop_at: int | None = None
        self._lock = threading.Lock()
        self._agreed = threading.Event()
        self._closed = threading.Event()
        self._peer_error: str | None = None
        self._thread: threading.Thread | None = None
        self._handlers: dict[int, Any] = {}
        self.reason: str | None = None

    @property
    def by_signal(self) -> bool:
        """Whether the run stops for a signal, to this rank or another."""
        return self.reason is not None and self.reason.startswith("signal ")

    def open(self, step: int) -> None:
        """Listens for signals (in the main thread) and starts the watcher, if there is work."""
        self._committed = step
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, self._on_signal)
        if self._world.size > 1 or self._stop_file is not None:
            store = self._world.store()
            self._thread = threading.Thread(
                target=self._watch, args=(store,), name="paceline-stop", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """Puts the signal handlers back and ends the watcher."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def request(self, reason: str) -> None:
        """Asks for a stop; the first reason counts."""
        if self._request is None:
            self._request = reason

    def reached(self, step: int) -> bool:
        """Whether to stop here, after `step` windows; if not, this rank is committed to one more.

        Raises:
            PeerError: another rank has failed.
        """
        if self._world.size == 1:
            if self._request is None:
                return False
            self._settle(step, self._request)
            return True
        if self._peer_error is not None:
            raise PeerError(self._peer_error)
        with self._lock:
            if not self._frozen:
                self._committed = step + 1
                return False
        if not self._agreed.wait(_PATIENCE):
            raise PeerError(
                f"a stop was asked for, but not every rank answered within {_PATIENCE:.0f} s."
            )
        assert self._stop_at is not None
        return step >= self._stop_at

    def abandons(self, step: int) -> bool:
        """Whether a validation after `step` windows should be left, since the run stops there."""
        if self._world.size == 1:
            return self._request is not None
        return self._agreed.is_set() and self._stop_at == step

    def hold(self, step: int) -> None:
        """Takes back the commitment to a next window while the boundary after `step` is open."""
        with self._lock:
            if not self._frozen:
                self._committed = step

    def fail(self, error: BaseException) -> None:
        """Tells the other ranks that this one has failed."""
        if self._world.size > 1 and not isinstance(error, PeerError):
            store = self._world.store()
            assert store is not None
            text = f"rank {self._world.rank} failed: {type(error).__name__}: {error}"
            store.set(self._prefix + "error", text)

    def _settle(self, step: int, reason: str) -> None:
        self._stop_at, self.reason = step, reason
        self._agreed.set()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signalled:  # asked twice: leave at once, as if nobody had listened
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signalled = True
        self.request(f"signal {signal.Signals(number).name}")

    def _watch(self, store: Any) -> None:
        while not self._closed.wait(_POLL):
            if self._stop_file is not None and self._stop_file.exists():
                self.request("stop file")
            if store is None:
                continue
            try:
                if self._look(store):
                    return
            except Exception as error:  # noqa: BLE001  the store went with its host
                if not self._closed.wait(_PEER_GRACE):
                    self._leave(f"the process group's store is gone ({error}).")
                return

    def _look(self, store: Any) -> bool:
        """One look at the store; returns whether there is nothing more to wait for."""
        key = self._prefix
        if store.check([key + "error"]):
            self._peer_error = error = store.get(key + "error").decode()
            if not self._closed.wait(_PEER_GRACE):
                self._leave(error)
            return True
        if self._request is not None and not self._frozen:
            store.compare_set(key + "request", "", self._request)
        if not self._frozen and store.check([key + "request"]):
            with self._lock:
                self._frozen = True
            store.set(f"{key}at/{self._world.rank}", str(self._committed))
        if self._frozen and not self._agreed.is_set():
            keys = [f"{key}at/{rank}" for rank in range(self._world.size)]
            if store.check(keys):
                steps = [int(store.get(name)) for name in keys]
                self._settle(max(steps), store.get(key + "request").decode())
        return False

    def _leave(self, why: str) -> None:
        """Ends a process that is stuck where Python cannot reach it, in a collective."""
        print(f"paceline: rank {self._world.rank} leaves, because {why}", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(0)
        os._exit(1)

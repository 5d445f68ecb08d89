"""Signals that stop a run, before it has begun and while others are to be handled."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from paceline.exit_codes import STOPPED

Handler = Callable[[int, FrameType | None], object]

STOPS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGXCPU", "SIGUSR2")
    if hasattr(signal, name)
)
"""The signals that ask a run to stop: schedulers', the terminal's, and that of a limit of CPU time.

A signal whose handler is not the system's own stays with whoever handles it, except those in ASKED.
"""
ASKED = STOPS[:3]
SAME = 2.0
"""Seconds within which a second signal is the first one, passed on."""
LEFT = "PACELINE_LEFT"
"""The environment variable with the file that shows `launch` that a worker leaves at once."""

announce_exit: Callable[[int, str], bool] | None = None
"""Informs the other ranks that this one exits (`meeting.announce_exit`), once that is imported."""
_IMPORTS = 15.0  # seconds that may take
_looking = False  # a thread looks for signals


@contextlib.contextmanager
def handling(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    """A context in which each of these signals to this process calls its handler."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LeaveAtOnce:
    """The handler before training: nothing needs saving, so the process leaves with code 75.

    It raises nothing: an exception out of a handler comes up wherever the process happens to be, in
    an import or in a constructor, where it is swallowed or taken for a mistake in a recipe.

    Args:
        before: called before the process leaves.

    Attributes:
        when: in which part of the command it would leave, for the line that is printed.
        came: the signal, once it has come.
    """

    def __init__(self, before: Callable[[], object] | None = None) -> None:
        self.when = "before training began"
        self.came: int | None = None
        self._before = before
        self._process = os.getpid()
        self._once = threading.Lock()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Leaves; a process forked from the one that handles signals dies by the signal."""
        if os.getpid() != self._process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.came = self.came or number
        name = signal.Signals(number).name
        if frame is not None and _looking and _is_one_of_several():
            return  # to the import or connection that the thread needs to inform the others
        if self._once.acquire(blocking=False) and _others_know(name):
            if self._before is not None:
                self._before()
            leave(name, self.when)


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _others_know(name: str) -> bool:
    """Informs the other ranks that this one exits; returns False if all have met by now."""
    if not _is_one_of_several():
        return True
    with contextlib.suppress(KeyError, OSError):  # it was started by `launch`
        open(os.environ[LEFT], "w").close()
    deadline = time.monotonic() + _IMPORTS
    while announce_exit is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return announce_exit is None or announce_exit(STOPPED, name)


def leave(why: str, when: str = "before training began", *, tell: bool = True) -> None:
    """Ends this process, which has nothing to save.

    Args:
        why: the signal's name.
        when: in which part of the command.
        tell: whether to print a line.
    """
    if tell:
        text = f"paceline: {why} {when}: nothing to save; run the command again.\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # not print: the signal may have come while something does
    os._exit(STOPPED)


def leave_at_once_on_signals(handler: LeaveAtOnce | None = None) -> None:
    """From now on a signal of STOPS ends this process, until somebody else handles it.

    Also where the interpreter does not come to run a handler, while a library is loaded or a
    connection is waited for: a thread looks. To be called in the main thread.

    Args:
        handler: by default one that does nothing else.
    """
    global _looking
    handler = handler or LeaveAtOnce()
    for number in STOPS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, handler)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_look, args=(reading,), name="paceline-signals", daemon=True).start()
    _looking = True
    atexit.register(leave_in_peace)  # called last of all, since it is registered first


def leave_in_peace() -> None:
    """A signal that comes from now on, as the process ends, does not change its exit code."""
    for number in STOPS:
        handler = signal.getsignal(number)
        if isinstance(handler, LeaveAtOnce) or handler is signal.SIG_DFL:
            signal.signal(number, signal.SIG_IGN)


def _look(reading: int) -> None:
    while numbers := os.read(reading, 64):
        for number in numbers:
            handler = signal.getsignal(number)
            if isinstance(handler, LeaveAtOnce):
                handler(number, None)


def _forget() -> None:
    """In a forked process, whose signals are not its parent's."""
    with contextlib.suppress(ValueError):  # beside the main thread it cannot be taken back
        signal.set_wakeup_fd(-1)


def trains(words: list[str] | None = None) -> bool:
    """Whether this process is a command that trains: `paceline train` or `paceline tune`.

    Args:
        words: the command's arguments, by default this process's.
    """
    words = sys.argv[1:] if words is None else words
    return next((word for word in words if not word.startswith("-")), None) in ("train", "tune")

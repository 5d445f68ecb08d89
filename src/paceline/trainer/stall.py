"""Where each rank is, said when one has made no progress for as long as a collective may wait.

A collective that one rank does not join blocks all the others, and the error that ends it names a
rank that waited, not the one it waited for. So the watcher thread of each rank
(`stop.py`) checks its rank's progress from time to time. The first watcher whose rank has made none
for too long asks the others through the process group's store; every watcher answers for its rank,
and the one that asked prints all answers, shortly before the collective itself gives up.

A long step or a long save looks the same and is reported too. Nothing is ended here.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from paceline.errors import some
from paceline.world.world import World

# As fractions of the time that a collective may wait.
_STILL = 0.9  # without progress, after which a rank asks the others where they are
_ANSWERS = 0.08  # that the others have to answer
_EVERY = 0.01  # between two looks at the store
_CALLS = 3  # shown of a rank's stack, beside a library's that they are in
_RANKS = 8  # named of those that are at the same place
_LIBRARIES = {"torch", *sys.stdlib_module_names}


class StallReport:
    """Notices that this rank makes no progress, and answers where it is; for a watcher thread.

    To be made in the thread that trains.

    Args:
        world: the ranks.
        prefix: of its keys in the store.
        where: says which step and batch this rank is at.
    """

    def __init__(self, world: World, prefix: str, where: Callable[[], str]) -> None:
        self._world = world
        self._prefix = f"{prefix}stall/"
        self._where = where
        self._thread = threading.get_ident()
        self._position: Any = None
        self._since = self._next_look = time.monotonic()
        self._told = False  # the present position was reported
        self._reports = 0  # equal on all ranks
        self._asked_at: float | None = None  # this rank waits for the others' answers
        self._stood = 0.0  # seconds, when it asked

    def look(self, store: Any, position: Any) -> None:
        """One look, if it is time for one.

        Args:
            store: this thread's connection to the process group's store.
            position: what changes as the rank gets on, beside what `where` says.
        """
        now, timeout = time.monotonic(), self._world.timeout
        if now < self._next_look:
            return
        self._next_look = now + _EVERY * timeout
        position = (self._where(), position)
        if position != self._position:
            self._position, self._since, self._told = position, now, False
        if self._asked_at is None:
            stands = not self._told and now - self._since > _STILL * timeout
            self._answer(store, asks=stands)
        else:
            self._say(store, late=now - self._asked_at > _ANSWERS * timeout)

    def _answer(self, store: Any, *, asks: bool) -> None:
        """Answers whoever has asked, which may be this rank itself."""
        rank = str(self._world.rank)
        if asks:
            store.compare_set(self._key("asks"), "", rank)
        if not store.check([self._key("asks")]):
            return
        store.set(self._key(rank), f"{self._where()}: {_calls(self._thread)}")
        self._told = True
        if store.get(self._key("asks")).decode() == rank:
            self._asked_at = time.monotonic()
            self._stood = self._asked_at - self._since
        else:
            self._reports += 1

    def _say(self, store: Any, *, late: bool) -> None:
        """Prints what all have answered, if they have or are late."""
        keys = [self._key(rank) for rank in range(self._world.size)]
        if not late and not store.check(keys):
            return
        said: dict[str, list[int]] = {}
        for rank, key in enumerate(keys):
            answer = store.get(key).decode() if store.check([key]) else "does not answer"
            said.setdefault(answer, []).append(rank)
        lines = [f"  {_ranks(ranks)}: {answer}" for answer, ranks in said.items()]
        print(
            f"paceline: rank {self._world.rank} has made no progress for "
            f"{self._stood:.0f} s; a collective may wait for "
            f"{self._world.timeout:g} s (parallel.timeout). Where the ranks are:",
            *lines,
            sep="\n",
            file=sys.stderr,
            flush=True,
        )
        self._reports += 1
        self._asked_at = None

    def _key(self, name: object) -> str:
        return f"{self._prefix}{self._reports}/{name}"


def _calls(thread: int) -> str:
    """The last calls in a thread's stack, and the library's that they wait in, if any."""
    frame = sys._current_frames().get(thread)
    library: list[FrameType] = []
    calls: list[FrameType] = []
    while frame is not None and len(calls) < _CALLS:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in _LIBRARIES:
            calls.append(frame)
        elif not library and not calls:
            library.append(frame)
        frame = frame.f_back
    return " > ".join(map(_call, [*reversed(calls), *library]))


def _call(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_qualname} ({Path(code.co_filename).name}:{frame.f_lineno})"


def _ranks(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {some(ranks, _RANKS)}"

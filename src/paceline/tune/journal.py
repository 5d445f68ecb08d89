"""Journal: the file of a study to which several processes append, whatever kills them.

It imports Optuna: import this module inside a function.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

_BLOCK = 1 << 16
_GRACE = 30.0  # seconds; after them the lock of a process on another machine counts as left behind
_LONGEST_WAIT = 0.02  # seconds between two tries


class Journal(JournalFileBackend):
    """Optuna's journal, mended where a kill has broken it.

    A process killed while it writes leaves a torn last line, onto which the next one would write,
    and no process could read the study any more. The torn line is cut off under the lock, when the
    journal is opened and before each line is added. It was never acknowledged: nothing is lost.

    Args:
        path: the file, in a folder that exists. It is created if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._owned = OwnedLock(path)
        super().__init__(str(path))  # its own lock, in `append_logs` alone, is never taken
        with self._held(), _opened(path) as handle:
            _cut_what_is_broken(handle)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Adds a line for each log, on the disk when it returns."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._held(), _opened(Path(self._file_path)) as handle:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                _cut_what_is_broken(handle)
            data = text.encode()
            while data:
                data = data[os.write(handle, data) :]
            os.fsync(handle)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        self._owned.acquire()
        try:
            yield
        finally:
            self._owned.release()


class OwnedLock:
    """A lock beside a file that says which process holds it.

    It is the symbolic link `<file>.lock`, which one process alone can make, also over NFS. It
    points to no file but holds the owner's name. Where the owner ran on this machine and is dead,
    the next process removes the lock at once. Of an owner on another machine nobody knows: its lock
    is removed once it is 30 s old.

    Args:
        path: the file to be locked, which has to exist when a lock is removed.
    """

    def __init__(self, path: Path) -> None:
        self._file = path
        self._path = path.with_name(path.name + ".lock")
        self._mine = ""

    def acquire(self) -> bool:
        """Waits for the lock and takes it. Always True."""
        mine = _this_process()
        wait, seen, since = 0.001, "", time.monotonic()
        while True:
            try:
                os.symlink(mine, self._path)
            except FileExistsError:
                owner = self._owner()
            else:
                self._mine = mine
                return True
            if owner != seen:
                seen, since = owner, time.monotonic()
            if owner and (_is_dead(owner) or time.monotonic() - since > _GRACE):
                self._remove(owner)
                continue
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, _LONGEST_WAIT)

    def release(self) -> None:
        """Releases the lock, if it is still this process's."""
        if self._mine and self._owner() == self._mine:
            os.unlink(self._path)
        self._mine = ""

    def _owner(self) -> str:
        try:
            return os.readlink(self._path)
        except OSError:  # released in this instant
            return ""

    def _remove(self, owner: str) -> None:
        # One at a time: else a second process removes the lock that the first has then taken.
        with _opened(self._file) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if self._owner() == owner:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path)


_count = 0


def _this_process() -> str:
    """A name that no other holder has: those of this machine that are dead can be told by it."""
    global _count
    _count += 1
    pid = os.getpid()
    return f"{_machine()}:{pid}:{_started(pid)}:{_count}"


def _machine() -> str:
    """This start of this machine, and the space in which its process numbers are valid."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # another system: nobody's death is certain
        return f"{os.uname().nodename}:0"


def _started(pid: int) -> str:
    """When a process was started, in ticks since boot; empty if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]  # of a zombie nothing runs any more


def _is_dead(owner: str) -> bool:
    boot, space, pid, started, _ = [*owner.split(":"), "", "", "", ""][:5]
    return bool(started) and f"{boot}:{space}" == _machine() and _started(int(pid)) != started


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def _cut_what_is_broken(handle: int) -> None:
    """Cuts lines off the end until the last one is whole."""
    size = os.fstat(handle).st_size
    while size:
        start = _line_start(handle, size)
        line = os.pread(handle, size - start, start)
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError):  # a power cut leaves zeros, for one
                json.loads(line)
                return
        os.ftruncate(handle, start)
        size = start


def _line_start(handle: int, end: int) -> int:
    """Where the line begins that ends at `end`, with or without a newline."""
    position = end - 1
    while position:
        begin = max(0, position - _BLOCK)
        found = os.pread(handle, position - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        position = begin
    return 0

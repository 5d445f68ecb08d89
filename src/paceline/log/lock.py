"""One process trains in a run folder at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from paceline.errors import ConfigError

LOCK_FILE = ".lock"
_PATIENCE = 60.0  # seconds; ranks that a killed launcher left behind have exited by then


class FolderLock:
    """Keeps a second process out of a run folder while this one trains there.

    Two processes would truncate each other's rows and remove each other's saves. This happens when
    a run is started again while ranks of the killed one are still alive. The kernel releases the
    lock when its process dies, and worker processes do not inherit it. A file system without locks
    gives no protection.
    """

    def __init__(self) -> None:
        self._handle: int | None = None

    def take(self, folder: Path, say: Callable[[str], None]) -> None:
        """Takes the lock, waiting up to a minute for another process to release it.

        Args:
            folder: the run folder, which has to exist.
            say: prints a line to the user.

        Raises:
            ConfigError: another process is still training there.
        """
        handle = _opened(folder)
        deadline = time.monotonic() + _PATIENCE
        waiting = False
        while not _locked(handle):
            owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
            if time.monotonic() > deadline:
                os.close(handle)
                raise ConfigError(
                    f"another process ({owner}) is training in {folder}: wait until it ends, stop "
                    "it, or choose another run_dir."
                )
            if not waiting:
                say(f"waiting for another process ({owner}) to leave {folder}.")
            waiting = True
            time.sleep(0.1)
        self._sign(handle)

    def try_to_take(self, folder: Path) -> bool:
        """Takes the lock of an existing folder if it is free. Not while this object holds it."""
        handle = _opened(folder)
        if not _locked(handle):
            os.close(handle)
            return False
        self._sign(handle)
        return True

    def is_of(self, folder: Path) -> bool:
        """Whether the lock taken is the one in this folder: the folder may have been replaced."""
        try:
            there = os.stat(folder / LOCK_FILE)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return self._handle is not None and os.path.samestat(os.fstat(self._handle), there)

    def _sign(self, handle: int) -> None:
        with contextlib.suppress(OSError):  # a full disk: the owner stays unknown
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{this_process()}\n".encode(), 0)
        self._handle = handle

    def release(self) -> None:
        """Releases the lock. Safe to call twice."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def this_process() -> str:
    """What a lock that this process holds says of its owner."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


def is_free(folder: Path) -> bool:
    """Whether it is certain that no other process of this machine trains in a run folder.

    Never call it for a folder in which this process may be training: the system releases a
    process's lock when the process closes any handle of the file.
    """
    try:
        import fcntl

        handle = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return True
    except (ImportError, OSError):
        return False
    try:
        # Held for an instant: a process that wants to train retries a moment later.
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held by another process, or the file system has no locks
        return False
    finally:
        os.close(handle)
    return True


def _opened(folder: Path) -> int:
    return os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _locked(handle: int) -> bool:
    """Tries to take the lock; also True on a file system without locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        # A POSIX lock: it belongs to the process, so that forked workers do not keep it alive.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True

"""Machines that fail on purpose, and the small state that the tests save on them."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from paceline.checkpoint import CheckpointPolicy, NativeEngine
from paceline.checkpoint.files import Disk
from paceline.reading import Reader
from paceline.world.world import World

OPERATIONS = (
    "mkdir create write fsync close rename unlink rmdir fsync_folder".split()  # noqa: SIM905
)


class QuickDisk(Disk):
    """A disk that does not wait for the hardware, which no test here can unplug anyway."""

    def fsync(self, fd: int) -> None:
        os.fstat(fd)

    def fsync_folder(self, path: Path) -> None:
        os.stat(path)


class FaultyDisk(QuickDisk):
    """A disk that calls `fault(n, name, arguments)` before its n-th operation, from 1."""

    def __init__(self, fault: Callable[[int, str, tuple[Any, ...]], None]) -> None:
        self.fault = fault
        self.count = 0
        self.unsynced: dict[int, Path] = {}


def _faulty(name: str) -> Callable[..., Any]:
    def operation(self: FaultyDisk, *args: Any) -> Any:
        self.count += 1
        self.fault(self.count, name, args)
        result = getattr(QuickDisk, name)(self, *args)
        if name == "create":
            self.unsynced[result] = args[0]
        elif name == "fsync":
            self.unsynced.pop(args[0], None)
        return result

    return operation


for _name in OPERATIONS:
    setattr(FaultyDisk, _name, _faulty(_name))


def fails_at(at: int, code: int = errno.ENOSPC, for_good: bool = False) -> FaultyDisk:
    """A disk whose n-th operation fails, or every one from the n-th."""

    def fault(n: int, name: str, args: tuple[Any, ...]) -> None:
        # A descriptor that cannot be closed would be the test's leak, not the program's.
        if (n == at or (for_good and n > at)) and name != "close":
            raise OSError(code, os.strerror(code))

    return FaultyDisk(fault)


READS = "open read fstat stat lstat listdir".split()  # noqa: SIM905
# What a file system says when it does not answer.
DOES_NOT_ANSWER = (errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENOMEM, errno.EACCES)


class FaultyReader(Reader):
    """Files of which `fault(n, name, arguments)` is called before the n-th operation, from 1.

    It counts operations on what is in `folder`. A read gives at most 7 bytes where `short` is set.
    """

    def __init__(
        self,
        folder: Path,
        fault: Callable[[int, str, tuple[Any, ...]], None],
        short: bool = False,
    ) -> None:
        self.folder = str(folder)
        self.fault = fault
        self.short = short
        self.count = 0


def path_of(file: Any) -> str:
    """The path of a file that is given by its path or its descriptor."""
    return os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)


def _faulty_read(name: str) -> Callable[..., Any]:
    def operation(self: FaultyReader, *args: Any) -> Any:
        path = path_of(args[0])
        if path.startswith(self.folder):
            self.count += 1
            self.fault(self.count, name, (path, *args[1:]))
            if self.short and name == "read":
                args = (args[0], args[1][:7], args[2])
        return getattr(Reader, name)(self, *args)

    return operation


for _name in READS:
    setattr(FaultyReader, _name, _faulty_read(_name))


def unreadable_from(
    folder: Path, at: int, code: int = errno.ESTALE, for_good: bool = True
) -> FaultyReader:
    """Files that cannot be read at the n-th operation, or from it on."""

    def fault(n: int, name: str, args: tuple[Any, ...]) -> None:
        if n == at or (for_good and n > at):
            raise OSError(code, os.strerror(code), args[0])

    return FaultyReader(folder, fault)


class Died(BaseException):
    """Stands for the end of the process."""


def dies_at(at: int, how: str) -> FaultyDisk:
    """A disk at whose n-th operation the process ends: by "kill", "power", or "raise".

    With "power" what was never synced is lost: such files are cut in half. "raise" is quicker:
    it unwinds this process by an exception that nothing catches.
    """

    def fault(n: int, name: str, args: tuple[Any, ...]) -> None:
        if n != at:
            return
        if how == "raise":
            raise Died
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "power":
            for path in disk.unsynced.values():
                with contextlib.suppress(FileNotFoundError):
                    os.truncate(path, path.stat().st_size // 2)
        os._exit(99)

    disk = FaultyDisk(fault)
    return disk


def in_child(work: Callable[[], None]) -> bool:
    """Runs `work` in a forked process; returns whether it reached its end.

    Raises:
        AssertionError: it raised instead of ending or being killed.
    """
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            work()
        except BaseException:  # noqa: BLE001 - the child must never return into pytest
            traceback.print_exc()
            code = 1
        os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, 99, -signal.SIGKILL)
    return status == 0


def state(value: int) -> dict[str, Any]:
    """A small state of which every part tells its value."""
    return {
        "model": {"weight": torch.full((3, 2), float(value)), "bias": torch.full((2,), value)},
        "progress": {"step": value, "pair": (value, float("inf"))},
        "rank": {"0": {"stream": torch.full((4,), value)}},
    }


def value_of(tree: dict[str, Any]) -> int:
    """The value a loaded state was made with, once all its parts agree on it."""
    value = tree["progress"]["step"]
    assert tree["progress"]["pair"] == (value, float("inf"))
    assert bool((tree["model"]["weight"] == value).all())
    assert bool((tree["model"]["bias"] == value).all())
    assert bool((tree["rank"]["0"]["stream"] == value).all())
    return value


@contextlib.contextmanager
def opened(folder: Path, disk: Disk | None = None, **policy: Any) -> Iterator[NativeEngine]:
    """The checkpoints of a folder, closed at the end; on a disk of the test's choice."""
    checkpoints = NativeEngine(folder, CheckpointPolicy(**policy), World())
    checkpoints._disk = disk or QuickDisk()
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def leftovers(folder: Path) -> list[str]:
    """Hidden names in a folder that are not a place for checkpoints set aside."""
    names = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return [name for name in names if name not in (".damaged", ".abandoned")]

"""Every operation that reads a run's files, in one small layer, and what its failure means.

A file system may fail to answer: a stale handle after a remount, an I/O error, no file descriptor
or memory left, a permission that has expired. This says nothing about the file. So it is tried
again, and if the failure stays, the run does not start: nothing is moved, removed or shortened for
it. Only what a file holds can show that it is damaged. `checkpoint/files.py` is the counterpart
for operations that write.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from paceline.errors import UnreadableError

T = TypeVar("T")

PAUSES = (0.1, 0.4, 1.5)  # seconds before another attempt
_ANSWERS = frozenset(
    getattr(errno, name)
    for name in "ENOENT ENOTDIR EISDIR ELOOP EINVAL ENXIO ENAMETOOLONG".split()  # noqa: SIM905
)


class Reader:
    """The operations. Each raises OSError, and has no options."""

    def open(self, path: Path | str, flags: int) -> int:
        """Opens a file for reading; a pipe that nobody writes to does not block.

        Args:
            path: the file.
            flags: more flags of `os.open`.
        """
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)

    def read(self, fd: int, buffer: memoryview, at: int) -> int:
        """Reads into `buffer`, maybe not all that it could hold.

        Args:
            fd: an open file.
            buffer: gets the bytes.
            at: where they begin in the file.

        Returns:
            The number of bytes read; 0 at the end of the file.
        """
        return os.preadv(fd, [buffer], at)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def stat(self, path: Path | str) -> os.stat_result:
        return os.stat(path)

    def lstat(self, path: Path | str) -> os.stat_result:
        return os.lstat(path)

    def listdir(self, path: Path | str) -> list[str]:
        return os.listdir(path)

    def close(self, fd: int) -> None:
        os.close(fd)


reader = Reader()
"""What everything below uses; a test puts one here that fails."""


def is_answer(error: OSError) -> bool:
    """Whether an error says what is there, such as nothing, rather than that reading failed."""
    return error.errno in _ANSWERS


def patiently(read: Callable[[], T]) -> T:
    """Reads, and reads again after a pause while the file system does not answer.

    Args:
        read: may be called several times.

    Raises:
        UnreadableError: it did not answer at any time.
        OSError: its answer, e.g. FileNotFoundError.
    """
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if is_answer(error):
                raise
        time.sleep(pause)
    try:
        return read()
    except OSError as error:
        if is_answer(error):
            raise
        what = "a file" if error.filename is None else error.filename
        raise UnreadableError(
            f"{what} could not be read in {len(PAUSES) + 1} attempts: {error.strerror or error}. "
            "Nothing was moved or changed; start again once it can be read."
        ) from error


class _File(io.RawIOBase):
    """An open regular file; a read that ends before the file's size is an error, not its end."""

    def __init__(self, fd: int, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self._fd = fd
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        read = reader.read(self._fd, view, self._at)
        if not read and view and self._at < self.size:
            raise OSError(errno.EIO, "reading ended before the end of the file", self.name)
        self._at += read
        return read

    def close(self) -> None:
        if not self.closed:
            super().close()
            reader.close(self._fd)


class File(io.BufferedReader):
    """A regular file, open for reading.

    Attributes:
        size: in bytes, as it was opened.
    """

    def __init__(self, raw: _File) -> None:
        super().__init__(raw, 1 << 17)
        self.size = raw.size


def open_file(path: Path | str, *, links: bool = True) -> File:
    """Opens a regular file for reading, once: `patiently` is the caller's to add.

    Args:
        path: the file.
        links: whether it may be a link; not for files of unknown origin.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    fd = reader.open(path, 0 if links else os.O_NOFOLLOW)
    try:
        status = reader.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return File(_File(fd, str(path), status.st_size))
    except BaseException:
        reader.close(fd)
        raise


def read_file(path: Path | str, most: int, *, links: bool = True) -> bytes:
    """The content of a regular file, read once.

    Args:
        path: the file.
        most: the most bytes that it may have.
        links: whether it may be a link.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError: it has more bytes.
    """
    with open_file(path, links=links) as file:
        if file.size > most:
            raise ValueError(f"it has more than {most} bytes")
        return file.read()


def read_at(fd: int, at: int, length: int) -> bytes:
    """Bytes of an open file, all of them.

    Args:
        fd: the file.
        at: where they begin.
        length: how many.

    Raises:
        OSError: they could not be read.
    """
    data = bytearray(length)
    view = memoryview(data)
    while view:
        read = reader.read(fd, view, at)
        if not read:
            raise OSError(errno.EIO, "reading ended before the end of the file")
        view, at = view[read:], at + read
    return bytes(data)


def names(folder: Path | str) -> list[str]:
    """The names in a folder, in order; none if there is no folder.

    Raises:
        UnreadableError: they could not be read.
    """
    try:
        return sorted(patiently(lambda: reader.listdir(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def status(path: Path | str) -> os.stat_result | None:
    """What is at a path, links followed; None if there is nothing.

    Raises:
        UnreadableError: it could not be read.
    """
    try:
        return patiently(lambda: reader.stat(path))
    except OSError:
        return None


def is_folder(path: Path | str) -> bool:
    """Whether there is a folder at a path.

    Raises:
        UnreadableError: it could not be read.
    """
    there = status(path)
    return there is not None and stat.S_ISDIR(there.st_mode)

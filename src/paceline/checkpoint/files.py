"""Every file operation of a save, in one small layer.

A save uses a `Disk` and nothing else, so that a test can simulate faults: end the process after the
n-th operation, fill the disk, write fewer bytes than asked. It has no options.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path


class Disk:
    """The operations that change files. Each raises OSError."""

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """Opens a new file for writing; it must not exist."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, fd: int, data: memoryview) -> int:
        """Writes the beginning of `data`, maybe not all of it.

        Args:
            fd: an open file.
            data: the bytes to write.

        Returns:
            The number of bytes written.
        """
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Renames a file or folder.

        Args:
            source: what to rename.
            target: its new path; a file there is replaced.
        """
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def fsync_folder(self, path: Path) -> None:
        """Makes the names in a folder durable: without it a rename may not survive a crash."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free

    # The methods below are composed of the operations above.

    def write_all(self, fd: int, data: memoryview | bytes) -> None:
        """Writes all of `data`, however many writes it takes.

        Args:
            fd: an open file.
            data: the bytes to write.
        """
        view = memoryview(data)
        while view:
            written = self.write(fd, view)
            if written <= 0:
                raise OSError("the file system accepts no more bytes")
            view = view[written:]

    def write_file(self, path: Path, data: bytes) -> None:
        """Writes a new file and makes its bytes durable.

        Args:
            path: the file, which must not exist.
            data: its content.
        """
        fd = self.create(path)
        try:
            self.write_all(fd, data)
            self.fsync(fd)
        finally:
            self.close(fd)

    def replace_text(self, path: Path, text: str) -> None:
        """Replaces a small text file atomically: a reader sees the old text or the new.

        Args:
            path: the file, which may exist.
            text: its new content.
        """
        beside = path.with_name(f".{path.name}.new")
        if os.path.lexists(beside):
            self.unlink(beside)
        self.write_file(beside, text.encode())
        self.rename(beside, path)

    def make_folders(self, path: Path) -> None:
        """Makes a folder and its missing parents."""
        if not path.is_dir():
            self.make_folders(path.parent)
            try:
                self.mkdir(path)
            except FileExistsError:
                return
            self.fsync_folder(path.parent)

    def sync(self, path: Path) -> None:
        """Makes the files in a folder and in the folders below it durable, with their names."""
        for name in sorted(os.listdir(path)):
            below = path / name
            mode = os.lstat(below).st_mode
            if stat.S_ISDIR(mode):
                self.sync(below)
            elif stat.S_ISREG(mode):
                fd = os.open(below, os.O_RDONLY)
                try:
                    self.fsync(fd)
                finally:
                    self.close(fd)
        self.fsync_folder(path)

    def remove(self, path: Path) -> None:
        """Removes a file or a whole folder, if it exists; follows no link."""
        if not os.path.lexists(path):
            return
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            self.unlink(path)
            return
        for name in sorted(os.listdir(path)):
            self.remove(path / name)
        self.rmdir(path)

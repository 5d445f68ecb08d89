"""A file of JSON lines: written so that no reader sees half a row, and read."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paceline.errors import CheckpointError, MetricError, UnreadableError
from paceline.log.files import replacing, sync_folder
from paceline.log.floats import as_text, revived
from paceline.reading import open_file, patiently, read_at

_log = logging.getLogger(__name__)


class RowFile:
    """One append-only file of JSON lines that never shows half a row.

    Each row is one write to the file. If the write fails, the row stays in memory and is written
    before the next one; the part of it that reached the file is truncated.

    Args:
        path: the file, created if it is missing; its folder has to exist.
        fresh: discard the file's content.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()  # a background save calls `sync` while rows come in
        self._pending: list[bytes] = []
        self._warned = False
        self._handle = patiently(lambda: os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        try:
            if fresh:
                os.ftruncate(self._handle, 0)
            self._find_end()
        except BaseException:
            os.close(self._handle)
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes `row`, or keeps it in memory while the disk fails (one warning per outage)."""
        line = json.dumps(plain(row, ""), ensure_ascii=False, allow_nan=False) + "\n"
        with self._lock:
            self._pending.append(line.encode())
            try:
                self._flush()
                self._warned = False
            except (OSError, UnreadableError) as error:
                self._warn(error)

    def sync(self) -> None:
        """Makes every row durable.

        Raises:
            CheckpointError: the disk fails; the rows are still in memory.
        """
        with self._lock:
            try:
                self._put_back()
                self._flush()
            except (OSError, UnreadableError) as error:
                raise CheckpointError(
                    f"{self.path}: {len(self._pending)} rows could not be written ({error}). "
                    "They are kept in memory and written with the next row."
                ) from error
            # A copy of the handle: the slow part runs without the lock and outlives a close.
            handle = os.dup(self._handle)
        try:
            os.fsync(handle)
            sync_folder(self.path.parent)
        except OSError as error:
            raise CheckpointError(f"{self.path} could not be synced: {error}") from error
        finally:
            os.close(handle)

    def position(self) -> dict[str, int]:
        """`{"bytes", "rows"}` up to and including the last row, written or still in memory.

        Rows in memory count, since `sync` succeeds only once they are in the file.
        """
        with self._lock:
            waiting = sum(map(len, self._pending))
            return {"bytes": self._bytes + waiting, "rows": self._rows + len(self._pending)}

    def check(self, position: Mapping[str, int]) -> str | None:
        """Why the file cannot be truncated to `position`, in words; None if it can."""
        wanted, rows = position["bytes"], position["rows"]
        if self._bytes < wanted:
            return (
                f"{self.path} is shorter than the checkpoint says ({self._bytes} of {wanted} "
                f"bytes): rows {self._rows + 1} to {rows} are lost{self._where_it_ends()}"
            )
        if wanted and patiently(lambda: read_at(self._handle, wanted - 1, 1)) != b"\n":
            return (
                f"{self.path} was changed: byte {wanted}, the checkpoint's position, is not the "
                "end of a row"
            )
        return None

    def cut(self, position: Mapping[str, int]) -> None:
        """Truncates the file to `position`; the resumed run writes those rows again."""
        with self._lock:
            self._pending.clear()
            os.ftruncate(self._handle, position["bytes"])
            self._bytes, self._rows = position["bytes"], position["rows"]

    def close(self) -> None:
        """Writes the rows in memory and closes the file; reports rows that cannot be written."""
        with self._lock:
            try:
                self._put_back()
                self._flush()
                os.fsync(self._handle)
            except (OSError, UnreadableError) as error:
                lost = len(self._pending)
                _log.error("%s: the last %d rows could not be written: %s", self.path, lost, error)
            finally:
                os.close(self._handle)

    def _flush(self) -> None:
        if self._pending:
            self._follow_end()
        while self._pending:
            line = self._pending[0]
            try:
                # At an explicit offset, not "the end": if even the truncation below fails, the next
                # try overwrites the half row instead of following it.
                written = os.pwrite(self._handle, line, self._bytes)
                if written != len(line):  # a disk accepts what still fits before it is full
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, self._bytes)
                raise
            del self._pending[0]
            self._bytes += len(line)
            self._rows += 1

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            _log.warning(
                "%s cannot be written (%s). Training continues; rows are kept in memory and tried "
                "again at each row, and no checkpoint is published before they are written.",
                self.path,
                error,
            )
        self._warned = True

    def _where_it_ends(self) -> str:
        with contextlib.suppress(MetricError):
            last = last_row(self.path)
            if last and "step" in last:
                return f", everything after step {last['step']}"
        return ""

    def _find_end(self) -> None:
        """Truncates a row torn by a crash, once everything could be read, and counts the others."""
        end = patiently(self._end_of_last_row)
        rows = patiently(lambda: _count_rows(self._handle, end))
        os.ftruncate(self._handle, end)
        self._bytes, self._rows = end, rows

    def _end_of_last_row(self) -> int:
        end = os.fstat(self._handle).st_size
        while end:
            start = max(0, end - 65536)
            newline = read_at(self._handle, start, end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0

    def _follow_end(self) -> None:
        """Goes back where somebody has shortened the file meanwhile."""
        if os.fstat(self._handle).st_size >= self._bytes:
            return
        had = self._rows
        self._find_end()
        first = self._rows + 1
        message = "%s was shortened during the run: rows %d to %d are lost."
        _log.warning(message, self.path, first, had)

    def _put_back(self) -> None:
        """Puts the file back where somebody has removed or replaced it meanwhile.

        Checkpoints count on its rows. Those of a removed file can still be read, as it is open.
        """
        self._follow_end()
        here = os.fstat(self._handle)
        there = os.stat(self.path) if os.path.lexists(self.path) else None
        if there is not None and os.path.samestat(here, there):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = ""
        if there is not None:
            name = self.path.with_suffix(f".replaced{self.path.suffix}")
            os.replace(self.path, name)
            aside = f"; the other file is {name.name} now"
        with replacing(self.path) as file:
            for at in range(0, self._bytes, 1 << 20):
                size = min(1 << 20, self._bytes - at)
                file.buffer.write(read_at(self._handle, at, size))
        handle = os.open(self.path, os.O_RDWR)
        os.close(self._handle)
        self._handle = handle
        what = "removed" if there is None else "replaced"
        _log.warning(
            "%s was %s during the run: its %d rows were written again%s.",
            self.path,
            what,
            self._rows,
            aside,
        )


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, with "nan" and "inf" as floats.

    A last line without a line end (a row being written, or torn by a crash) is left out.

    Raises:
        MetricError: a whole line is not a JSON object; the message gives its number.
    """
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = {k: revived(v) for k, v in json.loads(line).items()}
            except (ValueError, AttributeError, RecursionError) as error:
                raise MetricError(f"{path}, line {number}: not a row: {error}") from error
            yield row


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole row of a file of JSON lines, or None."""
    last = deque(read_rows(path), maxlen=1)
    return last[0] if last else None


def latest_values(path: Path, within: int = 1 << 16) -> dict[str, Any]:
    """The newest value of each key in the last rows of a file of JSON lines.

    Training rows and validation rows have different keys; together they give a run's current state.

    Args:
        path: the file, of any length: only its end is read.
        within: bytes to read.

    Raises:
        OSError: it cannot be read.
    """
    with open_file(path, links=False) as file:
        start = max(0, file.size - within)
        file.seek(start)
        *lines, _ = file.read(within).split(b"\n")
    values: dict[str, Any] = {}
    for line in lines[1:] if start else lines:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            values |= {key: revived(value) for key, value in json.loads(line).items()}
    return values


def plain(value: Any, path: str) -> Any:
    """A value as plain JSON data; non-finite floats become strings.

    Args:
        value: numbers, strings, mappings and lists of them.
        path: its dotted name, for the error.

    Raises:
        MetricError: it is none of these.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return as_text(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{path}.{k}" if path else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy and torch scalars
        return plain(value.item(), path)
    raise MetricError(f"{path!r} is a {type(value).__name__}: a row holds numbers and strings")


def _count_rows(handle: int, end: int) -> int:
    parts = ((at, min(1 << 20, end - at)) for at in range(0, end, 1 << 20))
    return sum(read_at(handle, at, size).count(b"\n") for at, size in parts)

"""Sinks: where a run's rows go. `JsonlSink` writes the run folder's own files.

The local files are the authoritative record of a run; a tracker is a copy. Only rank 0 calls a
sink.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import CheckpointError, MetricError, UnreadableError
from paceline.log.csv_table import CsvTable, lines
from paceline.log.files import replacing, sync_folder
from paceline.log.floats import as_text, revived
from paceline.reading import open_file, patiently, read_at
from paceline.registry import register_named

if TYPE_CHECKING:
    from paceline.log.media import Media

METRICS_FILE = "metrics.jsonl"
TIMING_FILE = "timing.jsonl"
CSV_FILE = "metrics.csv"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInfo:
    """What a sink learns of the run whose rows it gets.

    Attributes:
        folder: the run folder, or None for a run that writes nothing.
        id: made when the run starts and kept by every resume, so that a tracker continues the same
            run; a run that starts anew gets another. It is `id` in run.json.
        identity: the settings that a resumed run must find unchanged, as plain data by dotted key.
        recipe: the content of recipe.yaml as plain data: interpolations and environment look-ups
            as they are written, credentials masked. None for a run built in Python.
        resumed: whether the run resumes from a checkpoint, whose state `load_state_dict` brings.
            If not, discard rows that an earlier run left there.
    """

    folder: Path | None
    id: str
    identity: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    resumed: bool = False


class Sink:
    """The base of every sink; its methods do nothing until they are overridden.

    A row is a flat dictionary of host values (numbers, strings); its key order is kept.

    Attributes:
        name: a checkpoint keeps the sink's state under it; the class's name unless set. A second
            sink of a name gets `_2`. A class that sets it is known to recipes by it.
    """

    name: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_named("logger", cls)

    def open(self, run: RunInfo) -> None:
        """Called once before the first row, and before `load_state_dict`.

        Args:
            run: whose rows will come.
        """

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes one row of metrics; the same run gives the same rows bit by bit."""

    def write_media(self, step: int, name: str, value: Media) -> None:
        """Takes an image, a histogram, text or a table; a sink that shows none need not.

        Args:
            step: optimizer steps done.
            name: as it was logged.
            value: what was logged.
        """

    def write_timing(self, row: Mapping[str, Any]) -> None:
        """Takes one row of speeds, durations and memory, which differ from run to run."""

    def sync(self) -> None:
        """Makes every row so far durable; called before a checkpoint is published.

        A checkpoint written in the background calls it from its thread, while rows may come in.

        Raises:
            CheckpointError: it cannot; the checkpoint that refers to these rows is not published.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue at the same place."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Returns to the place in `state`. Called after `open`."""

    def close(self, status: str) -> None:
        """Called once, however the run ends, with run.json's status; must not raise."""


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
        line = json.dumps(_plain(row, ""), ensure_ascii=False, allow_nan=False) + "\n"
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


class JsonlSink(Sink):
    """Writes `metrics.jsonl` and `timing.jsonl` in the run folder, and `metrics.csv` beside them.

    The table has one line for each step that has a row: what was trained and what a validation
    after it measured. It is up to date throughout the run.

    Floats are written so that they are read back bit by bit; since JSON has no non-finite
    numbers, those are the strings "nan", "inf" and "-inf" (`read_rows` returns floats).

    Args:
        accept_lost_rows: resume even if the files hold fewer rows than the checkpoint refers to.
    """

    def __init__(self, *, accept_lost_rows: bool = False) -> None:
        self.accept_lost_rows = accept_lost_rows
        self._folder: Path | None = None
        self._files: dict[str, RowFile] = {}
        self._table: CsvTable | None = None

    def open(self, run: RunInfo) -> None:
        """See `Sink.open`. In a resumed run, existing rows stay and new ones follow them; a last
        row torn by a crash is truncated."""
        if self._files:
            raise RuntimeError("the sink is already open")
        self._folder = run.folder
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, TIMING_FILE):
            self._files[name] = RowFile(self._folder / name, fresh=not run.resumed)
        if not run.resumed:  # else once its rows are those of the checkpoint
            self._open_table()

    def write(self, row: Mapping[str, Any]) -> None:
        """See `Sink.write`.

        Raises:
            MetricError: a value cannot be written as JSON.
        """
        if self._files:
            if self._table is None:
                self._open_table()
            self._files[METRICS_FILE].append(row)
            assert self._table is not None
            self._table.add(_plain(row, ""))

    def write_timing(self, row: Mapping[str, Any]) -> None:
        """See `Sink.write_timing`.

        Raises:
            MetricError: a value cannot be written as JSON.
        """
        if self._files:
            self._files[TIMING_FILE].append(row)

    def sync(self) -> None:
        """See `Sink.sync`."""
        for file in self._files.values():
            file.sync()

    def state_dict(self) -> dict[str, Any]:
        """The position in each file, `{"bytes", "rows"}` by file name."""
        return {name: file.position() for name, file in self._files.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Truncates both files to the checkpoint's position.

        Raises:
            CheckpointError: metrics.jsonl is shorter than that; neither file was changed. Lost
                speeds and durations only cause a warning.
        """
        if not self._files:
            return
        known = {name: file for name, file in self._files.items() if name in state}
        problems = {name: file.check(state[name]) for name, file in known.items()}
        problem = problems.get(METRICS_FILE)
        if problem and not self.accept_lost_rows:
            raise CheckpointError(
                f"{problem}. Restore the file, or resume without those rows with "
                "JsonlSink(accept_lost_rows=True)."
            )
        for name, file in known.items():
            if (problem := problems[name]) is None:
                file.cut(state[name])
            else:
                _log.warning("%s. The run continues without them.", problem)
        self._open_table()

    def _open_table(self) -> None:
        """Begins metrics.csv with the rows that there are."""
        assert self._folder is not None
        if self._table is not None:
            self._table.close()
        self._table = CsvTable(self._folder / CSV_FILE, read_rows(self._folder / METRICS_FILE))

    def close(self, status: str) -> None:
        """Writes the rows in memory, derives metrics.csv and closes the files."""
        del status
        if self._table is not None:
            self._table.close()
            self._table = None
        for file in self._files.values():
            file.close()
        if self._files and self._folder is not None:
            try:
                write_csv(self._folder)
            except (OSError, MetricError) as error:  # it can be derived again
                _log.warning("%s could not be written: %s", self._folder / CSV_FILE, error)
        self._files = {}


class RowsInMemory(Sink):
    """Keeps the rows of a run without a folder, for `Result.history`."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        """See `Sink.write`."""
        self.rows.append(dict(row))


def rows_of(sinks: Sequence[Sink], run_dir: Path | None) -> Callable[[], Iterable[Any]]:
    """A function that gives the rows that a run has written, where it wrote them.

    Args:
        sinks: of the run.
        run_dir: its folder.
    """
    for sink in sinks:
        if isinstance(sink, RowsInMemory):
            return partial(tuple, sink.rows)
        if isinstance(sink, JsonlSink) and run_dir is not None:
            return partial(read_rows, run_dir / METRICS_FILE)
    return tuple


def with_local_rows(loggers: Sequence[Sink] | None, run_dir: Path | None) -> list[Sink]:
    """The sinks of a run: those given, and the run folder's own rows.

    Args:
        loggers: the Trainer's argument. An empty list turns all rows off; a `JsonlSink` in it takes
            the place of the one that is added.
        run_dir: the run folder; without one its rows are kept in memory.
    """
    given = list(loggers or ())
    no_rows = loggers is not None and not given
    if no_rows or any(isinstance(sink, JsonlSink) for sink in given):
        return given
    return [RowsInMemory() if run_dir is None else JsonlSink(), *given]


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


def write_csv(run_dir: Path) -> Path:
    """Derives `metrics.csv` from `metrics.jsonl`: a line per step, a column per key.

    Columns are in order of appearance; rows of one step share a line.

    Returns:
        The file written. A run without rows gets an empty file.

    Raises:
        OSError: it cannot be written.
        MetricError: `metrics.jsonl` has a line that is not a row.
    """
    source, target = Path(run_dir) / METRICS_FILE, Path(run_dir) / CSV_FILE
    columns: dict[str, None] = {}
    for row in read_rows(source):
        columns.update(dict.fromkeys(row))
    # Read twice rather than held: a long run's rows need not fit in memory.
    with replacing(target) as file:
        table = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        if columns:
            table.writeheader()
        table.writerows(lines(read_rows(source)))  # floats by repr: as exact as in the rows
    return target


def _plain(value: Any, path: str) -> Any:
    """`value` as plain JSON data; non-finite floats become strings."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return as_text(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{path}.{k}" if path else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy and torch scalars
        return _plain(value.item(), path)
    raise MetricError(f"{path!r} is a {type(value).__name__}: a row holds numbers and strings")


def _count_rows(handle: int, end: int) -> int:
    parts = ((at, min(1 << 20, end - at)) for at in range(0, end, 1 << 20))
    return sum(read_at(handle, at, size).count(b"\n") for at, size in parts)

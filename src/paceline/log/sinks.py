"""Sinks: where a run's rows go. `JsonlSink` writes the run folder's own files.

The local files are the authoritative record of a run; a tracker is a copy. Only rank 0 calls a
sink.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import CheckpointError, MetricError
from paceline.log.csv_table import CsvTable, lines
from paceline.log.files import replacing
from paceline.log.row_file import RowFile, plain, read_rows
from paceline.log.row_file import last_row as last_row
from paceline.log.row_file import latest_values as latest_values
from paceline.registry import lookup, register_named

if TYPE_CHECKING:
    from paceline.log.media import Media
    from paceline.log.media_file import MediaFile

METRICS_FILE = "metrics.jsonl"
TIMING_FILE = "timing.jsonl"
CSV_FILE = "metrics.csv"
MEDIA_FILE = "media.jsonl"

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


class JsonlSink(Sink):
    """Writes `metrics.jsonl` and `timing.jsonl` in the run folder, and `metrics.csv` beside them.

    The table has one line for each step that has a row: what was trained and what a validation
    after it measured. It is up to date throughout the run.

    Images, histograms, text and tables are lines of `media.jsonl`, and the images files in `media/`
    beside it.

    Floats are written so that they are read back bit by bit; since JSON has no non-finite
    numbers, those are the strings "nan", "inf" and "-inf" (`read_rows` returns floats).

    Args:
        accept_lost_rows: resume even if the files hold fewer rows than the checkpoint refers to.
    """

    def __init__(self, *, accept_lost_rows: bool = False) -> None:
        self.accept_lost_rows = accept_lost_rows
        self._folder: Path | None = None
        self._files: dict[str, RowFile] = {}
        self._media: MediaFile | None = None  # once there are any
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
        if (self._folder / MEDIA_FILE).exists():
            media = self._open_media()
            if not run.resumed:
                media.cut({"bytes": 0, "rows": 0})
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
            self._table.add(plain(row, ""))

    def write_timing(self, row: Mapping[str, Any]) -> None:
        """See `Sink.write_timing`.

        Raises:
            MetricError: a value cannot be written as JSON.
        """
        if self._files:
            self._files[TIMING_FILE].append(row)

    def write_media(self, step: int, name: str, value: Media) -> None:
        """See `Sink.write_media`.

        Raises:
            MetricError: it is a histogram of what are no numbers.
        """
        if self._files:
            (self._media or self._open_media()).add(step, name, value)

    def sync(self) -> None:
        """See `Sink.sync`."""
        for file in self._files.values():
            file.sync()
        if self._media is not None:
            self._media.sync()

    def state_dict(self) -> dict[str, Any]:
        """The position in each file, `{"bytes", "rows"}` by file name."""
        state = {name: file.position() for name, file in self._files.items()}
        if self._media is not None:
            state[MEDIA_FILE] = self._media.position()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Truncates the files to the checkpoint's position; images after it are removed.

        Raises:
            CheckpointError: metrics.jsonl is shorter than that; no file was changed. Lost speeds,
                durations and media only cause a warning.
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
        if self._media is not None:
            # A checkpoint without a position is from before the first of them.
            position = state.get(MEDIA_FILE, {"bytes": 0, "rows": 0})
            if (problem := self._media.check(position)) is None:
                self._media.cut(position)
            else:
                _log.warning("%s. The run continues without them.", problem)
        self._open_table()

    def _open_media(self) -> MediaFile:
        from paceline.log.media_file import MediaFile

        assert self._folder is not None
        self._media = MediaFile(self._folder)
        return self._media

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
        if self._media is not None:
            self._media.close()
            self._media = None
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


def made(loggers: Sequence[Any] | str | None) -> Any:
    """The sinks that a user gave, with one made of each registered name.

    Args:
        loggers: sinks and names.

    Raises:
        ConfigError: there is no logger of a name.
    """
    if isinstance(loggers, str):
        loggers = [loggers]
    if not isinstance(loggers, list | tuple) or not any(isinstance(s, str) for s in loggers):
        return loggers
    return [lookup("logger", sink)() if isinstance(sink, str) else sink for sink in loggers]


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

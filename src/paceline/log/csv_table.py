"""metrics.csv: the rows of metrics.jsonl as a table, one line per step, updated during a run."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.log.files import replacing

_log = logging.getLogger(__name__)


def lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of one step as one line: those of training and of the validation after it.

    Args:
        rows: in their order. What several of one step have counts as in the first.
    """
    line: dict[str, Any] = {}
    for row in rows:
        if line and not _continues(row, line):
            yield line
            line = {}
        line = _joined(line, row)
    if line:
        yield line


def _joined(line: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    return {**line, **{name: value for name, value in row.items() if name not in line}}


def _continues(row: Mapping[str, Any], line: Mapping[str, Any]) -> bool:
    return "step" in row and row["step"] == line.get("step")


class CsvTable:
    """The table of a run in progress: each row is in the file as soon as it is added.

    It is a copy, which is made anew from the rows at the run's end: a failure to write only
    causes a warning.

    Args:
        path: the file.
        rows: those that there are already.
    """

    def __init__(self, path: Path, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._path = path
        self._columns: list[str] = []
        self._line: dict[str, Any] = {}  # the last one, which may grow
        self._start = 0  # its place in the file
        self._handle: int | None = None
        self._try(lambda: self._make([*lines(rows)]))

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes a row, in the line of its step.

        Args:
            row: plain values by column.
        """
        if self._handle is not None:
            self._try(lambda: self._add(row))

    def close(self) -> None:
        """Closes the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _add(self, row: Mapping[str, Any]) -> None:
        assert self._handle is not None
        if _continues(row, self._line):
            self._line = _joined(self._line, row)
        else:
            self._start, self._line = os.fstat(self._handle).st_size, dict(row)
        if any(name not in self._columns for name in row):
            with open(self._path, newline="", encoding="utf-8") as file:
                kept = [*csv.DictReader(file)]
            if self._start < os.fstat(self._handle).st_size:
                kept.pop()  # the line that grows
            return self._make([*kept, self._line])
        data = _text(self._columns, [self._line])
        os.pwrite(self._handle, data, self._start)
        os.ftruncate(self._handle, self._start + len(data))

    def _make(self, table: list[dict[str, Any]]) -> None:
        """Writes the whole file."""
        self.close()
        names = dict.fromkeys([*self._columns, *(name for line in table for name in line)])
        self._columns = list(names)
        header = _text(self._columns, [dict.fromkeys(names)], header=True) if names else b""
        before, last = _text(self._columns, table[:-1]), _text(self._columns, table[-1:])
        with replacing(self._path) as file:
            file.buffer.write(header + before + last)
        self._handle = os.open(self._path, os.O_RDWR)
        self._start, self._line = len(header + before), dict(table[-1]) if table else {}

    def _try(self, work: Any) -> None:
        try:
            work()
        except (OSError, csv.Error) as error:
            self.close()
            _log.warning("%s cannot be written (%s); the run's end writes it.", self._path, error)


def _text(
    columns: Sequence[str], table: Iterable[Mapping[str, Any]], header: bool = False
) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    else:
        writer.writerows(table)  # floats by repr: as exact as in the rows
    return text.getvalue().encode()

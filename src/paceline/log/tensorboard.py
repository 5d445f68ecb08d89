"""TensorBoard: writes a run's rows as TensorBoard scalars, each exactly once."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from paceline.errors import MissingExtraError
from paceline.log.flat import flat
from paceline.log.media import Histogram, Image, Media, Text
from paceline.log.sinks import RunInfo, Sink

FOLDER = "tensorboard"
_BINS = 64  # of a histogram
_COUNTERS = ("step", "epoch", "samples", "items")  # a validation's row repeats them

_log = logging.getLogger(__name__)


class TensorBoard(Sink):
    """Writes the numbers of each row, by their names, at the row's step.

    The files are in `tensorboard/` in the run folder: `tensorboard --logdir runs` finds them. Each
    start of the run writes a file of its own. A checkpoint records the lengths of the files; a
    resumed run truncates them, so that each step has every scalar once, with the value that an
    uninterrupted run would have written (rounded to float32, as TensorBoard stores it).

    The run's settings are its hyperparameters (TensorBoard's tab HPARAMS): those of the recipe, or
    without one those that a resumed run must find unchanged.

    Counters (epoch, samples, items) and timing rows are only in the run folder's own files. Those
    are the authoritative record and this is a copy: if it cannot be written, a warning is logged
    and the run continues.

    Raises:
        MissingExtraError: the package `tensorboard` is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingExtraError(
                "the TensorBoard sink needs the package tensorboard: "
                'pip install "paceline[tensorboard]".'
            )
        self._folder: Path | None = None
        self._file: Path | None = None  # of this start, once it has a row
        self._step = -1  # of the last row
        self._resumed_at: int | None = None
        self._warned = False
        self._settings: dict[str, Any] = {}

    def open(self, run: RunInfo) -> None:
        """See `Sink.open`."""
        self._folder = None if run.folder is None else run.folder / FOLDER
        self._settings = flat(run.identity if run.recipe is None else run.recipe)
        self._file, self._step, self._resumed_at, self._warned = None, -1, None, False
        if self._folder is None:
            return
        self._folder.mkdir(exist_ok=True)
        if not run.resumed:
            for path in _event_files(self._folder):
                path.unlink()

    def write(self, row: Mapping[str, Any]) -> None:
        """See `Sink.write`. Values that are not numbers are left out."""
        if self._folder is None:
            return
        scalars = {
            name: float(value)
            for name, value in row.items()
            if name not in _COUNTERS and isinstance(value, int | float)
        }
        self._step = row["step"]
        if scalars:
            self._write(lambda: _record(_event(step=self._step, scalars=scalars)))

    def _write(self, make: Callable[[], bytes]) -> None:
        """Adds records; if that fails they are lost, with one warning."""
        try:
            made = make()
            self._append(made if self._file is not None else self._beginning() + made)
            self._warned = False
        except Exception as error:  # noqa: BLE001  a copy never ends a run
            if not self._warned:
                _log.warning("%s cannot be written (%s); its rows are lost.", self._folder, error)
            self._warned = True

    def write_media(self, step: int, name: str, value: Media) -> None:
        """See `Sink.write_media`. A table is shown as text."""
        if self._folder is not None:
            self._write(lambda: _record(_event(step=step, summary=_summary(name, value))))

    def sync(self) -> None:
        """See `Sink.sync`; no checkpoint depends on a copy, so a failure is only reported."""
        if self._file is None:
            return
        try:
            handle = os.open(self._file, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            _log.warning("%s could not be synced: %s", self._file, error)

    def state_dict(self) -> dict[str, Any]:
        """The last row's step, and the length in bytes of each file."""
        files = [] if self._folder is None else _event_files(self._folder)
        return {"step": self._step, "files": {path.name: path.stat().st_size for path in files}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Truncates the files to the checkpoint's lengths, and removes later ones."""
        if self._folder is None:
            return
        self._step = self._resumed_at = state["step"]
        self._file = None
        for path in _event_files(self._folder):
            wanted, length = state["files"].get(path.name, 0), path.stat().st_size
            if wanted == 0:
                path.unlink()
            elif length < wanted:
                _log.warning("%s is shorter than the checkpoint says: its rows are lost.", path)
            else:
                os.truncate(path, wanted)

    def _beginning(self) -> bytes:
        """Chooses this start's file, and returns its first records."""
        assert self._folder is not None
        seconds, count = int(time.time()), len(_event_files(self._folder))
        # TensorBoard reads a folder's files in the order of their names.
        name = f"events.out.tfevents.{seconds:010d}.{count:05d}.{socket.gethostname()}"
        records = _record(_event(version=True)) + _hyperparameters(self._settings)
        if self._resumed_at is not None:
            # A running TensorBoard discards the truncated part.
            records += _record(_event(step=self._resumed_at + 1, start=True))
        self._file = self._folder / name
        return records

    def _append(self, records: bytes) -> None:
        """Writes all of the records or none."""
        assert self._file is not None
        with open(self._file, "ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(records) != len(records):
                    raise OSError("the disk is full")
            except OSError:
                file.truncate(before)
                if before == 0:
                    self._file = None
                raise


def _hyperparameters(settings: Mapping[str, Any]) -> bytes:
    """The records from which TensorBoard's tab HPARAMS shows settings."""
    if not settings:
        return b""
    from tensorboard.compat.proto import event_pb2
    from torch.utils.tensorboard.summary import hparams

    messages: Any = event_pb2
    now = time.time()
    summaries = hparams(dict(settings), {})
    events = [messages.Event(wall_time=now, summary=summary) for summary in summaries]
    return b"".join(_record(event.SerializeToString()) for event in events)


def _summary(name: str, value: Media) -> Any:
    """A value that is no number, as TensorBoard's protocol buffer; None without finite values."""
    from torch.utils.tensorboard import summary

    if isinstance(value, Image):
        pixels = value.channels_first
        pixels = pixels.float().nan_to_num() if pixels.is_floating_point() else pixels
        return summary.image(name, pixels.numpy(), dataformats="CHW")
    if isinstance(value, Histogram):
        values = torch.as_tensor(value.values).detach().float().cpu()
        values = values[values.isfinite()]
        return summary.histogram(name, values.numpy(), bins=_BINS) if len(values) else None
    return summary.text(name, value.text if isinstance(value, Text) else value.markdown)


def _event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.out.tfevents.*"))


def _event(
    *,
    step: int = 0,
    scalars: Mapping[str, float] | None = None,
    summary: Any = None,
    version: bool = False,
    start: bool = False,
) -> bytes:
    """An event, serialised as TensorBoard's protocol buffer."""
    from tensorboard.compat.proto import event_pb2

    messages: Any = event_pb2  # its names exist only at run time
    event = messages.Event(wall_time=time.time(), step=step)
    if version:
        event.file_version = "brain.Event:2"
    if start:
        event.session_log.CopyFrom(messages.SessionLog(status=messages.SessionLog.START))
    if summary is not None:
        event.summary.CopyFrom(summary)
    for tag, value in (scalars or {}).items():
        event.summary.value.add(tag=tag, simple_value=value)
    return event.SerializeToString()


def _record(data: bytes) -> bytes:
    """A record of the file: its length and its data, each with a checksum."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(data)
    return buffer.getvalue()

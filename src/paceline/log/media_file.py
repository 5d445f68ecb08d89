"""media.jsonl and media/: images, histograms, text and tables of a run, on disk.

A line of media.jsonl is `{"step", "name", "kind", ...}`: the line holds text, tables and histograms
whole; an image is a PNG file in media/, numbered by its line, so that truncating the lines says
which files go too.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import CheckpointError, MetricError
from paceline.log.files import sync_folder
from paceline.log.row_file import RowFile

if TYPE_CHECKING:
    from paceline.log.media import Media

MEDIA_FILE = "media.jsonl"
MEDIA_FOLDER = "media"
_BINS = 64  # of a histogram
_COLORS = {1: 0, 3: 2, 4: 6}  # channels -> PNG's colour type: grey, RGB, RGBA

_log = logging.getLogger(__name__)


class MediaFile:
    """The lines and files of one run.

    Args:
        folder: the run folder, which has to exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / MEDIA_FOLDER
        self._rows = RowFile(folder / MEDIA_FILE)
        self._unwritten: dict[Path, bytes] = {}  # images that a failing disk has refused
        self._unsynced: list[Path] = []
        self._warned = False
        self._lock = threading.Lock()  # a background save calls `sync` while more comes in

    def add(self, step: int, name: str, value: Media) -> None:
        """Writes one value; while the disk fails it is kept in memory, as rows are.

        Args:
            step: optimizer steps done.
            name: as it was logged.
            value: what was logged.

        Raises:
            MetricError: it is a histogram of what are no numbers.
        """
        number = self._rows.position()["rows"]
        row: dict[str, Any] = {"step": step, "name": name}
        more, pixels = described(name, value)
        row |= more
        if pixels is not None:
            file = self._folder / f"{number:06d}_{_file_name(name)}.png"
            row["file"] = f"{MEDIA_FOLDER}/{file.name}"
            with self._lock:
                self._unwritten[file] = pixels
                self._flush()
        self._rows.append(row)

    def sync(self) -> None:
        """Makes all of it durable.

        Raises:
            CheckpointError: the disk fails; what could not be written is still in memory.
        """
        with self._lock:
            self._flush()
            if self._unwritten:
                raise CheckpointError(
                    f"{self._folder}: {len(self._unwritten)} images could not be written. They "
                    "are kept in memory and written with the next one."
                )
            written, self._unsynced = self._unsynced, []
        try:
            for path in filter(Path.exists, written):
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            if written:
                sync_folder(self._folder)
        except OSError as error:
            raise CheckpointError(f"{self._folder} could not be synced: {error}") from error
        self._rows.sync()

    def position(self) -> dict[str, int]:
        """See `RowFile.position`."""
        return self._rows.position()

    def check(self, position: Mapping[str, int]) -> str | None:
        """See `RowFile.check`."""
        return self._rows.check(position)

    def cut(self, position: Mapping[str, int]) -> None:
        """Truncates the lines to `position`, and removes the images of those after it."""
        self._rows.cut(position)
        self._unwritten.clear()
        self._unsynced.clear()
        for path in self._folder.glob("[0-9]*_*.png"):
            if int(path.name.partition("_")[0]) >= position["rows"]:
                path.unlink()

    def close(self) -> None:
        """Writes what is in memory, and closes the file."""
        with self._lock:
            self._flush()
        self._rows.close()

    def _flush(self) -> None:
        for path, data in list(self._unwritten.items()):
            try:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
            except OSError as error:
                if not self._warned:
                    _log.warning("%s cannot be written (%s); it is kept in memory.", path, error)
                self._warned = True
                return
            self._unsynced.append(path)
            del self._unwritten[path]
        self._warned = False


def described(name: str, value: Media) -> tuple[dict[str, Any], bytes | None]:
    """A value as plain data, and an image's PNG file.

    Args:
        name: as it was logged.
        value: what was logged.

    Raises:
        MetricError: it is a histogram of what are no numbers.
    """
    from paceline.log.media import Histogram, Image, Text

    if isinstance(value, Image):
        pixels = value.channels_first
        if pixels.is_floating_point():
            pixels = (pixels.float().nan_to_num().clamp(0, 1) * 255).round()
        array = pixels.byte().permute(1, 2, 0).contiguous().numpy()
        height, width, channels = array.shape
        size = {"kind": "image", "height": height, "width": width, "channels": channels}
        return size, png(array.tobytes(), width, height, channels)
    if isinstance(value, Histogram):
        return {"kind": "histogram", **_histogram(name, value.values)}, None
    if isinstance(value, Text):
        return {"kind": "text", "text": value.text}, None
    rows = [[_cell(each) for each in row] for row in value.rows]
    return {"kind": "table", "columns": list(map(str, value.columns)), "rows": rows}, None


def png(data: bytes, width: int, height: int, channels: int) -> bytes:
    """A PNG file of bytes in [height, width, channels] order; zlib is all that it takes.

    Args:
        data: the pixels.
        width, height: of the image.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
    """
    stride = width * channels
    lines = b"".join(b"\0" + data[at : at + stride] for at in range(0, len(data), stride))
    head = struct.pack(">IIBBBBB", width, height, 8, _COLORS[channels], 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )


def _histogram(name: str, given: Any) -> dict[str, Any]:
    """Counts of the finite values in bins of equal width, and what they sum to."""
    import numpy as np
    import torch

    try:
        values = torch.as_tensor(given).detach().flatten().cpu().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise MetricError(f"log({name!r}, Histogram(...)): its values are no numbers.") from error
    finite = values[values.isfinite()].numpy()
    found: dict[str, Any] = {"count": len(finite), "not_finite": len(values) - len(finite)}
    if len(finite):
        counts, edges = np.histogram(finite, bins=_BINS)
        found |= {"min": float(finite.min()), "max": float(finite.max())}
        found |= {"sum": float(finite.sum()), "sum_of_squares": float((finite**2).sum())}
        found |= {"edges": edges.tolist(), "counts": counts.tolist()}
    return found


def _cell(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _file_name(name: str) -> str:
    """A metric's name as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:80]

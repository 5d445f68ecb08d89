"""How far a tracker has got in a run folder's rows: `trackers/<name>.json`."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paceline.errors import MetricError
from paceline.log.files import replacing
from paceline.log.floats import revived
from paceline.reading import open_file, read_file

FOLDER = "trackers"
_FORMAT = 1
_MOST = 1 << 20  # bytes at a time


@dataclass
class Place:
    """A place between two rows of a file.

    Attributes:
        bytes: before it.
        rows: before it.
        last: bytes of the row before it.
        checksum: of that row: whoever writes the row again writes the same.
    """

    bytes: int = 0
    rows: int = 0
    last: int = 0
    checksum: int = 0


@dataclass
class Cursor:
    """What is kept of one tracker of one run.

    Attributes:
        type: the tracker's name in the registry.
        settings: it was made with; no credentials.
        config: the run's settings, credentials masked.
        run: id of the run that the places are of.
        rows: the place in metrics.jsonl up to which the library has taken the rows.
        media: the same in media.jsonl.
        handed: rows handed over; the library may still lose those after `rows` if it is killed.
        complete: the run was over, and everything is sent.
        problem: why rows could not be sent, in words; None if they could.
        pid: of the follower that wrote it last.
    """

    type: str
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    run: str = ""
    rows: Place = field(default_factory=Place)
    media: Place = field(default_factory=Place)
    handed: int = 0
    complete: bool = False
    problem: str | None = None
    pid: int = 0

    def write(self, path: Path) -> None:
        """Replaces the file."""
        with replacing(path) as file:
            file.write(json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n")


def read_cursor(path: Path) -> Cursor | None:
    """The cursor in a file; None if there is none that can be read."""
    try:
        found = json.loads(read_file(path, 1 << 20, links=False))
        if found.pop("format") != _FORMAT:
            return None
        places = {name: Place(**found.pop(name)) for name in ("rows", "media")}
        return Cursor(**found, **places)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def new_rows(path: Path, place: Place) -> tuple[list[tuple[int, dict[str, Any]]], Place]:
    """The whole rows after a place, with their numbers, and the place after them.

    The file may end before the place for a while: a resumed run writes those rows again.

    Args:
        path: a file of JSON lines, which need not be there yet.
        place: where to begin.

    Raises:
        MetricError: the row before the place is not the one that was sent.
    """
    try:
        file = open_file(path, links=False)
    except FileNotFoundError:
        return [], place
    with file:
        if file.size <= place.bytes:
            return [], place
        file.seek(place.bytes - place.last)
        if place.last and zlib.crc32(file.read(place.last)) != place.checksum:
            raise MetricError(f"{path}: row {place.rows} is not the one that was sent.")
        *lines, _ = file.read(_MOST).split(b"\n")
    found = []
    for number, line in enumerate(lines, start=place.rows):
        try:
            row = {key: revived(value) for key, value in json.loads(line).items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise MetricError(f"{path}, line {number + 1}: not a row: {error}") from error
        found.append((number, row))
    if not lines:
        return [], place
    last = lines[-1] + b"\n"
    size = sum(len(line) + 1 for line in lines)
    after = Place(place.bytes + size, place.rows + len(lines), len(last), zlib.crc32(last))
    return found, after


def place_after(path: Path, rows: int) -> Place:
    """The place after a number of rows, or the end of the file if it has fewer.

    Args:
        path: a file of JSON lines, which need not be there yet.
        rows: how many.
    """
    place = Place()
    try:
        file = open_file(path, links=False)
    except FileNotFoundError:
        return place
    with file:
        for line in file:
            if place.rows == rows or not line.endswith(b"\n"):
                break
            size = place.bytes + len(line)
            place = Place(size, place.rows + 1, len(line), zlib.crc32(line))
    return place

"""What a follower needs of a tracker's library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COUNTERS = ("step", "epoch", "samples", "items")


@dataclass(frozen=True)
class FollowedRun:
    """The run that is followed.

    Attributes:
        folder: the run folder.
        id: of the run; a resumed run has the same.
        name: for people.
        config: its settings as plain data, credentials masked.
        home: a folder for what the library writes on this machine.
    """

    folder: Path
    id: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    home: Path = Path()


class Adapter:
    """One run in one library. Created, and used, in the follower's process alone.

    Args:
        settings: of the tracker, as its class takes them.
        run: that is followed.

    Attributes:
        safe_at_once: whether a row handed over survives a kill of the follower. If not, the cursor
            moves when the library's run is closed, and the adapter knows which rows there are.
    """

    safe_at_once = True

    def __init__(self, settings: Mapping[str, Any], run: FollowedRun) -> None:
        self.settings, self.run = settings, run

    def open(self) -> None:
        """Begins the library's run, or continues the one of the same id."""
        raise NotImplementedError

    def held(self) -> int | None:
        """Rows that the library has for certain; None if the cursor says it."""
        return None

    def send(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        """Hands rows over.

        Args:
            rows: with their numbers in metrics.jsonl, from 0 on.
        """
        raise NotImplementedError

    def send_media(self, number: int, row: dict[str, Any]) -> None:
        """Hands over a line of media.jsonl.

        Args:
            number: of the line, from 0 on.
            row: its content.
        """

    def send_artifact(self, path: Path) -> None:
        """Hands over a file or folder of the run's exports."""

    def close(self, status: str | None) -> None:
        """Ends the library's run.

        Args:
            status: of run.json; None if another follower continues.
        """


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The values of a row that are numbers, by name, without its counters."""
    return {
        name: value
        for name, value in row.items()
        if name not in COUNTERS and isinstance(value, int | float)
    }

"""Libraries that a follower imports: one that writes what it gets, and some that fail."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from paceline.trackers.adapter import Adapter


class Writes(Adapter):
    def open(self) -> None:
        if self.settings.get("down") and Path(self.settings["down"]).exists():
            raise ConnectionError("no route to host; api_key=abcdefgh")
        self.file = self.run.home / "sent.jsonl"
        self._note({"open": self.run.id, "config": dict(self.run.config)})

    def _note(self, what: Any) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(what) + "\n")

    def send(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        for number, row in rows:
            self._note([number, row["step"]])

    def send_media(self, number: int, row: dict[str, Any]) -> None:
        self._note({"media": [number, row["kind"]]})

    def send_artifact(self, path: Path) -> None:
        self._note({"artifact": path.name})

    def close(self, status: str | None) -> None:
        self._note({"close": status, "telemetry off": os.environ["DO_NOT_TRACK"]})


class Hangs(Writes):
    def send(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        time.sleep(600)

"""SwanLab: scalars by step; a value sent again for a step is ignored by its server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import swanlab  # pyright: ignore[reportMissingImports] - an extra

from paceline.trackers.adapter import Adapter, numbers
from paceline.trackers.libraries.leveldb import records

_SCANS = ("hardware", "runtime", "requirements", "conda", "git", "swanlab", "monitor")


class SwanlabRun(Adapter):
    """A run of SwanLab, online or offline as `SWANLAB_MODE` or the settings say."""

    safe_at_once = False  # it keeps rows in memory

    def open(self) -> None:
        """See `Adapter.open`."""
        given = self.settings
        mode: Any = given.get("mode") or os.environ.get("SWANLAB_MODE") or None
        home = os.environ.get("SWANLAB_LOG_DIR") or str(self.run.home)
        Path(home).mkdir(parents=True, exist_ok=True)
        self._there = _values_in(Path(home), (self.run.id * 2)[:21])
        off = dict.fromkeys(_SCANS, False)
        settings = swanlab.Settings(probe=off, terminal={"proxy_type": "none"})  # pyright: ignore
        self._run: Any = swanlab.init(
            id=(self.run.id * 2)[:21],
            resume="allow",
            project=given.get("project") or "paceline",
            workspace=given.get("entity"),
            group=given.get("group"),
            tags=list(given.get("tags") or ()) or None,
            name=given.get("run_name") or self.run.name,
            config=dict(self.run.config),
            log_dir=home,
            mode=mode,
            settings=settings,
        )

    def send(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        """See `Adapter.send`."""
        for _, row in rows:
            step, named = row["step"], numbers(row)
            if values := {k: v for k, v in named.items() if (k, step) not in self._there}:
                self._run.log(values, step=row["step"])

    def send_media(self, number: int, row: dict[str, Any]) -> None:
        """See `Adapter.send_media`. Tables and histograms are shown as text."""
        if row["kind"] == "image":
            value: Any = swanlab.Image(str(self.run.folder / row["file"]))
        elif row["kind"] == "text":
            value = swanlab.Text(row["text"])
        elif row["kind"] == "table":
            lines = [row["columns"], *row["rows"]]
            value = swanlab.Text("\n".join(" | ".join(map(str, line)) for line in lines))
        else:
            return
        self._run.log({row["name"]: value}, step=row["step"])

    def close(self, status: str | None) -> None:
        """See `Adapter.close`."""
        state = {"failed": "crashed", "killed": "crashed", "stopped": "aborted"}
        self._run.finish(state.get(status or "", "success"))


def _values_in(home: Path, run_id: str) -> set[tuple[str, int]]:
    """Names and steps of what is in the files of earlier followers of a run."""
    from swanlab.proto.swanlab.record.v1 import (  # pyright: ignore[reportMissingImports]
        record_pb2,
    )

    found = set()
    for path in home.glob(f"run-*-{run_id}/run-{run_id}.swanlab"):
        for data in records(path.read_bytes()):
            record: Any = record_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "scalar":
                found.add((record.scalar.key, record.scalar.step))
    return found

"""trackio: a row of its sqlite table for each row; it says itself which it has."""

from __future__ import annotations

from typing import Any

import trackio  # pyright: ignore[reportMissingImports] - an extra
from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

from paceline.trackers.adapter import Adapter

_MARK = "epoch"  # a counter that each row has, and nothing else


class TrackioRun(Adapter):
    """A run of trackio, in `TRACKIO_DIR` or on a Space."""

    def open(self) -> None:
        """See `Adapter.open`. trackio knows runs by name: the id is a part of it."""
        given = self.settings
        self._project = given.get("project") or "paceline"
        self._name = f"{given.get('run_name') or self.run.name}-{self.run.id}"
        self._local = not given.get("space_id")
        self._run: Any = trackio.init(
            project=self._project,
            name=self._name,
            group=given.get("group"),
            config={**self.run.config, "tags": list(given.get("tags") or ())},
            space_id=given.get("space_id"),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def held(self) -> int | None:
        """See `Adapter.held`: rows in its database."""
        if not self._local:
            return None
        rows = SQLiteStorage.get_logs(self._project, self._name, run_id=self._run.id)
        return sum(_MARK in row for row in rows)

    def send(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        """See `Adapter.send`."""
        for _, row in rows:
            values = {name: value for name, value in row.items() if name != "step"}
            self._run.log(values, step=row["step"])

    def send_media(self, number: int, row: dict[str, Any]) -> None:
        """See `Adapter.send_media`."""
        if row["kind"] == "image":
            value: Any = trackio.Image(str(self.run.folder / row["file"]))
        elif row["kind"] == "table":
            lines = [dict(zip(row["columns"], line, strict=True)) for line in row["rows"]]
            import pandas  # pyright: ignore[reportMissingImports] - trackio brings it

            value = trackio.Table(dataframe=pandas.DataFrame(lines))
        elif row["kind"] == "histogram" and row["count"]:
            value = trackio.Histogram(np_histogram=(row["counts"], row["edges"]))
        elif row["kind"] == "text":
            value = trackio.Markdown(row["text"])
        else:
            return
        self._run.log({row["name"]: value}, step=row["step"])

    def close(self, status: str | None) -> None:
        """See `Adapter.close`."""
        self._run.finish()

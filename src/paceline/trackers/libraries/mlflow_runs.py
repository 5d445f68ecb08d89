"""MLflow: metrics with a time that follows from the row, so that a row sent again is the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow.entities import (  # pyright: ignore[reportMissingImports] - an extra
    Metric,
    Param,
)
from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

from paceline.log.flat import flat
from paceline.trackers.adapter import Adapter, numbers

_TAG = "paceline.run"
_MOST = 900  # metrics of one call; MLflow takes 1000
_ENDS = {"complete": "FINISHED", "stopped": "KILLED", "killed": "KILLED"}


class MlflowRun(Adapter):
    """A run of MLflow, found by a tag with the run's id."""

    def open(self) -> None:
        """See `Adapter.open`."""
        given = self.settings
        uri = given.get("uri") or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        self._client = MlflowClient(uri)
        project = given.get("project") or "paceline"
        experiment = self._client.get_experiment_by_name(project)
        if experiment is None:
            where = self.run.home / "artifacts" if uri.startswith("sqlite:") else None
            place = None if where is None else where.resolve().as_uri()
            number = self._client.create_experiment(project, artifact_location=place)
        else:
            number = experiment.experiment_id
        found = self._client.search_runs([number], f"tags.`{_TAG}` = '{self.run.id}'")
        if found:
            self._run = found[0]
            self._client.update_run(self._run.info.run_id, status="RUNNING")
        else:
            tags = {_TAG: self.run.id, "paceline.folder": self.run.folder.name}
            tags |= {f"tag.{name}": "true" for name in given.get("tags") or ()}
            if given.get("group"):
                tags["group"] = given["group"]
            name = given.get("run_name") or self.run.name
            self._run = self._client.create_run(number, tags=tags, run_name=name)
        self._id = self._run.info.run_id
        params = {key: str(value)[:6000] for key, value in flat(self.run.config).items()}
        new = [Param(k, v) for k, v in params.items() if k not in self._run.data.params]
        for some in _parts(new, 100):
            self._client.log_batch(self._id, params=some)

    def send(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        """See `Adapter.send`."""
        start = self._run.info.start_time
        metrics = [
            # The database takes no infinity but its largest number.
            Metric(name, float(value), start + number, row["step"])
            for number, row in rows
            for name, value in numbers(row).items()
        ]
        for some in _parts(metrics, _MOST):
            self._client.log_batch(self._id, metrics=some)

    def send_media(self, number: int, row: dict[str, Any]) -> None:
        """See `Adapter.send_media`: files below `media/`, numbered by step."""
        name, kind = row["name"].replace("/", "_"), row["kind"]
        stem = f"media/{name}_{row['step']:08d}"
        if kind == "image":
            folder = f"media/{name}"
            self._client.log_artifact(self._id, str(self.run.folder / row["file"]), folder)
        elif kind == "text":
            self._client.log_text(self._id, row["text"], f"{stem}.md")
        else:
            self._client.log_dict(self._id, row, f"{stem}.json")

    def send_artifact(self, path: Path) -> None:
        """See `Adapter.send_artifact`."""
        if path.is_dir():
            self._client.log_artifacts(self._id, str(path), f"exports/{path.name}")
        else:
            self._client.log_artifact(self._id, str(path), "exports")

    def close(self, status: str | None) -> None:
        """See `Adapter.close`."""
        if status is not None:
            self._client.set_terminated(self._id, _ENDS.get(status, "FAILED"))


def _parts(items: list[Any], most: int) -> Iterator[list[Any]]:
    return (items[at : at + most] for at in range(0, len(items), most))

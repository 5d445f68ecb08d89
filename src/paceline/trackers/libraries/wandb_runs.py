"""Weights & Biases: each row is a step of its history, shown over the column `step`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb  # pyright: ignore[reportMissingImports] - an extra

from paceline.trackers.adapter import Adapter
from paceline.trackers.libraries.leveldb import records

_MARK = "epoch"  # a counter that each row has, and nothing else


class WandbRun(Adapter):
    """A run of wandb, online or offline as `WANDB_MODE` or the settings say."""

    def open(self) -> None:
        """See `Adapter.open`. An offline run of the same id continues in a folder of its own."""
        given = self.settings
        mode = given.get("mode") or os.environ.get("WANDB_MODE") or None
        self._home = Path(os.environ.get("WANDB_DIR") or self.run.home)
        self._held = _rows_in(self._home, self.run.id)
        scans = {
            "x_disable_stats": True,
            "x_disable_meta": True,
            "x_disable_machine_info": True,
            "disable_git": True,
            "disable_code": True,
            "disable_job_creation": True,
            "console": "off",
            "silent": True,
            "x_save_requirements": False,
        }
        known = wandb.Settings.model_fields
        settings = wandb.Settings(**{k: v for k, v in scans.items() if k in known})
        self._run: Any = wandb.init(
            id=self.run.id,
            resume=None if mode == "offline" else "allow",
            project=given.get("project"),
            entity=given.get("entity"),
            group=given.get("group"),
            tags=given.get("tags") or None,
            name=given.get("run_name") or self.run.name,
            config=dict(self.run.config),
            dir=str(self._home),
            mode=mode,
            settings=settings,
        )
        self._offline = bool(self._run.settings._offline)
        self._run.define_metric("*", step_metric="step")
        self._next = self._held[1] if self._offline else self._run.starting_step

    def held(self) -> int | None:
        """See `Adapter.held`: offline what its files have, for it writes them in blocks."""
        return self._held[0] if self._offline else None

    def send(self, rows: list[tuple[int, dict[str, Any]]]) -> None:
        """See `Adapter.send`."""
        for _, row in rows:
            self._log(row)

    def send_media(self, number: int, row: dict[str, Any]) -> None:
        """See `Adapter.send_media`."""
        name, kind = row["name"], row["kind"]
        if kind == "image":
            value = wandb.Image(str(self.run.folder / row["file"]))
        elif kind == "histogram" and row["count"]:
            value = wandb.Histogram(np_histogram=(row["counts"], row["edges"]))
        elif kind == "table":
            value = wandb.Table(columns=row["columns"], data=row["rows"], allow_mixed_types=True)
        elif kind == "text":
            value = wandb.Table(columns=["text"], data=[[row["text"]]])
        else:
            return
        self._log({"step": row["step"], name: value})

    def send_artifact(self, path: Path) -> None:
        """See `Adapter.send_artifact`."""
        artifact = wandb.Artifact(f"{self.run.id}-{path.name}", type="model")
        artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self, status: str | None) -> None:
        """See `Adapter.close`."""
        self._run.finish(exit_code=1 if status in ("failed", "killed") else 0)

    def _log(self, values: dict[str, Any]) -> None:
        self._run.log(values, step=self._next, commit=True)
        self._next += 1


def _rows_in(home: Path, run_id: str) -> tuple[int, int]:
    """Rows and, with media, steps of an offline run that are on disk."""
    rows = steps = 0
    for path in sorted(home.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")):
        for values in history(path):
            steps = max(steps, int(values["_step"]) + 1)
            rows += _MARK in values
    return rows, steps


def history(path: Path) -> Iterator[dict[str, Any]]:
    """The history of a `.wandb` file: LevelDB's log blocks of protocol buffers.

    Args:
        path: the file; it may end within a record.
    """
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    for data in records(path.read_bytes()):
        record: Any = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
            values = {key: json.loads(value) for key, value in items.items()}
            yield {"_step": record.history.step.num, **values}

"""Runs that trackers follow, and what the trackers' own files say of them."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from builders import Noisy, Regression, loader, make_model
from paceline import Callback, CheckpointPolicy
from paceline.log import Histogram, Image, Table, Text
from paceline.log.sinks import read_rows
from paceline.trackers import MLflow, SwanLab, Trackio, Wandb
from paceline.trackers.cursor import read_cursor

Found = dict[tuple[str, int], list[float]]
"""Values by name and step."""

ALL = ("mlflow", "swanlab", "trackio", "wandb")
_KINDS: dict[str, Any] = {kind.name: kind for kind in (MLflow, SwanLab, Trackio, Wandb)}


def offline(folder: Path) -> dict[str, str]:
    """Environment variables that keep the libraries on this machine, below a folder."""
    return {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "SWANLAB_MODE": "offline",
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_MODE": "offline",
    }


class Showing(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            self.log("picture", Image(torch.full((2, 3, 3), 0.5)))
            self.log("weights", Histogram(self.model[0].weight))
            self.log("note", Text(f"after {self.global_step} steps"))
            self.log("table", Table(["row", "loss"], [[1, 0.5]]))


def run(run_dir: Path, names: tuple[str, ...], *callbacks: Callback, **settings: Any) -> Any:
    """40 steps, a row each, a validation every 10 steps, a checkpoint every 10."""
    model = make_model()
    trainer = Showing(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        train_dataloader=loader(Noisy()),
        val_dataloader=loader(Noisy(23), shuffle=False),
        validate_every=10,
        log_every=1,
        max_steps=40,
        checkpoint=CheckpointPolicy(every_steps=10),
        progress=False,
        loggers=[_KINDS[name](project="testing", tags=["a"], group="g") for name in names],
        callbacks=callbacks,
        run_dir=run_dir,
        **settings,
    )
    return trainer.train(seed=5)


def run_offline(folder: Path, *args: Any) -> Any:
    """As `run`, in a process of its own: the helper that it is forked from may have been started
    before this test's environment was set."""
    os.environ.update(offline(folder))
    return run(*args)


class At(Callback):
    """Kills at a step, once the trackers have taken some rows: the trainer or the followers."""

    priority = 2000

    def __init__(self, step: int, rows: int, *, trainer: bool) -> None:
        self.step, self.rows, self.kills_trainer = step, rows, trainer

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        if trainer.global_step != self.step:
            return
        files = cursors_of(trainer.run_dir)
        wait_for_rows(files, self.rows)
        if self.kills_trainer:
            os.kill(os.getpid(), signal.SIGKILL)
        for cursor in filter(None, map(read_cursor, files)):
            os.kill(cursor.pid, signal.SIGKILL)


def cursors_of(run_dir: Path) -> list[Path]:
    """Where each tracker's cursor is, or will be."""
    folders = (path for path in (run_dir / "trackers").iterdir() if path.is_dir())
    return [path.with_suffix(".json") for path in folders]


def wait_for_rows(files: list[Path], rows: int, seconds: float = 60.0) -> None:
    """Waits until cursors have come to a row."""
    deadline = time.monotonic() + seconds
    while True:
        cursors = [cursor for cursor in map(read_cursor, files) if cursor is not None]
        if len(cursors) == len(files) and all(c.handed >= rows for c in cursors):
            return
        assert time.monotonic() < deadline, [(c.type, c.rows.rows, c.problem) for c in cursors]
        time.sleep(0.05)


def wait_until_gone(run_dir: Path, seconds: float = 60.0) -> None:
    """Waits until no follower of a killed trainer is left."""
    deadline = time.monotonic() + seconds
    pids = {
        cursor.pid for cursor in map(read_cursor, (run_dir / "trackers").glob("*.json")) if cursor
    }
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rows_of(run_dir: Path, names: Any = ("train/loss", "val/loss", "lr")) -> Found:
    """Values in metrics.jsonl."""
    found: Found = {}
    for row in read_rows(run_dir / "metrics.jsonl"):
        for name in set(names) & set(row):
            found.setdefault((name, row["step"]), []).append(row[name])
    return found


def read_back(name: str, folder: Path, run_dir: Path) -> Found:
    """Values in a tracker's own files."""
    found: Found = {}
    for key, step, value in _READERS[name](folder, run_dir):
        if key in ("train/loss", "val/loss", "lr"):
            found.setdefault((key, step), []).append(value)
    return found


def _wandb(folder: Path, run_dir: Path) -> Iterator[tuple[str, int, float]]:
    from paceline.trackers.libraries.wandb_runs import history

    steps = []
    for path in sorted(run_dir.glob("trackers/wandb/wandb/offline-run-*/run-*.wandb")):
        for values in history(path):
            steps.append(values["_step"])
            yield from ((key, values["step"], value) for key, value in values.items())
    assert steps == list(range(len(steps)))


def _mlflow(folder: Path, run_dir: Path) -> Iterator[tuple[str, int, float]]:
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)
        yield from database.execute("select key, step, value from metrics").fetchall()
    database.close()


def _trackio(folder: Path, run_dir: Path) -> Iterator[tuple[str, int, float]]:
    database = sqlite3.connect(folder / "trackio" / "testing.db")
    rows = database.execute("select run_id, step, metrics from metrics").fetchall()
    database.close()
    assert len({run for run, _, _ in rows}) == 1
    for _, step, metrics in rows:
        yield from ((key, step, value) for key, value in json.loads(metrics).items())


def _swanlab(folder: Path, run_dir: Path) -> Iterator[tuple[str, int, float]]:
    from swanlab.proto.swanlab.record.v1 import record_pb2

    from paceline.trackers.libraries.leveldb import records

    ids = set()
    for path in sorted(run_dir.glob("trackers/swanlab/run-*/run-*.swanlab")):
        ids.add(path.name)
        for data in records(path.read_bytes()):
            record: Any = record_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "scalar":
                yield record.scalar.key, record.scalar.step, record.scalar.value.number
    assert len(ids) == 1


_READERS = {"mlflow": _mlflow, "swanlab": _swanlab, "trackio": _trackio, "wandb": _wandb}

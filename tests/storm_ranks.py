"""A rank of the kill storm: what it trains, what it tells of itself, and where it kills itself."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from builders import Noisy, Regression, loader, make_model
from faults import DOES_NOT_ANSWER, unreadable_from
from paceline import Callback, CheckpointPolicy, MetricMonitor, Parallel, reading
from paceline.callbacks import AveragedWeights
from paceline.checkpoint import native_engine
from paceline.checkpoint.files import Disk
from paceline.log import sinks
from paceline.world.signals import STOPS, leave_at_once_on_signals

STEPS = 24
PAUSE = 0.005  # seconds a batch, so that not only saves are killed
OPERATIONS = (
    *("mkdir", "create", "write", "fsync", "close", "rename", "unlink", "rmdir"),
    "fsync_folder",
)
COUNTED = ("file operation", "power cut", "one rank")  # which come at an operation that writes
PLACES = ("start-up", "training", "validation", "save", "end")


@dataclass(frozen=True)
class Scenario:
    """A kind of run. Its numbers are the same whatever happens to it."""

    ranks: int
    asynchronous: bool
    every: int  # steps between two saves
    shards: int = 1  # ranks that share a copy of the model

    def __str__(self) -> str:
        kind = "background" if self.asynchronous else "synchronous"
        spread = ", sharded" * (self.shards > 1)
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}{spread}, {kind} saves"


@dataclass(frozen=True)
class Kill:
    """One kill to come.

    Attributes:
        kind: one of those that `storm.py` describes.
        at: the fraction of a usual attempt's time, or the number of the operation.
        rank: whose operations are counted.
    """

    kind: str
    at: float
    rank: int = 0


# What ranks tell the storm, in shared memory that survives them


class Beacon:
    """Where a rank is: written by the rank, read when it is dead."""

    FORM = struct.Struct("iiiiiiq")
    FIELDS = ("place", "saving", "from_step", "saves", "published", "operations", "rows")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.FORM.size)
        self.reset()

    def reset(self) -> None:
        self.place = self.saving = self.saves = self.operations = self.rows = 0
        self.from_step = self.published = -1
        self.send()

    def send(self) -> None:
        self.FORM.pack_into(self._memory, 0, *(getattr(self, name) for name in self.FIELDS))

    def receive(self) -> None:
        values = self.FORM.unpack_from(self._memory)
        for name, value in zip(self.FIELDS, values, strict=True):
            setattr(self, name, value)

    @property
    def where(self) -> str:
        return "save" if self.saving else PLACES[self.place]


class Reporter(Callback):
    """Keeps a rank's beacon; has no state."""

    def __init__(self, beacon: Beacon) -> None:
        self.beacon = beacon

    def _at(self, place: int) -> None:
        self.beacon.place = place
        self.beacon.send()

    def on_train_start(self, trainer: Any) -> None:
        self.beacon.from_step = trainer.global_step
        self._at(1)

    def on_validation_start(self, trainer: Any) -> None:
        self._at(2)

    def on_validation_end(self, trainer: Any) -> None:
        self._at(1)

    def on_train_end(self, trainer: Any) -> None:
        self._at(4)


class StormDisk(Disk):
    """A disk that calls `after(n, name)` behind its n-th operation.

    It knows what a power cut would take: notes of it stand in a file beside the run.
    """

    def __init__(self, notes: Path | None, after: Callable[[int, str], None]) -> None:
        self.count = 0
        self._after = after
        self._notes = notes
        self._open: dict[int, str] = {}
        self._renames: list[tuple[str, str]] = []

    def done(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "create":
            self._open[result] = str(args[0])
        elif name == "fsync":
            self._open.pop(args[0], None)
        elif name == "rename":
            self._renames.append((str(args[0]), str(args[1])))
        elif name == "fsync_folder":
            self._renames = [r for r in self._renames if str(Path(r[1]).parent) != str(args[0])]
        self.count += 1
        if self._notes is not None:
            self._notes.write_text(json.dumps([list(self._open.values()), self._renames[::-1]]))
        self._after(self.count, name)


def _watched(name: str) -> Callable[..., Any]:
    def operation(self: StormDisk, *args: Any) -> Any:
        result = None if name.startswith("fsync") else getattr(Disk, name)(self, *args)
        self.done(name, args, result)
        return result

    return operation


for _name in OPERATIONS:
    setattr(StormDisk, _name, _watched(_name))


class Noting(Regression):
    """Writes the sample ids of every micro-batch down before it is used."""

    ids_file: int

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not self.muted:
            line = json.dumps([self.global_step, batch_idx, batch[2].tolist()])
            os.write(self.ids_file, line.encode() + b"\n")
        time.sleep(PAUSE)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(PAUSE)
        super().validation_step(batch, batch_idx)


def build(scenario: Scenario, run_dir: Path, *callbacks: Any) -> Noting:
    """10 micro-batches an epoch (97 samples), accumulation 3 on one rank, 2 on two."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return Noting(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        train_dataloader=loader(Noisy(), 10 if scenario.ranks == 1 else 8),
        val_dataloader=loader(Noisy(23), 4, shuffle=False),
        gradient_accumulation_steps=3 if scenario.ranks == 1 else 2,
        max_grad_norm=1.0,
        metric_monitor=MetricMonitor(),
        validate_every=3,
        callbacks=[AveragedWeights(decay=0.9), *callbacks],
        checkpoint=CheckpointPolicy(
            every_steps=scenario.every, keep_last=1, asynchronous=scenario.asynchronous
        ),
        max_steps=STEPS,
        parallel=Parallel(dp_shard=scenario.shards),
        progress=False,
        log_every=2,
        run_dir=run_dir,
    )


def train(scenario: Scenario, run_dir: Path, rank: int, kill: Kill | None, beacon: Beacon) -> None:
    """One rank of one attempt."""

    def after(n: int, name: str) -> None:
        beacon.operations = n
        beacon.send()
        if kill is None or kill.kind not in COUNTED or rank != kill.rank:
            return
        if beacon.saves >= 2 or kill.kind == "power cut":
            counted[0] += 1
            if counted[0] == kill.at:
                if kill.kind == "one rank":
                    os.kill(os.getpid(), signal.SIGKILL)
                os.killpg(0, signal.SIGKILL)

    counted = [0]
    notes = run_dir / f"notes-{rank}.json" if kill is not None else None
    disk = StormDisk(notes, after)
    native_engine.Disk = lambda: disk  # type: ignore[misc, assignment]
    reading.PAUSES = (0, 0)
    if kill is not None and kill.kind in ("read error", "no answer") and rank == kill.rank:
        code = DOES_NOT_ANSWER[int(kill.at) % len(DOES_NOT_ANSWER)]
        for_good = kill.kind == "no answer"
        reading.reader = unreadable_from(run_dir / "run", int(kill.at), code, for_good)
    _watch_saves(beacon)
    trainer = build(scenario, run_dir / "run", Reporter(beacon))
    number = len(list(run_dir.glob(f"ids-{rank}-*")))
    trainer.ids_file = os.open(run_dir / f"ids-{rank}-{number}", os.O_CREAT | os.O_WRONLY)
    trainer.train(seed=11)


def _watch_saves(beacon: Beacon) -> None:
    """Tells the beacon of saves, and of how far the rows were synced."""
    write, sync = native_engine.NativeEngine._write, sinks.RowFile.sync

    def watched_write(self: Any, job: Any) -> None:
        beacon.saving, beacon.saves = 1, beacon.saves + 1
        beacon.send()
        write(self, job)
        beacon.saving = 0
        if job.error is None:
            beacon.published = job.step
        beacon.send()

    def watched_sync(self: Any) -> None:
        size = self.position()["bytes"]
        sync(self)
        if self.path.name == sinks.METRICS_FILE:
            beacon.rows = size
            beacon.send()

    native_engine.NativeEngine._write = watched_write  # type: ignore[method-assign]
    sinks.RowFile.sync = watched_sync  # type: ignore[method-assign]


def be_a_rank(
    scenario: Scenario,
    folder: Path,
    rank: int,
    group: int,
    kill: Kill | None,
    beacon: Beacon,
    port: int,
) -> None:
    """Never returns: this is a fork of the storm."""
    code = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, group)
        output = os.open(folder / f"output-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for number in STOPS:  # as for a command that a shell starts
            signal.signal(number, signal.SIG_DFL)
        leave_at_once_on_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        if scenario.ranks > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(scenario.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
            }
        train(scenario, folder, rank, kill, beacon)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)

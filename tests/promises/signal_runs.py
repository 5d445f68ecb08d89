"""The runs of P6: each rank trains, and sends a signal where and to whom it is told, once."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from builders import Noisy, Regression, loader, make_model
from endings import saved_steps
from paceline import Callback, CheckpointPolicy, MetricMonitor
from paceline.callbacks import AveragedWeights, TimeLimit
from paceline.checkpoint import native_engine
from paceline.checkpoint.files import Disk

STEPS = 14


@dataclass(frozen=True)
class Sent:
    """A signal to send, or something else to do, once in a run's whole life.

    Attributes:
        at: "start", "train start", "training", "validation", "data", "save", "end" or "teardown".
        numbers: the signals, each after `pause` seconds.
        to: "me", or "group" (this rank and its loader workers).
        rank: which rank does it.
        operation: at "save": the file operation before which it comes.
        behind: a step whose checkpoint, written in the background, has to be there before.
    """

    at: str = "nowhere"
    numbers: tuple[int, ...] = (signal.SIGTERM,)
    to: str = "me"
    rank: int = 0
    operation: int = 5
    pause: float = 0.0
    behind: int | None = None


@dataclass(frozen=True)
class Run:
    """What a run is made of, beside what happens to it."""

    asynchronous: bool = True
    workers: int = 0
    slow_sample: float = 0.0  # seconds that one sample takes
    pause: float = 0.0  # seconds that each step takes
    limit: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Sender:
    """Does what is to be done, if it has never been done in this folder."""

    def __init__(self, sent: Sent, folder: Path, main: int) -> None:
        self.what, self.where, self.process = sent, folder, main

    def __call__(self, at: str) -> None:
        if at != self.what.at or os.environ.get("RANK", "0") != str(self.what.rank):
            return
        try:
            os.close(os.open(self.where / "sent", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        while self.what.behind not in (None, *saved_steps(self.where / "run")):
            time.sleep(0.01)
        for number in self.what.numbers:
            if self.what.to == "group":
                os.killpg(os.getpgid(self.process), number)
            else:
                os.kill(self.process, number)
            time.sleep(self.what.pause)

    def wait(self) -> None:
        """Returns when it is done."""
        until = time.monotonic() + 20
        while not (self.where / "sent").exists():
            assert time.monotonic() < until
            time.sleep(0.001)


class Rows(Noisy):
    """Noisy rows, of which number 40 takes long and is where "data" is."""

    def __init__(self, send: Sender, seconds: float) -> None:
        super().__init__()
        self.tell, self.wait = send, seconds  # by other names: no part of what the run is

    def __getitem__(self, index: int) -> Any:
        if index == 40:
            self.tell("data")
            time.sleep(self.wait)
        return super().__getitem__(index)


class Signalled(Regression):
    """Sends from within its own steps."""

    send: Sender
    pause = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 5:
            self.send("training")
        if self.global_step == 8 and self.send.what.at == "save":
            self.send.wait()  # the save of step 8 may go on in the background
        time.sleep(self.pause)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == 6 and batch_idx == 1:
            self.send("validation")
            time.sleep(4 * self.pause)
        super().validation_step(batch, batch_idx)


class Sending(Callback):
    """Sends at events."""

    def __init__(self, send: Sender) -> None:
        self.send = send

    def on_setup(self, trainer: Any) -> None:
        self.send("start")

    def on_train_start(self, trainer: Any) -> None:
        self.send("train start")

    def on_train_end(self, trainer: Any) -> None:
        self.send("end")

    def on_teardown(self, trainer: Any) -> None:
        self.send("teardown")


class SendingDisk(Disk):
    """Sends before the n-th operation of the save of step 8, and of no other."""

    def __init__(self, send: Sender) -> None:
        self.send, self.count = send, 0

    def create(self, path: Path) -> int:
        self._note(path)
        return super().create(path)

    def fsync(self, fd: int) -> None:
        self._note(None)

    def fsync_folder(self, path: Path) -> None:
        self._note(None)

    def rename(self, source: Path, target: Path) -> None:
        self._note(target)
        super().rename(source, target)

    def mkdir(self, path: Path) -> None:
        self._note(path)
        super().mkdir(path)

    def _note(self, path: Path | None) -> None:
        if self.count or (path is not None and "step_00000008" in str(path)):
            self.count += 1
        if self.count == self.send.what.operation:
            self.send("save")


def trainer_of(folder: Path, run: Run, sent: Sent) -> Signalled:
    send = Sender(sent, folder, os.getpid())
    native_engine.Disk = lambda: SendingDisk(send)  # type: ignore[misc, assignment]
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    callbacks: list[Any] = [AveragedWeights(decay=0.9), Sending(send)]
    if run.limit is not None:
        callbacks.append(TimeLimit(run.limit))
    trainer = Signalled(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
        train_dataloader=loader(Rows(send, run.slow_sample), 8, num_workers=run.workers),
        val_dataloader=loader(Noisy(23), 3, shuffle=False),
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        metric_monitor=MetricMonitor(),
        validate_every=3,
        callbacks=callbacks,
        checkpoint=CheckpointPolicy(
            every_epochs=None, every_steps=4, save_best=False, asynchronous=run.asynchronous
        ),
        max_steps=STEPS,
        progress=False,
        log_every=2,
        run_dir=folder / "run",
        **run.extra,
    )
    trainer.send, trainer.pause = send, run.pause
    return trainer


def train(folder: Path, run: Run, sent: Sent) -> str:
    """One rank of one start; returns why it stopped, if it did not leave."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.dump_traceback_later(45)
    return trainer_of(folder, run, sent).train(seed=11).stopped_by

"""Runs on a source of the user's own: a simulator whose episodes differ in length.

What is here is what an outsider writes: it uses public names only.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from builders import make_model
from paceline import CheckpointPolicy, Draw, StopCollecting, Trainer, WindowSize, World
from paceline.trainer.callback import Callback

EPOCHS = 3


@dataclass(frozen=True)
class Sent:
    """A signal to send, once in a run's whole life, at a simulated step.

    Attributes:
        number: the signal.
        sender: the rank that sends it, in the middle of its draw.
        target: the rank that gets it.
        window: of the sender's, in epoch 1.
        lasting: seconds that the sender's draw then takes, if nobody stops it.
        asks: whether the sender asks whether to stop.
    """

    number: int
    sender: int = 0
    target: int = 0
    window: int = 1
    lasting: float = 0.0
    asks: bool = True


class Walk:
    """A walker that starts anew once it has gone far; how long that takes differs."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.place = np.zeros(8, dtype=np.float32)

    def step(self, push: float) -> np.ndarray:
        """Moves in place; returns where it was."""
        before = self.place.copy()
        self.place += self.random.standard_normal(8, dtype=np.float32) + 0.1 * push
        return before

    def is_far(self) -> bool:
        return bool(np.abs(self.place).max() > 2.5)


class Episodes:
    """Training windows of episodes, walked with the model that is trained (a source).

    A rank has 3 + `rank` windows in an epoch, and as many episodes in each as its generator says.
    """

    micro_batches = None
    windows_per_epoch = None
    per_rank = True

    def __init__(
        self, model: nn.Module, world: World, seed: int, stopping: Callable[[], bool], during: Any
    ) -> None:
        self.model, self.stopping, self.during = model, stopping, during
        self.windows = 3 + world.dp_rank
        self.walk = Walk(seed * 100 + world.dp_rank)
        self.epoch, self.window = 0, 0
        self.plan: list[tuple[str, str]] = [("episodes end beyond 2.5", "far")]
        self.identity: dict[str, Any] = {"far": 2.5}

    def start_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.window = epoch, 0

    def draw(self) -> Draw | None:
        if self.window == self.windows:
            return None
        episodes = [self.episode() for _ in range(self.walk.random.integers(1, 4))]
        self.window += 1
        return Draw.of(episodes)

    def episode(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.walk.place[:] = 0
        seen = []
        while not self.walk.is_far():
            self.during(self)
            if self.stopping():
                raise StopCollecting
            with torch.no_grad():
                push = self.model(torch.from_numpy(self.walk.place)).item()
            seen.append(self.walk.step(push + torch.randn(()).item()))
        places = torch.from_numpy(np.stack(seen))
        return places, places.sum(1, keepdim=True)

    def at_end(self, *, keep: bool) -> bool:
        return self.window == self.windows

    def batches_done(self) -> int:
        return 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "window": self.window,
            "random": self.walk.random.bit_generator.state,
            "place": self.walk.place.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.window = state["epoch"], state["window"]
        self.walk.random.bit_generator.state = state["random"]
        self.walk.place[:] = state["place"]

    def close(self) -> None:
        pass


class Simulator:
    """Makes the episodes of each run."""

    def __init__(self, model: nn.Module, during: Any) -> None:
        self.model, self.during = model, during

    def open_source(
        self, size: WindowSize, seed: int, world: World, stopping: Callable[[], bool]
    ) -> Episodes:
        return Episodes(self.model, world, seed, stopping, self.during)


class Sender:
    """Sends in the middle of a draw, unless it has been sent already."""

    def __init__(self, folder: Path, sent: Sent | None) -> None:
        self.folder, self.sent = folder, sent
        (folder / f"pid{_rank()}").write_text(str(os.getpid()))

    def __call__(self, source: Episodes) -> None:
        sent = self.sent
        if (
            sent is None
            or sent.sender != _rank()
            or (source.epoch, source.window)
            != (
                1,
                sent.window,
            )
        ):
            return
        try:
            os.close(os.open(self.folder / "sent", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        time.sleep(0.3)  # by now the other rank waits
        os.kill(int((self.folder / f"pid{sent.target}").read_text()), sent.number)
        until = time.monotonic() + sent.lasting
        while time.monotonic() < until:
            time.sleep(0.01)
            if sent.asks and source.stopping():
                raise StopCollecting


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


class CountEpochs(Callback):
    """Counts what has begun, as a callback with a state does."""

    begun = 0

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self.begun += 1

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun = state["begun"]


def trainer_of(folder: Path, sent: Sent | None = None, **changes: Any) -> Trainer:
    model = make_model()
    return Trainer(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss_fn=nn.MSELoss(),
        train_dataloader=Simulator(model, Sender(folder, sent)),
        callbacks=[CountEpochs()],
        checkpoint=CheckpointPolicy(every_epochs=None, every_steps=2, save_best=False),
        epochs=EPOCHS,
        progress=False,
        log_every=1,
        run_dir=folder / "run",
        **changes,
    )


def train(folder: Path, sent: Sent | None) -> str:
    """One rank of one start; returns why it stopped, if it did not leave."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return trainer_of(folder, sent).train(seed=11).stopped_by

"""The command line in processes of its own, on a recipe that trains for as long as it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from command import Paceline
from paceline.testing import Ranks

CODE = '''
import os, signal, sys, time
import torch
from torch import nn
from torch.utils.data import Dataset
from paceline import Trainer
from paceline.checkpoint.files import Disk

class Points(Dataset):
    def __init__(self, n: int = 64):
        self.x = torch.linspace(-1, 1, n).view(-1, 1)
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return self.x[i], 2 * self.x[i]

class Fit(Trainer):
    """Sleeps `pause` seconds a step; on rank `bad`, `how` it fails at step 3."""
    def __init__(self, *, pause: float = 0.0, bad: int = -1, how: str = "", **settings):
        super().__init__(**settings)
        self.pause, self.bad, self.how = pause, bad, how

    def on_train_start(self):
        print(f"hello from rank {self.world.rank}", flush=True)
        open(f"pid{self.world.rank}", "w").write(str(os.getpid()))

    def on_step_end(self, metrics):
        open(f"stepped{self.world.rank}", "w").close()
        if self.global_step == 3:
            open(f"three{self.world.rank}", "w").close()
            if self.world.rank == self.bad and self.how == "raise":
                raise ValueError("a fault on purpose")
            if self.world.rank == self.bad and self.how == "fill_disk":
                Disk.free_bytes = lambda *_: 100
            if self.world.rank == self.bad and self.how == "stop_launcher":
                os.kill(os.getppid(), signal.SIGTERM)
            if self.world.rank == self.bad and self.how == "kill_once":
                if not os.path.exists("killed"):
                    open("killed", "w").close()
                    os.kill(os.getpid(), 9)
        time.sleep(self.pause)
'''
RECIPE = """\
code: toy.py
run: {project: p, name: n}
trainer: {_target_: toy.Fit, epochs: 2, progress: false}
model: {_target_: torch.nn.Linear, in_features: 1, out_features: 1}
loss_fn: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
train_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: toy.Points}
  batch_size: 4
"""


@pytest.fixture
def paceline(tmp_path: Path, ranks: Ranks):
    (tmp_path / "toy.py").write_text(CODE)
    (tmp_path / "toy.yaml").write_text(RECIPE)
    runner = Paceline(tmp_path, ranks)
    yield runner
    runner.close()


@pytest.fixture
def wait_for(tmp_path: Path) -> Callable[[str], Path]:
    """Waits until a file appears in the folder."""
    import time

    def wait(name: str) -> Path:
        deadline = time.monotonic() + 120
        while not (tmp_path / name).exists():
            assert time.monotonic() < deadline, f"{name} never came"
            time.sleep(0.05)
        return tmp_path / name

    return wait

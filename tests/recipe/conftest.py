"""A small recipe with code of its own, written to a temporary folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from builders import code_forgotten

CODE = """
import torch
from torch import nn
from torch.utils.data import Dataset

from paceline import Callback, Trainer
from paceline.registry import register


class Points(Dataset):
    def __init__(self, n: int = 20, noise: float = 0.0) -> None:
        self.x = torch.linspace(-1, 1, n).view(-1, 1)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int):
        x = self.x[i] + self.noise * torch.randn(1)
        return x, 2 * x


class Net(nn.Module):
    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x):
        return self.layers(x)


class Fit(Trainer):
    pass


@register("trainer", "scaled")
class Scaled(Trainer):
    def __init__(self, *, scale: float = 1.0, **settings) -> None:
        super().__init__(**settings)
        self.scale = scale


class Batches:
    def __iter__(self):
        yield torch.zeros(2, 1), torch.zeros(2, 1)


class Gan(Trainer):
    def training_step(self, batch, batch_idx):
        x, y = batch
        made = self.model["generator"](x)
        return {
            "generator": self.loss_fn(made, y),
            "discriminator": self.loss_fn(self.model["discriminator"](made.detach()), y),
        }


class Counter(Callback):
    pass


def make_net(width: int) -> nn.Module:
    return Net(width)


def make_nothing() -> int:
    return 3


def decayed(model: nn.Module, lr: float):
    return torch.optim.SGD(model.parameters(), lr=lr)


def own_loss(outputs, targets, power: int = 2):
    return ((outputs - targets).abs() ** power).mean()
"""

RECIPE = """\
code: toy.py
trainer:
  epochs: 2
  progress: false
model:
  _target_: toy.Net
  width: 4
loss_fn:
  _target_: torch.nn.MSELoss
optimizer:
  _target_: torch.optim.AdamW
  lr: 0.01
train_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: toy.Points}
  batch_size: 8
  shuffle: true
"""


@pytest.fixture(autouse=True)
def _forget_code():
    """Code that recipes load neither stays imported nor on the path; runs go to tmp_path."""
    with code_forgotten():
        yield


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the small recipe into the working folder, with top-level keys replaced."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | None = None, **keys: object) -> Path:
        (tmp_path / "toy.py").write_text(CODE)
        path = tmp_path / "toy.yaml"
        if keys:
            text = yaml.safe_dump(yaml.safe_load(text or RECIPE) | keys, sort_keys=False)
        path.write_text(RECIPE if text is None else text)
        return path

    return write

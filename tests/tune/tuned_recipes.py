"""The smallest recipe that is worth a study: a line, fitted in 20 steps with a row each."""

from __future__ import annotations

from pathlib import Path

CODE = """
import torch
from torch.utils.data import Dataset
from paceline import Trainer

class Points(Dataset):
    def __init__(self, n: int = 40):
        self.x = torch.linspace(-1, 1, n).view(-1, 1)
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return self.x[i], 2 * self.x[i] + 0.1 * torch.sin(9 * self.x[i])
"""
RECIPE = """\
code: toy.py
run: {project: p, name: s}
trainer: {epochs: 10, progress: false, log_every: 1}
model: {_target_: torch.nn.Linear, in_features: 1, out_features: 1}
loss_fn: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
train_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: toy.Points}
  batch_size: 20
  shuffle: true
val_dataloader:
  _target_: torch.utils.data.DataLoader
  dataset: {_target_: toy.Points, n: 10}
  batch_size: 10
"""
TUNE = """\
tune:
  metric: val/loss
  trials: 6
  sampler: random
  pruner: {type: median, n_startup_trials: 2, n_warmup_steps: 2}
  reports: 10
  first: [{optimizer.lr: 0.3}, {optimizer.lr: 0.2}]
  space:
    optimizer.lr: {float: [1.0e-3, 0.5], log: true}
    train_dataloader.batch_size: [10, 20]
"""


def write(folder: Path, tune: str = TUNE, recipe: str = RECIPE, *, code: str = CODE) -> Path:
    """Writes the recipe with its code; returns the recipe's file."""
    (folder / "toy.py").write_text(code)
    (folder / "toy.yaml").write_text(recipe + tune)
    return folder / "toy.yaml"

"""A template project: `run.yaml`, `model.py` and `util.py` in one folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from builders import code_forgotten
from command import Paceline
from paceline.testing import Ranks

MODEL = """
from torch import nn

class MLP(nn.Module):
    def __init__(self, hparams, device="cpu"):
        super().__init__()
        nodes = hparams["nodes"]
        layers = [nn.Linear(1, nodes), nn.GELU()]
        for _ in range(hparams["layers"] - 1):
            layers += [nn.Linear(nodes, nodes), nn.GELU()]
        self.net = nn.Sequential(*layers, nn.Linear(nodes, 1)).to(device)

    def forward(self, x):
        return self.net(x)
"""
UTIL = """
import torch
from torch.utils.data import TensorDataset

def load_data():
    x = torch.linspace(-1, 1, 40).view(-1, 1)
    y = torch.sin(3 * x)
    return TensorDataset(x[::2], y[::2]), TensorDataset(x[1::4], y[1::4])
"""
RUN = """\
project: Parity
device: cpu
seeds: [1, 2]
net: model.MLP
optimizer: torch.optim.adamw.AdamW
scheduler: torch.optim.lr_scheduler.CosineAnnealingLR
criterion: torch.nn.MSELoss
criterion_config: {}
data: util.load_data
epochs: 3
batch_size: 8
net_config:
  nodes: 8
  layers: 2
optimizer_config:
  lr: 1e-2
scheduler_config:
  T_max: 3
  eta_min: 1.e-5
early_stopping_config:
  enabled: false
  patience: 10
  mode: min
  min_delta: 0.0001
checkpoint_config:
  enabled: false
  save_every_n_epochs: 10
  keep_last_k: 3
  save_best: true
  monitor: val_loss
  mode: min
monitor: val_loss
wandb: false
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder is the project's."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("model.py", MODEL), ("util.py", UTIL), ("run.yaml", RUN)):
        (tmp_path / name).write_text(text)
    with code_forgotten():
        yield tmp_path


@pytest.fixture
def paceline(project: Path, ranks: Ranks) -> Iterator[Paceline]:
    """The command line, in processes of its own."""
    commands = Paceline(project, ranks)
    yield commands
    commands.close()

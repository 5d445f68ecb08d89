"""The runs of the tests on ranks that act as one: small, quick, and bad if they are told to be."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Trainer
from paceline.trainer.callback import Callback
from paceline.world.dtensors import whole

BAD = 17  # the sample whose loss is not a number


class Small(Trainer):
    """Squares; sample BAD's loss is NaN if `bad` says so."""

    bad = False
    jitter = 0.0

    def loss(self, batch: Any) -> torch.Tensor:
        x, y, ids = batch
        time.sleep(random.Random(time.monotonic()).random() * self.jitter)
        loss = (self.model(x) - y).square().mean()
        return loss * torch.nan if self.bad and not self.muted and BAD in ids else loss


class Rooted(nn.Module):
    """Nothing repeats; up to 8 ranks have a part of its weight, whose gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x @ self.weight.T - 100).relu())


def network(kind: str = "plain") -> nn.Module:
    torch.manual_seed(1)
    if kind == "rooted":
        return Rooted().double()
    if kind == "dead":  # a ReLU lets no gradient through, and so no NaN, to the smallest parameter
        first = nn.Linear(3, 1)
        with torch.no_grad():
            first.bias.fill_(-100.0)
        return nn.Sequential(first, nn.ReLU(), nn.Linear(1, 2)).double()
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def small(*callbacks: Callback, rows: int = 24, batch: int = 2, **settings: Any) -> Small:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    data = TensorDataset(x, y, torch.arange(rows))
    model = settings.pop("model", None) or network()
    fused = settings.pop("fused", False)
    return Small(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused),
        train_dataloader=DataLoader(data, batch),
        val_dataloader=DataLoader(data, batch),
        callbacks=list(callbacks),
        **{"max_steps": 12, "progress": False, **settings},
    )


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [whole(p.detach()).clone() for p in trainer.named_models()["model"].parameters()]

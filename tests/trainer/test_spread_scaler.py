"""float16 in spread models: the scale, and what overflows, are the same on all ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kept import EachStep, Kept, run
from paceline import Callback, Parallel, Trainer
from paceline.testing import Ranks
from paceline.world.dtensors import local_part
from small import settings

LAYOUTS = [  # for four ranks, and the batch of each that makes eight samples
    (Parallel(dp_shard=2), 2),
    (Parallel(tensor=2, dp_shard=2), 4),
]
SGD = {"kind": "SGD", "lr": 2.0, "momentum": 0.9}
FUSED = {"kind": "AdamW", "lr": 0.01, "fused": True}


class Net(nn.Module):
    tp_plan = {"up": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.norm(x)).tanh())


class Fit(Trainer):
    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        loss = 0.01 * (self.model(x).float() - y).square().mean()
        alone = self.world.size == 1 or self.world.rank == 2
        return loss * torch.nan if self.global_step == 3 and alone else loss


class Spoils(Callback):
    """Puts a NaN, as of two infinities, into one rank's part of a gradient, in the second step."""

    def on_after_backward(self, trainer: Any) -> None:
        if trainer.global_step == 1 and trainer.world.rank == min(1, trainer.world.size - 1):
            local_part(trainer.get_module("model.norm").weight.grad)[0] = torch.nan


def fit(parallel: Parallel | None, batch: int, kind: str, **how: Any) -> tuple[Kept, EachStep]:
    model, each = Net(), EachStep()
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
    options = {
        "optimizer": getattr(torch.optim, kind)(model.parameters(), **how),
        "train_dataloader": DataLoader(TensorDataset(x, x.flip(1)), batch, shuffle=True),
        "epochs": 1,
        "max_grad_norm": 1.0,
        "precision": "fp16",
        "on_nonfinite": "skip",
        "callbacks": [Spoils(), each],
        "parallel": parallel,
    }
    return run(Fit(**settings(model, **options)), seed=3), each


def fit_all() -> list[Any]:
    return [fit(layout, batch, **how) for layout, batch in LAYOUTS for how in (SGD, FUSED)]


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks: Ranks) -> None:
    """So does a loss that is no number. Between those the ranks do what one process does."""
    alone = [fit(None, 8, **how) for how in (SGD, FUSED)] * len(LAYOUTS)
    for found in ranks(fit_all, 4):
        for (kept, each), (expected, once) in zip(found, alone, strict=True):
            assert each.scales == once.scales
            assert each.scales == [2.0**16, 2.0**15, 2.0**15, 2.0**14, 2.0**14, 2.0**14]
            assert [a == b for a, b in pairwise(each.weights)] == [
                True, False, True, False, False,
            ]  # fmt: skip
            for name, tensor in expected.weights.items():
                torch.testing.assert_close(kept.weights[name], tensor, rtol=0.02, atol=0.01)

"""Activation checkpointing: less is kept, and not a bit is different."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from builders import Count
from paceline import Parallel, Trainer
from paceline.errors import ConfigError
from paceline.testing import Ranks, bits
from small import fitted


class Drifting(nn.Module):
    """Computes with two buffers and changes them, one in place and one not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(1))
        self.register_buffer("shift", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.factor.clone() + self.shift
        self.factor *= 0.9
        self.shift = self.shift + y.detach().mean()
        return y


def network() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(
            nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(4), Drifting(), nn.Tanh()
        )
        for _ in range(3)
    ]
    return nn.Sequential(*blocks, nn.Linear(4, 1))


class Fit(Trainer):
    """Counts the operations of its last backward pass."""

    def backward(self, loss: Any, only: str | None = None) -> None:
        with Count() as count:
            super().backward(loss, only)
        self.calls = count.calls


def fit(which: Any, **parallel: Any) -> Fit:
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    model = network()
    options = {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "train_dataloader": DataLoader(TensorDataset(x, x[:, :1]), 4, shuffle=True),
        "epochs": 1,
        "parallel": Parallel(activation_checkpointing=which, **parallel),
    }
    return fitted(Fit, model=model, **options)


def test_all_is_repeated_or_what_is_cheap_and_dropout_draws_as_before() -> None:
    plain, full, selective = fit(None), fit("full"), fit("selective")
    products = [run.calls.get("aten.addmm", 0) for run in (plain, full, selective)]
    assert products == [0, 3, 0]
    tanhs = [run.calls.get("aten.tanh", 0) for run in (plain, full, selective)]
    assert tanhs == [0, 6, 6]
    for run in (full, selective):
        assert bits(run.model.state_dict()) == bits(plain.model.state_dict())
        assert "forward" not in vars(run.model[0]), "the model is as it was"


def sharded(which: Any) -> Any:
    return bits(dict(fit(which, dp_shard=2).model.state_dict()))


def test_sharded_blocks_are_repeated_too(ranks: Ranks) -> None:
    assert ranks(sharded, 2, "full") == ranks(sharded, 2, None)


def test_a_model_without_blocks_and_an_unknown_word_are_refused() -> None:
    with pytest.raises(ConfigError, match="'all': expected 'full', 'selective', a fraction"):
        fit("all")
    trainer = fit(None)
    trainer.model, trainer.parallel = nn.Linear(4, 1), Parallel(activation_checkpointing="full")
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters())
    with pytest.raises(ConfigError, match="'model' has no repeated blocks"):
        trainer.train()

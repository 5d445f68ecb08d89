"""Nothing is trained by one rank alone: each trainable parameter is replicated or sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from paceline import Parallel, Trainer
from paceline.errors import ConfigError
from paceline.testing import Ranks
from paceline.world.dtensors import whole
from small import batches, settings


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(self.stem(x))
        return y + self.late if hasattr(self, "late") else y


class Late(Trainer):
    """Gives its model one more parameter when the model is in place."""

    def on_train_start(self) -> None:
        model: Any = self.named_models()["model"]
        model.late = nn.Parameter(torch.zeros(1))
        self.optimizer.add_param_group({"params": [model.late]})  # pyright: ignore


class Stranger(Trainer):
    """Trains a parameter that is in no model."""

    def on_train_start(self) -> None:
        self.scale = nn.Parameter(torch.ones(1))
        self.optimizer.add_param_group({"params": [self.scale]})  # pyright: ignore

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) * self.scale


class Unfreezes(Trainer):
    """Trains its model's stem from the second epoch on."""

    def on_train_epoch_start(self) -> None:
        self.named_models()["model"].get_submodule("stem").requires_grad_(self.current_epoch > 0)

    def on_train_end(self) -> None:
        state = self.named_models()["model"].state_dict()
        self.ended = {name: whole(p).detach() for name, p in state.items()}


def run(kind: type[Trainer], shard: int, size: int = 1) -> Any:
    model = Net()
    model.stem.requires_grad_(kind is not Unfreezes)
    trainer = kind(
        **settings(
            model, parallel=Parallel(dp_shard=shard), train_dataloader=batches(24, 4 // size)
        )
    )
    try:
        trainer.train()
    except ConfigError as error:
        return str(error)
    return getattr(trainer, "ended", None)


def run_all() -> list[Any]:
    kinds = (Late, Stranger, Unfreezes)
    return [run(kind, shard, 2) for shard in (1, 2) for kind in kinds]


def test_what_only_one_rank_would_train_is_named(ranks: Ranks) -> None:
    """Replicated or sharded; DDP does not hear of what is unfrozen later either, FSDP2 does."""
    for late, stranger, unfrozen, late_too, stranger_too, trained in ranks(run_all, 2):
        for message in (late, late_too):
            assert "only this rank has the gradient of model.late: " in message
        for message in (stranger, stranger_too):
            assert "only this rank has the gradient of a parameter of 'optimizer': " in message
        assert "the gradient of model.stem.weight, model.stem.bias: " in unfrozen
        for name, tensor in run(Unfreezes, 1).items():
            torch.testing.assert_close(trained[name], tensor)

"""Dream Trainer at home: its acceptance rows on layouts, presets and what they do to a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader, TensorDataset

from paceline import Callback, DeviceParameters, Trainer
from paceline.errors import ConfigError
from small import batches, fitted, line, settings


def test_DT_28_what_does_not_exist_is_refused_by_its_name() -> None:
    for theirs, ours in (
        ("tensor_parallel", "tensor"),
        ("context_parallel", "context"),
        ("pipeline_parallel", "pipeline"),
    ):
        with pytest.raises(ConfigError, match=f"{ours}=2 does not exist yet"):
            DeviceParameters(**{theirs: 2})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="cpu_offload=True does not exist yet"):
        DeviceParameters.FSDP(cpu_offload=True)


class Tied(nn.Module):
    """An embedding that is the output layer too, and two buffers of which one is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight
        self.register_buffer("saved", torch.arange(4.0))
        self.register_buffer("unsaved", torch.arange(4.0) + 1, persistent=False)

    saved: torch.Tensor
    unsaved: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.embedding(x) * self.saved + self.unsaved)


class Words(Trainer):
    """Predicts a number from the one before; looks at its model when it is in place and after."""

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)  # pyright: ignore

    def look(self) -> None:
        model: Any = self.named_models()["model"]
        assert model.out.weight is model.embedding.weight
        assert model.saved.tolist() == [0, 1, 2, 3]
        assert model.unsaved.tolist() == [1, 2, 3, 4]
        self.looked += 1

    on_setup = on_train_end = look
    looked = 0


def words(kind: type[Words] = Words, calls: list[int] | None = None, **changes: Any) -> Any:
    x = torch.arange(20) % 7
    model = Tied()
    if calls is not None:
        model.register_forward_pre_hook(lambda *_: calls.append(1))
    loader = DataLoader(TensorDataset(x, (x + 1) % 7), 4)
    trainer = kind(**settings(model, train_dataloader=loader, **changes))
    trainer.fit()
    return trainer


def test_DT_08_ties_and_buffers_survive_the_setup() -> None:
    assert words().looked == 2


class Pair(Trainer):
    """Two models with a loss each; one optimizer a model."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        x, y = batch
        models: Any = self.model
        return {name: self.loss_fn(models[name](x), y) for name in ("left", "right")}


class Exchanges(Callback):
    """Counts each model's exchanges of gradients, by window."""

    def __init__(self) -> None:
        self.windows: list[dict[str, int]] = []

    def on_setup(self, trainer: Any) -> None:
        for name, replica in trainer.model.items():
            replica.register_comm_hook((self.windows, name), _counted)

    def on_train_batch_start(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.window.batch_idx == trainer.progress.batch:
            self.windows.append({"left": 0, "right": 0})


def _counted(state, bucket):  # DDP would accept no annotations but its own
    windows, name = state
    windows[-1][name] += bucket.is_last()
    return default_hooks.allreduce_hook(torch.distributed.group.WORLD, bucket)


def exchanges() -> list[dict[str, int]]:
    models = {"left": line(seed=1), "right": line(seed=2)}
    counted = Exchanges()
    fitted(
        Pair,
        model=models,
        optimizer={name: torch.optim.SGD(m.parameters(), lr=0.01) for name, m in models.items()},
        train_dataloader=batches(32),
        gradient_accumulation_steps=2,
        callbacks=[counted],
    )
    return counted.windows


@pytest.mark.slow
def test_DT_11_each_of_two_models_is_exchanged_once_a_window(ranks: Any) -> None:
    assert ranks(exchanges, 2) == [[{"left": 1, "right": 1}] * 4] * 2

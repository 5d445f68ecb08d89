"""Models made on the meta device get their memory and values as they are placed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Parallel, Trainer
from paceline.errors import ConfigError
from paceline.testing import Ranks, bits
from paceline.world.dtensors import is_dtensor, whole


class Block(nn.Module):
    """A linear layer of torch's, a parameter and two buffers of its own."""

    scale: torch.Tensor
    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.shift = nn.Parameter(torch.zeros(6))
        self.register_buffer("scale", torch.zeros(6))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.before: list[Block] = []
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.sharded_before = [all(map(is_dtensor, b.parameters())) for b in self.before]
        nn.init.normal_(self.shift)
        self.scale = torch.arange(6.0, device=self.shift.device)
        self.steps.fill_(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x + self.shift).tanh() * self.scale / self.steps


class Net(nn.Module):
    """Two blocks, and a head whose weight is the stem's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Embedding(7, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 7)
        self.head.weight = self.stem.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Words(Trainer):
    """Predicts a number from the one before; its model is made on the meta device."""

    kind: type[nn.Module] = Net

    def configure(self) -> None:
        with torch.device("meta"):
            self.model = self.kind()
        if isinstance(self.model, Net):
            first, second = self.model.blocks
            vars(second)["before"].append(first)
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def on_train_start(self) -> None:
        state = self.named_models()["model"].state_dict()
        self.started = bits([whole(t).detach() for t in state.values()])

    def on_train_end(self) -> None:
        self.ended = [whole(p).detach() for p in self.named_models()["model"].parameters()]


def fit(seed: int = 0, kind: type[nn.Module] = Net, **settings: Any) -> Words:
    x = torch.arange(28) % 7
    trainer = Words(
        loss_fn=nn.functional.cross_entropy,
        train_dataloader=DataLoader(TensorDataset(x, (x + 1) % 7), 4),
        epochs=1,
        global_batch_size=8,
        progress=False,
        **settings,
    )
    trainer.kind = kind
    trainer.train(seed=seed)
    return trainer


def test_ties_and_buffers_survive() -> None:
    """What is tied stays tied and is drawn once; what a module computes, it computes again."""
    model: Any = fit().model
    assert model.head.weight is model.stem.weight
    for block in model.blocks:
        assert block.scale.tolist() == [0, 1, 2, 3, 4, 5]
        assert block.steps.item() == 3
    assert set(model.state_dict()) == set(Net().state_dict())
    torch.manual_seed(0)
    spread = nn.Embedding(7, 6).weight.std().item()
    start = nn.Module.get_parameter(fit(max_steps=1).model, "stem.weight")  # pyright: ignore
    assert start.std().item() == pytest.approx(spread, rel=0.3), "as an Embedding draws, no Linear"


def test_values_follow_from_the_seed() -> None:
    assert fit(1).started == fit(1).started
    assert fit(1).started != fit(2).started


def laid_out() -> list[Any]:
    runs = [fit(1, parallel=Parallel(dp_shard=shard)) for shard in (1, 2)]
    return [(run.started, run.ended, run.get_module("model.blocks.1")) for run in runs]


def on_two() -> list[Any]:
    found = laid_out()
    return [(started, ended, block.sharded_before) for started, ended, block in found]


def test_values_are_those_of_one_process_at_any_layout(ranks: Ranks) -> None:
    """Bit for bit at the start; and a block is sharded before the next one has memory."""
    one = fit(1)
    for replicated, sharded in ranks(on_two, 2):
        assert replicated[0] == sharded[0] == one.started
        for ended in (replicated[1], sharded[1]):
            torch.testing.assert_close(ended, one.ended)
        assert (replicated[2], sharded[2]) == ([False], [True])


class Forgets(nn.Module):
    """Fills less than it has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.arange(2.0))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


class Large(nn.Module):
    """Fills all of its parts in one go, whatever they would do themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Embedding(7, 7), nn.Linear(7, 7), nn.Linear(7, 7))

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts(x)


def test_a_model_may_fill_all_of_itself() -> None:
    expected = {name: torch.full_like(p, 0.5) for name, p in Large().state_dict().items()}
    assert fit(kind=Large).started == bits([*expected.values()])


def test_what_nothing_fills_is_named() -> None:
    with pytest.raises(ConfigError, match=r"given no values: model\.table, model\.mask\. A module"):
        fit(kind=Forgets)

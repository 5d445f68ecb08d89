"""Models that a layout over ranks trains as plain torch does, or refuses before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from paceline import Parallel, Trainer
from paceline.errors import ConfigError
from paceline.parallel.blocks import repeated_blocks
from paceline.testing import Ranks
from paceline.world.dtensors import whole
from small import points


class Pairs(nn.Module):
    """Its blocks are a list of lists."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(3, 3), Half()]) for _ in range(2)])
        self.head = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for pair in self.layers:
            for layer in pair.children():
                x = torch.tanh(layer(x)) + x
        return self.head(x)


class Half(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3, bias=False)


@dataclass
class Answer:
    y: torch.Tensor


class Answers(Pairs):
    def forward(self, x: torch.Tensor) -> Any:
        return Answer(super().forward(x))


class Opaque:  # torch looks into dataclasses, but not into this
    def __init__(self, y: torch.Tensor) -> None:
        self.y = y


class OpaqueAnswers(nn.Linear):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(3, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return Opaque(super().forward(x))


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.head = nn.Embedding(6, 4, sparse=True), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rows((x * 2).long().clamp(-3, 2) + 3).mean(1))


class OnlyRows(nn.Embedding):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(6, 1, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x * 2).long().clamp(-3, 2) + 3).mean(1)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.router = nn.Linear(3, 4, dtype=torch.bfloat16), nn.Linear(4, 1)


class Expanded(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 1)
        self.register_buffer("scale", torch.ones(1).expand(8))


def hooked() -> nn.Module:
    model = nn.Linear(3, 1)
    model.weight.register_post_accumulate_grad_hook(lambda p: None)
    return model


class Fit(Trainer):
    other: nn.Module | None = None

    def loss(self, batch: Any) -> torch.Tensor:
        outputs = self.model(batch[0])
        return (getattr(outputs, "y", outputs) - batch[1]).square().mean()

    def on_train_end(self) -> None:
        state = self.named_models()["model"].state_dict()
        self.ended = {key.removeprefix("module."): whole(p).detach() for key, p in state.items()}


class Tied(Fit):
    def configure(self) -> None:
        self.other = nn.Linear(3, 1)
        self.other.weight = self.model.weight
        self.other.bias = self.model.bias


class HooksLater(Fit):
    def on_setup(self) -> None:
        next(self.model.parameters()).register_hook(lambda g: g * 0)


def fit(make: Callable[[], nn.Module], shard: int, kind: type[Fit] = Fit) -> Any:
    """Nine rows in windows of four: in the last window one of two ranks has none."""
    model = make()
    trainer = kind(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_dataloader=DataLoader(points(9), 2),
        epochs=2,
        progress=False,
        parallel=Parallel(dp_shard=shard),
    )
    try:
        trainer.fit()
    except ConfigError as error:
        assert trainer.global_step == 0
        return str(error)
    return trainer.ended


def by_hand(make: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for x, y in zip(*(t.split(4) for t in points(9).tensors), strict=True):
            outputs: Any = model(x)
            (getattr(outputs, "y", outputs) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {key: value.detach() for key, value in model.state_dict().items()}


TRAINED = [(Pairs, 2), (Answers, 2), (Answers, 1), (OpaqueAnswers, 2), (Sparse, 1)]
TRAINED += [(OnlyRows, 1)]


def fit_all() -> tuple[list[Any], dict[str, str]]:
    linear = lambda: nn.Linear(3, 1)  # noqa: E731
    return [fit(make, shard) for make, shard in TRAINED], {
        "shared": fit(linear, 2, Tied),
        "hooked": fit(hooked, 2),
        "later": fit(linear, 2, HooksLater),
        "sparse": fit(Sparse, 2),
        "mixed": fit(Mixed, 2),
        "expanded": fit(Expanded, 1),
    }


def test_ranks_train_what_plain_torch_trains_or_refuse_it_by_name(ranks: Ranks) -> None:
    """Given lists of lists of blocks, outputs in objects, sparse gradients, and things that
    sharding would lose, when two ranks train nine rows, then the weights are those of a plain loop
    in one process, or the run ends before its first step with the names."""
    for trained, refused in ranks(fit_all, 2):
        for ended, (make, _) in zip(trained, TRAINED, strict=True):
            torch.testing.assert_close(ended, by_hand(make))
        assert "model.weight = other.weight" in refused["shared"]
        assert "model.weight: has hooks on its gradient" in refused["hooked"]
        assert "model.weight: torch calls no register_hook" in refused["later"]
        assert "model.rows.weight: an Embedding with sparse=True" in refused["sparse"]
        assert "model.a.weight is bfloat16 and model.router.weight is float32" in refused["mixed"]
        assert "model.scale: a buffer that was expanded" in refused["expanded"]


def test_lists_within_a_list_are_no_blocks_but_what_they_hold_is() -> None:
    model = Pairs()
    assert repeated_blocks(model) == [part for pair in model.layers for part in pair.children()]

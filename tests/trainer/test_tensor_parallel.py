"""Modules split over ranks: who says how, what is kept, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

from builders import assert_each_says
from kept import Kept, assert_near, run
from paceline import Parallel, Trainer
from paceline.errors import ConfigError
from paceline.testing import Ranks
from small import settings

WORDS = 8


class Words(nn.Module):
    """Tokens to logits; the embedding is the head's weight too."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, 4)
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)
        self.head = nn.Linear(4, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.down(self.between(self.up(self.norm(x)))))


class OwnPlan(Words):
    """Says how it splits in the way of Hugging Face's models."""

    tp_plan = {"up": "colwise", "down": "rowwise"}


class OwnWay(Words):
    def parallelize(self, mesh: Any) -> None:
        parallelize_module(self, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


class HeadsAsInTransformers(Words):
    """A norm of each head, as its models have, split by a plan in its words."""

    tp_plan = {
        "embedding": "embedding_rowwise",
        "up": "colwise",
        "heads": "replicated_with_grad_allreduce",
        "down": "rowwise",
        "head": "colwise_gather_output",
    }

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.LayerNorm(3)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads(x.unflatten(-1, (-1, 3))).flatten(-2).tanh()


class ScaledBetween(Words):
    """A parameter in the middle of what is split: each rank sees half of what it works on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh() * self.scale


class NextWord(nn.CrossEntropyLoss):
    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().forward(logits.flatten(0, 1), targets.flatten())


def fit(
    model: nn.Module, plan: dict[str, Any] | None = None, *, tensor: int = 2, way: str | None = None
) -> Kept:
    """Two epochs of words, each of which is followed by the one at the other end.

    Args:
        model: to train.
        plan: how it is split.
        tensor: over how many ranks.
        way: of AdamW's steps: "fused", "foreach", or its own choice.
    """
    x = torch.randint(WORDS, (16, 3), generator=torch.Generator().manual_seed(1))
    options = {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01, **{way: True} if way else {}),
        "loss_fn": NextWord(),
        "train_dataloader": DataLoader(TensorDataset(x, x.flip(1)), 4),
        "val_dataloader": DataLoader(TensorDataset(x, x.flip(1)), 4),
        "max_grad_norm": 0.5,
        "parallel": Parallel(tensor=tensor, plan=plan),
    }
    return run(Trainer(**settings(model, **options)))


PLAN = {"up": "colwise", "down": "rowwise"}
VOCABULARY = {"embedding": "rowwise", "head": "colwise_loss"}


def fit_all() -> list[Any]:
    return [
        fit(Words(), PLAN),
        fit(OwnPlan(), way="fused"),
        fit(OwnWay(), way="foreach"),
        fit(Words(), {"up": ColwiseParallel(output_layouts=Shard(-1)), "d*": "rowwise"}),
        fit(Words(), {"head": "colwise_rep", "embedding": "rowwise"}),
        fit(Words(), {**PLAN, **VOCABULARY}),
    ]


def test_all_ways_to_say_how_train_as_one_process_does(ranks: Ranks) -> None:
    """A plan of names or styles, the model's own plan or method; tied weights stay tied, also when
    they are split, and the cross-entropy of split logits is that of whole ones."""
    expected = fit(Words(), tensor=1)
    assert expected.split == []
    inner = ["down.bias", "down.weight", "up.bias", "up.weight"]
    outer = ["embedding.weight", "head.weight"]
    for outcomes in ranks(fit_all, 2):
        split = [inner] * 4 + [outer, sorted([*inner, *outer])]
        assert [kept.split for kept in outcomes] == split
        for kept in outcomes:
            assert_near(kept, expected, rtol=1e-4)


def fit_heads() -> Any:
    return fit(HeadsAsInTransformers())


def test_a_plan_in_the_words_of_transformers(ranks: Ranks) -> None:
    """What each rank's heads say of the one norm is added up."""
    expected = fit(HeadsAsInTransformers(), tensor=1)
    for kept in ranks(fit_heads, 2):
        assert_near(kept, expected, rtol=1e-4)


def refused(*args: Any, **settings: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        fit(*args, **settings)
    return str(raised.value)


def refuse_all() -> list[str]:
    wide = Words(tied=False)
    wide.head = nn.Linear(4, 7)
    return [
        refused(Words()),
        refused(Words(), {"upp": "colwise"}),
        refused(Words(), {"up": "columns"}),
        refused(Words(), {"norm": "colwise"}),
        refused(wide, {"head": "colwise_rep"}),
        refused(Words(), {**PLAN, "head": "colwise_rep"}),
        refused(ScaledBetween(), PLAN),
        refused(Words(), PLAN, tensor=4),
    ]


def test_what_cannot_be_split_is_refused(ranks: Ranks) -> None:
    for found in ranks(refuse_all, 2):
        assert_each_says(
            found,
            "nothing says how the model 'model' splits",
            "'model' has no module 'upp'",
            "parallel.plan['up'] is 'columns': expected colwise",
            "parallel.plan: 'colwise' does not fit the LayerNorm",
            "parallel.tensor=2 does not divide the sizes of head.weight [7, 4]",
            "embedding.weight and head.weight of 'model' are one parameter",
            "the ranks have different gradients of model.scale, which no entry",
            "parallel.tensor=4 does not fit 2 processes",
        )

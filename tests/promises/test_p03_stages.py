"""P3 in stages: how a model is cut into stages changes no result either."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from mathematics import SOME, Case, Keep, assert_same, data
from torch import nn
from torch.utils.data import DataLoader

from paceline import Parallel, Trainer
from paceline.testing import Ranks
from paceline.world.dtensors import whole


class FitStages(Trainer):
    """The same with stages: the loss is loss_fn's, and a batch has what it is computed from."""

    def configure(self) -> None:
        self.counts_tokens = self.loss_fn is token_error

    def count_items(self, batch: Any) -> Any:
        return batch[1][1].sum() if self.counts_tokens else len(batch[0])

    def on_train_end(self) -> None:
        named = self.model.named_parameters()
        self.weights = {name: whole(p.detach()).clone() for name, p in named if not p.is_meta}


def error(outputs: torch.Tensor, targets: Any) -> torch.Tensor:
    return (outputs - targets[0]).square().mean()


def token_error(outputs: torch.Tensor, targets: Any) -> torch.Tensor:
    y, mask = targets
    return ((outputs - y).square() * mask).sum() / mask.sum()


def paired(rows: list[Any]) -> Any:
    x, y, mask, _ = (torch.stack(column) for column in zip(*rows, strict=True))
    return x, (y, mask)


def fit_stages(case: Case, parallel: Parallel | None = None) -> Any:
    keep = Keep()
    torch.manual_seed(1)
    sizes = (6, 12, 9, 7, 5)
    layers = [nn.Linear(*pair).double() for pair in pairwise(sizes)]
    model = nn.Sequential(*(nn.Sequential(layer, nn.Tanh()) for layer in layers))
    trainer = FitStages(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        loss_fn=token_error if case.tokens else error,
        train_dataloader=DataLoader(data(case.rows), case.batch, collate_fn=paired),
        val_dataloader=DataLoader(data(23, 1), case.batch, collate_fn=paired),
        epochs=case.epochs,
        gradient_accumulation_steps=case.accumulation,
        max_grad_norm=1.0,
        log_every=1,
        progress=False,
        callbacks=[keep],
        parallel=parallel,
    )
    trainer.train(seed=4)
    return {"rows": keep.rows, "validations": keep.validations, "weights": trainer.weights}


def fits_stages(cases: list[Case], parallel: Parallel) -> list[Any]:
    return [fit_stages(case, parallel) for case in cases]


@pytest.mark.parametrize(("size", "stages", "shard"), [(2, 2, 1), (4, 2, 1), (4, 4, 1), (4, 2, 2)])
def test_stages_equal_one_too(ranks: Ranks, size: int, stages: int, shard: int) -> None:
    """Pipeline parallelism over two and four stages, in two copies, and with each stage sharded
    over two ranks; windows of one micro-batch and of three, the last one short, with batches of
    other sizes and without an item."""
    short = [replace(case, epochs=1) for case in SOME]
    cases = short if size == 2 else [case for case in short if case.accumulation > 1]
    if shard > 1:  # in the last window one rank of a stage has batches of one size, one of two
        cases = [Case(59, 5, 3), *cases]
    outcomes = ranks(fits_stages, size, cases, Parallel(pipeline=stages, dp_shard=shard))
    for i, case in enumerate(cases):
        expected = fit_stages(replace(case, batch=case.batch * size // stages))
        for rank in range(size):
            found = outcomes[rank][i]
            names = found["weights"]
            mine, theirs = (
                {**run, "parameters": [run["weights"][n] for n in names]}
                for run in (found, expected)
            )
            assert_same(mine, theirs, (case, f"rank {rank} of {size}"))
        assert set().union(*(outcomes[rank][i]["weights"] for rank in range(size))) == set(
            expected["weights"]
        )

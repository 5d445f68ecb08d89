"""What is sharded how, and models and data that cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from kept import Kept, assert_near, fit, flipped, run
from paceline import Parallel, Trainer
from paceline.errors import ConfigError
from paceline.parallel.blocks import repeated_blocks
from paceline.testing import Ranks, bits
from paceline.trainer.callback import Callback
from paceline.world.dtensors import is_dtensor
from small import settings


class Block(nn.Module):
    def __init__(self, shared: nn.Linear | None = None) -> None:
        super().__init__()
        self.inner = shared or nn.Linear(4, 4)
        self.parts = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.parts(self.inner(x).tanh())


class Deep(nn.Module):
    """Two blocks and a head whose weight is the stem's too."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 4, bias=False)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, outputs, bias=False)
        if outputs == 4:
            self.head.weight = self.stem.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_blocks_are_the_outermost_repeated_parts() -> None:
    deep = Deep()
    assert repeated_blocks(deep) == list(deep.blocks)
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.ReLU())) == []


def test_a_block_that_shares_a_parameter_stays_with_the_rest() -> None:
    shared = nn.Linear(4, 4)
    blocks = nn.Sequential(Block(shared), Block(), Block(shared), Block())
    assert repeated_blocks(blocks) == [blocks[1], blocks[3]]


class Ties(Callback):
    """At the end all is sharded that should be, and what was tied is tied."""

    def on_train_end(self, trainer: Any) -> None:
        if trainer.world.shards > 1:
            assert all(is_dtensor(p) for p in trainer.model.parameters())
        assert trainer.model.head.weight is trainer.model.stem.weight


def fit_deep(parallel: Parallel, *args: Any, **changes: Any) -> Kept:
    ties = [Ties()] if parallel.partitions_state else []
    callbacks = [*ties, *changes.pop("callbacks", ())]
    return fit(changes.pop("model", Deep()), parallel, *args, callbacks=callbacks, **changes)


PLAN = {"blocks.*.inner": "colwise", "blocks.*.parts.0": "rowwise"}
SPLIT = Parallel(tensor=2, plan=PLAN)
LAYOUTS = [
    (2, Parallel()),
    (2, Parallel(dp_shard=2)),
    (2, SPLIT),
    (1, Parallel()),
    (4, replace(SPLIT, dp_shard=2)),
    (4, Parallel(dp_shard=2)),
    (1, Parallel()),
]


def test_a_run_goes_on_at_any_other_layout(ranks: Ranks, tmp_path: Path) -> None:
    """DDP, FSDP2, split modules, HSDP and their combinations, on 1, 2 and 4 ranks, two steps each:
    weights and averages end as those of one process that never stopped."""
    for i, (size, parallel) in enumerate(LAYOUTS):
        kept = ranks(fit_deep, size, parallel, tmp_path, 2 * (i + 1))[0]
    assert_near(kept, fit_deep(Parallel(), None, 2 * len(LAYOUTS)), rtol=1e-5)


class Peeks(Callback):
    """Calls the model before a step, as one that measures something would."""

    def on_before_optimizer_step(self, trainer: Any, optimizer: Any) -> None:
        with torch.no_grad():
            trainer.model(torch.ones(1, 4))

    def on_metrics(self, trainer: Any, metrics: dict[str, float]) -> None:
        assert all(is_dtensor(p) for p in trainer.model.parameters())


def peek() -> tuple[Any, Any]:
    two = Parallel(dp_shard=2)
    plain, peeked = fit_deep(two), fit_deep(two, callbacks=[Peeks()])
    return bits(plain.weights), bits(peeked.weights)


def test_a_call_in_a_hook_leaves_no_old_weights_behind(ranks: Ranks) -> None:
    for plain, peeked in ranks(peek, 2):
        assert plain == peeked


def refused(parallel: Parallel, **changes: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        fit_deep(parallel, **changes)
    return str(raised.value)


class Scaled(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


def refuse_all() -> list[str]:
    two = Parallel(dp_shard=2)
    used = Deep()
    fit_deep(two, model=used)
    return [
        refused(two, model=Scaled()),
        refused(two, model=used),
        refused(two, val_dataloader=DataLoader(flipped(1), 2)),
        refused(Parallel(dp_shard=4)),
    ]


def test_what_cannot_be_sharded_is_refused(ranks: Ranks) -> None:
    scalar, twice, few, large = ranks(refuse_all, 2)[0]
    assert "the parameters scale of 'model' have no dimension to shard" in scalar
    assert "the model 'model' is spread already" in twice
    assert "each of the 2 ranks needs at least one sample, and there is 1" in few
    assert "parallel.dp_shard=4 does not fit 2 processes" in large


def train_further(parallel: Parallel, folder: Path) -> tuple[str, Any, Any]:
    def make(run_dir: Path, max_steps: int) -> Trainer:
        model = Deep()
        return Trainer(
            **settings(
                model,
                optimizer=torch.optim.AdamW(model.parameters()),
                train_dataloader=DataLoader(flipped(24), 2, shuffle=True),
                max_steps=max_steps,
                parallel=parallel,
                run_dir=run_dir,
            )
        )

    trainer = make(folder / "run", 2)
    trainer.train(seed=1)
    trainer.max_steps = 4
    with pytest.raises(ConfigError) as raised:
        trainer.train(seed=1)
    further, whole = make(folder / "run", 4), make(folder / "whole", 4)
    return str(raised.value), bits(run(further, 1).weights), bits(run(whole, 1).weights)


def train_each_further(folder: Path) -> list[tuple[str, Any, Any]]:
    layouts = {"sharded": Parallel(dp_shard=2), "split": SPLIT}
    return [train_further(parallel, folder / name) for name, parallel in layouts.items()]


def test_a_second_train_of_a_spread_model_is_refused_and_what_it_says_to_do_works(
    ranks: Ranks, tmp_path: Path
) -> None:
    for message, further, whole in ranks(train_each_further, 2, tmp_path)[0]:
        assert message.endswith(
            "the model 'model' is spread already, by an earlier run or by yourself: make a new "
            "Trainer with a new model and optimizer. With the run_dir of the earlier run it "
            "resumes that; to train further, give it more epochs or max_steps."
        )
        assert further == whole

"""Streams where several ranks work on the same samples: each is read once, and by all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paceline import Parallel, Trainer
from paceline.errors import DataError
from paceline.testing import Ranks, StopAt, bits

LAYOUTS = [Parallel(tensor=2), Parallel(context=2), Parallel(tensor=2, dp_shard=2)]


class Stream:
    """Every second batch, say, from the second on: (1, 2) is the share."""

    share = (0, 1)

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        first, step = self.share
        for i in range(first, self.batches, step):
            ids = torch.arange(2) + 2 * i
            yield (ids / 20 + torch.rand(1)).view(2, 1, 1).expand(2, 2, 1), ids


class Reading(Trainer):
    by_rank = ()  # loaders that are shared out by rank

    def on_setup(self) -> None:
        world = self.world
        for name in ("train_dataloader", "val_dataloader"):
            share = (world.dp_rank, world.dp_size)
            getattr(self, name).share = (world.rank, 4) if name in self.by_rank else share
        self.trained: list[int] = []
        self.validated: list[int] = []

    def loss(self, batch: Any) -> torch.Tensor:
        return (self.model(batch[0]) - 1).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if not self.muted:
            self.trained += batch[1].tolist()
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += batch[1].tolist()
        self.log("val/loss", self.loss(batch))
        self.log("val/id", batch[1].float().mean())

    def on_train_end(self) -> None:
        self.ended = bits([*self.named_models()["model"].parameters()])


def read(
    parallel: Parallel, *callbacks: Any, by_rank: Any = (), epochs: int = 2, **settings: Any
) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    trainer = Reading(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        train_dataloader=Stream(7),
        val_dataloader=Stream(3),
        epochs=epochs,
        progress=False,
        callbacks=callbacks,
        parallel=Parallel(**{**vars(parallel), "plan": {"0": "colwise", "1": "rowwise"}}),
        **settings,
    )
    trainer.by_rank = by_rank
    trainer.train(seed=3)
    return trainer


def samples_of(parallel: Parallel) -> Any:
    trainer = read(parallel)
    return trainer.trained, trainer.validated, trainer.result.metrics["val/id"]


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=["split", "parts of sequences", "split and sharded"]
)
def test_each_sample_is_read_once_and_by_all_that_work_on_it(
    ranks: Ranks, layout: Parallel
) -> None:
    """Shares of four and three batches, in validation of two and one: a rank without one stands
    in."""
    zero, one, two, three = ranks(samples_of, 4, layout)
    assert zero == one
    assert two == three
    for mine, theirs, samples in zip(zero[:2], two[:2], (14, 6), strict=True):
        assert sorted(mine + theirs) == sorted([*range(samples)] * 2)
    assert zero[2] == two[2] == 2.5


def unbroken_and_stopped(folder: Path) -> Any:
    whole = read(LAYOUTS[0], run_dir=folder / "whole", epochs=1)
    return whole.ended, whole.trained, resumed(folder, StopAt(2))[1]


def resumed(folder: Path, *callbacks: Any) -> Any:
    trainer = read(LAYOUTS[0], *callbacks, run_dir=folder / "broken", epochs=1)
    return getattr(trainer, "ended", None), trainer.trained


def test_stopped_and_resumed_they_end_the_same(ranks: Ranks, tmp_path: Path) -> None:
    """Resumed in new processes, after two of four steps."""
    before = ranks(unbroken_and_stopped, 4, tmp_path)
    after = ranks(resumed, 4, tmp_path)
    for (weights, samples, first), (ended, second) in zip(before, after, strict=True):
        assert ended == weights
        assert first + second == samples


def refuse_all() -> list[str]:
    messages = []
    for parallel in LAYOUTS[:2]:
        for loader in ("train_dataloader", "val_dataloader"):
            with pytest.raises(DataError) as raised:
                read(parallel, by_rank=(loader,))
            messages.append(str(raised.value))
    with pytest.raises(DataError) as raised:
        read(Parallel(dp_shard=2), by_rank=("val_dataloader",))  # three batches for four ranks
    return [*messages, str(raised.value)]


def test_other_samples_than_the_others_have_are_refused(ranks: Ranks) -> None:
    for *shared_out, missing in ranks(refuse_all, 4):
        for message in shared_out:
            assert "work on the same samples" in message
            assert "the share dp_rank of dp_size" in message
        assert "val_dataloader: rank 3 yields no batch" in missing

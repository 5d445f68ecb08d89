"""Ranks that were given different things say so at once, instead of waiting for each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from paceline import Callback, CheckpointPolicy, Parallel, Trainer
from paceline.errors import ConfigError, StateError
from paceline.testing import Ranks
from small import batches, line, settings


def refused(seed: int = 0, **changes: Any) -> str:
    try:
        Trainer(**settings(**changes)).fit(seed=seed)
    except ConfigError as error:
        return str(error)
    return "trained"


class Main(torch.nn.Linear):
    """A line that knows whether it is the first rank's, and when it was made."""

    def __init__(self, *, is_main: bool) -> None:
        super().__init__(3, 1)
        torch.nn.init.ones_(self.weight)
        self.is_main, self.made_at = is_main, 1.0 if is_main else 2.0


def refuse_all() -> list[str]:
    first = os.environ["RANK"] == "0"
    model = line()
    model.bias.requires_grad_(first)
    optimizer = torch.optim.SGD([model.weight] + ([model.bias] if first else []), lr=0.1)
    every = CheckpointPolicy(every_steps=1 if first else 2)
    part = [torch.ones(8, 3) * first]
    return [
        refused(epochs=None, max_steps=3 if first else 4, log_every=10 if first else 20),
        refused(val_dataloader=batches() if first else None),
        refused(train_dataloader=batches(20 if first else 24)),
        refused(model=line(3)) if first else refused(model=torch.nn.Linear(3, 1, bias=False)),
        refused(model=model, optimizer=optimizer),
        refused(seed=0 if first else 1),
        refused(checkpoint=every),
        refused(parallel=Parallel(dp_shard=2 if first else 1)),
        refused(lr=0.1 if first else 0.2),
        refused(loss_fn=torch.nn.SmoothL1Loss(beta=1.0 if first else 2.0), checkpoint=None),
        refused(model=line().train(first)),
        refused(train_dataloader=DataLoader(TensorDataset(*part, *part), 4)),
        refused(model=Main(is_main=first)),
    ]


def test_what_differs_between_ranks_is_named_on_each(ranks: Ranks) -> None:
    """Given other settings, data or components on rank 1, when training starts, then it ends at
    once on both ranks with the name and both values."""
    for said in ranks(refuse_all, 2):
        steps, val, data, model, frozen, seed, every, layout, rate, *rest = said
        loss, mode, shards, alike = rest
        assert "max_steps: 3 on rank 0, 4 on rank 1\n  log_every: 10 on rank 0, 20 on" in steps
        assert "val_dataloader: 'DataLoader, batch_size=4" in val
        assert "on rank 0, None on rank 1" in val
        assert "20 samples' on rank 0" in data
        assert "24 samples' on rank 1" in data
        assert "model.bias: ((1,), 'torch.float32', True) on rank 0, not there on rank 1" in model
        assert "model.bias: ((1,), 'torch.float32', True) on rank 0, ((1,)" in frozen
        assert "train(seed=...): 0 on rank 0, 1 on rank 1" in seed
        assert "checkpoint: CheckpointPolicy(every_epochs=1, every_steps=1" in every
        assert "parallel has to be the same on every rank" in layout
        assert "optimizer.param_groups[0].lr: 0.1 on rank 0, 0.2 on rank 1" in rate
        assert "loss_fn, SmoothL1Loss.beta: 1.0 on rank 0, 2.0 on rank 1" in loss
        assert "model, in eval mode: [] on rank 0, [''] on rank 1" in mode
        assert "the samples of data, all of which each rank is given: " in shards
        assert alike == "trained"


class Seen(Callback):
    """Has a tensor of its own on each rank, in its state or under the rank's key.

    It sets a number on the model, another one on each rank.
    """

    def __init__(self, *, by_rank: bool, since: int = 0) -> None:
        self.by_rank, self.since = by_rank, since
        self.seen, self.last = torch.zeros(3), 0.0

    def on_train_start(self, trainer: Any) -> None:
        self.change(trainer)

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        self.change(trainer)

    def change(self, trainer: Any) -> None:
        if trainer.global_step >= self.since:
            self.seen += 1 + trainer.world.rank
        model = trainer.named_models()["model"]
        model.last = 10.0 * trainer.global_step + trainer.world.rank

    def state_dict(self) -> dict[str, Any]:
        return {} if self.by_rank else {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def on_save_checkpoint(self, trainer: Any, state: dict[str, Any]) -> None:
        if self.by_rank:
            state["rank"][str(trainer.world.rank)]["seen"] = self.seen

    def on_load_checkpoint(self, trainer: Any, state: dict[str, Any]) -> None:
        self.seen = state["rank"][str(trainer.world.rank)]["seen"]
        self.last = trainer.named_models()["model"].last


def saved(folder: Path, *, by_rank: bool, since: int = 0) -> Any:
    seen = Seen(by_rank=by_rank, since=since)
    policy = CheckpointPolicy(every_steps=1)
    for steps in (2, 3):
        try:
            given = settings(max_steps=steps, epochs=None, callbacks=[seen], checkpoint=policy)
            Trainer(**given, run_dir=folder).fit()
        except StateError as error:
            return str(error)
        if steps == 2:
            seen = Seen(by_rank=by_rank, since=since)
    return [*seen.seen.tolist(), seen.last]


def save_all(folder: Path) -> list[Any]:
    return [
        saved(folder / "refused", by_rank=False),
        saved(folder / "later", by_rank=False, since=2),
        saved(folder / "kept", by_rank=True),
    ]


def test_state_that_differs_by_rank_is_each_ranks_own_or_refused(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Given a callback with another tensor on each rank, when the run saves and resumes, then each
    rank has its own back from the key `rank`; in the state of all it is refused. A number that
    each rank sets on its model is each one's own too."""
    for rank, (refused, later, kept) in enumerate(ranks(save_all, 2, tmp_path)):
        assert "callbacks.Seen.seen: differs between rank 0 and rank 1" in refused
        assert "callbacks.Seen.seen: differs between rank 0 and rank 1" in later
        assert kept == [5.0 * (1 + rank)] * 3 + [20.0 + rank]  # two starts and three steps
    assert not (tmp_path / "refused" / "checkpoints" / "step_00000001").exists()

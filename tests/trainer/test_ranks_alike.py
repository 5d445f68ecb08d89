"""Ranks that were given different things say so at once, instead of waiting for each other."""

from __future__ import annotations

import os
from typing import Any

import torch

from paceline import CheckpointPolicy, Parallel, Trainer
from paceline.errors import ConfigError
from paceline.testing import Ranks
from small import batches, line, settings


def refused(seed: int = 0, **changes: Any) -> str:
    try:
        Trainer(**settings(**changes)).fit(seed=seed)
    except ConfigError as error:
        return str(error)
    return "trained"


def refuse_all() -> list[str]:
    first = os.environ["RANK"] == "0"
    model = line()
    model.bias.requires_grad_(first)
    optimizer = torch.optim.SGD([model.weight] + ([model.bias] if first else []), lr=0.1)
    every = CheckpointPolicy(every_steps=1 if first else 2)
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
        refused(),
    ]


def test_what_differs_between_ranks_is_named_on_each(ranks: Ranks) -> None:
    """Given other settings, data or components on rank 1, when training starts, then it ends at
    once on both ranks with the name and both values."""
    for said in ranks(refuse_all, 2):
        steps, val, data, model, frozen, seed, every, layout, rate, alike = said
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
        assert alike == "trained"

"""The smallest runs there are: a line fitted to a few rows, where every number can be checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Trainer
from paceline.errors import PacelineError
from paceline.testing import rows

T = TypeVar("T", bound=Trainer)


def points(n: int = 20, width: int = 3, seed: int = 5) -> TensorDataset:
    """`n` rows of inputs and targets, all different."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True) + 0.5)


def batches(n: int = 20, size: int = 4, **options: Any) -> DataLoader:
    """A loader over `points(n)`, in stored order unless told otherwise."""
    return DataLoader(points(n), size, **options)


def line(width: int = 3, seed: int = 1) -> nn.Linear:
    """A linear model, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(width, 1)


def settings(model: nn.Module | None = None, lr: float = 0.05, **changes: Any) -> dict[str, Any]:
    """A Trainer's keywords for a short silent run of the line; `changes` replace or add."""
    model = line() if model is None else model
    if "optimizer" not in changes:
        changes["optimizer"] = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return {
        "model": model,
        "loss_fn": nn.MSELoss(),
        "train_dataloader": batches(),
        "epochs": 2,
        "progress": False,
        **changes,
    }


def fitted(kind: type[T] = Trainer, **changes: Any) -> T:
    """A trainer of the line, after its run."""
    trainer = kind(**settings(**changes))
    trainer.fit(seed=1)
    return trainer


def weights(trainer: Trainer) -> dict[str, Any]:
    """Every parameter and buffer, copied."""
    return {
        f"{name}.{key}": value.clone()
        for name, model in trainer.named_models().items()
        for key, value in model.state_dict().items()
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two sets of tensors are equal bit by bit."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def checkpoints(run_dir: Path) -> list[str]:
    """Names of the checkpoints in a run's folder, oldest first."""
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


def message(kind: type[PacelineError], trainer: type[Trainer] = Trainer, **changes: Any) -> str:
    """The text of the error with which a run ends."""
    with pytest.raises(kind) as caught:
        trainer(**settings(**changes)).fit()
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def wide(n: int = 8) -> DataLoader:
    """Rows of 4 numbers, for a model that takes 3."""
    return DataLoader(TensorDataset(torch.ones(n, 4), torch.ones(n, 1)), 4)


def step_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run, but for those that sum up an epoch."""
    found = rows(run_dir)
    return [row for row in found if not any(name.startswith("epoch/") for name in row)]

"""P8 Cheap: what costs time is counted here; the times themselves stand in `benchmarks/`."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline
from paceline import Trainer
from paceline.factories import FactoryTrainer

HOME = paceline.__path__[0]


class CallCounter:
    """Counts the calls of Paceline's own Python functions."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            self.calls[frame.f_code.co_qualname] += 1


def calls(steps: int, kind: type[Trainer] = Trainer, **settings: Any) -> Counter[str]:
    """Paceline's function calls in a run of so many steps."""
    data = TensorDataset(torch.randn(320, 4), torch.randn(320, 1))
    model = nn.Linear(4, 1)
    trainer = kind(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        loss_fn=nn.MSELoss(),
        train_dataloader=DataLoader(data, 8, shuffle=True),
        max_steps=steps,
        **{"loggers": [], "progress": False, "checkpoint": None, **settings},
    )
    counter = CallCounter()
    sys.setprofile(counter)
    try:
        trainer.train()
    finally:
        sys.setprofile(None)
    return counter.calls


def test_a_lean_step_makes_few_calls() -> None:
    """The slope between two run lengths: what one more step calls, everything optional off."""
    more = calls(60)
    more.subtract(calls(20))
    per_step = {name: count / 40 for name, count in more.items() if count > 0}
    assert sum(per_step.values()) <= 55, per_step


def test_a_trainer_with_factories_calls_nothing_more_in_a_step() -> None:
    more, plain = calls(60, FactoryTrainer), calls(60)
    more.subtract(calls(20, FactoryTrainer))
    plain.subtract(calls(20))
    assert +more == +plain


def test_an_event_that_nobody_hears_calls_nothing() -> None:
    names = [name for name in calls(5) if ".on_" in name]
    assert names == []


def test_import_brings_nothing_heavy() -> None:
    """`import paceline` leaves even torch alone; the Trainer and studies bring no more."""
    heavy = ["hydra", "omegaconf", "pydantic", "typer", "rich", "transformers", "optuna"]
    heavy += [
        "wandb",
        "mlflow",
        "swanlab",
        "trackio",
        "torch.distributed.checkpoint",
        "torch._dynamo",
        "torch._inductor",
        "sympy",
    ]
    code = (
        "import sys, paceline; assert 'torch' not in sys.modules;"
        "import torch; before = set(sys.modules); from paceline import Trainer;"
        "import paceline.tune, paceline.trackers;"
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert out.stdout.strip() == "[]"

"""Runs of the real Trainer that every callback has to go through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import schedulefree
import torch

from builders import Noisy, Regression, loader, make_model
from paceline import Callback, CheckpointPolicy
from paceline.testing import bits, rows

Make = Callable[[], Sequence[Callback]]
STEPS = 12


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with two groups of their own learning rates."""
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 1e-3}]  # pyright: ignore[reportIndexIssue]
    return torch.optim.AdamW(groups, lr=1e-2)


def schedule_free(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Schedule-free AdamW, the first layer's bias frozen."""
    model[0].bias.requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    return schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2, warmup_steps=3)


def build(run_dir: Path | None, *callbacks: Callback, **settings: Any) -> Regression:
    """97 samples in batches of 10, 2 a window: 5 windows an epoch, validated every 3."""
    model = make_model()
    optimizer = settings.pop("optimizer", adamw)(model)
    usual = {
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5),
        "val_dataloader": loader(Noisy(23), shuffle=False),
        "validate_every": 3,
        "log_every": 2,
        "progress": False,
        "max_steps": STEPS,
        "checkpoint": CheckpointPolicy(every_steps=4) if run_dir else None,
    }
    return Regression(
        model=model,
        optimizer=optimizer,
        train_dataloader=loader(Noisy()),
        gradient_accumulation_steps=2,
        callbacks=callbacks,
        run_dir=run_dir,
        **{**usual, **settings},
    )


class LeaveValidation(Callback):
    """Asks for a stop within the validation at a step, which abandons it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_end(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and batch_idx == 0:
            trainer.request_stop("test")


def check_resumed(folder: Path, make: Make, *stops: Callback, **settings: Any) -> None:
    """A run that is stopped and resumed, by each of `stops` in turn, ends with the bits of one that
    never was."""
    whole = build(folder / "whole", *make(), **settings)
    whole.train(seed=5)
    for stop in stops:
        first = build(folder / "parts", *make(), stop, **settings)
        assert not first.train(seed=5).complete
    second = build(folder / "parts", *make(), **settings)
    second.train(seed=5)
    for mine, theirs in zip(second.callbacks, whole.callbacks, strict=True):
        assert bits(mine.state_dict()) == bits(theirs.state_dict())
    assert bits(second.model.state_dict()) == bits(whole.model.state_dict())
    assert bits(second.optimizer.state_dict()) == bits(whole.optimizer.state_dict())
    assert rows(folder / "parts") == rows(folder / "whole")


def check_undisturbed(folder: Path, make: Make, **settings: Any) -> None:
    """The trained weights are the same bits with and without the callbacks."""
    plain, watched = build(None, **settings), build(folder, *make(), **settings)
    plain.train(seed=5)
    watched.train(seed=5)
    assert watched.global_step == plain.global_step == STEPS
    assert bits(watched.model.state_dict()) == bits(plain.model.state_dict())
    assert bits(watched.optimizer.state_dict()) == bits(plain.optimizer.state_dict())

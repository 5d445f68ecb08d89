"""Schedules with the values of a calculation by hand, for a run of 48 optimizer steps."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paceline.errors import ConfigError
from paceline.factories import FactoryTrainer
from paceline.registry import lookup
from small import batches, line, settings

LR, STEPS = 0.5, 48


def rates(kind: str, **given: Any) -> tuple[list[float], int]:
    """The learning rate of each step, and the warm-up in steps."""
    made = lookup("scheduler_factory", kind)
    optimizer = torch.optim.SGD(line().parameters(), lr=LR)
    trainer = SimpleNamespace(optimizer=optimizer, schedule_length=STEPS)
    schedule = made(trainer, made.config_type(**given))()
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found, schedule.warmup_steps


def up(step: int, warmup: int) -> float:
    return LR * (step + 1) / warmup


@pytest.mark.parametrize(
    ("kind", "given", "warmup", "after"),
    [
        # 10 % of 48 are 4.8: rounded down.
        ("linear", {}, 4, lambda t: LR * (1 - (t - 4) / 44)),
        ("constant", {}, 4, lambda t: LR),
        ("cosine", {}, 4, lambda t: LR * (1 + math.cos(math.pi * (t - 4) / 44)) / 2),
        ("wsd", {}, 4, lambda t: LR * min(1.0, (48 - t) / 4)),
        ("linear", {"warmup": 6, "min_ratio": "10%"}, 6,
         lambda t: LR * (0.1 + 0.9 * (1 - (t - 6) / 42))),
        ("wsd", {"warmup": "25%", "decay": 8, "min_ratio": 0.5}, 12,
         lambda t: LR * (0.5 + 0.5 * min(1.0, (48 - t) / 8))),
        ("cosine", {"warmup": 0}, 0, lambda t: LR * (1 + math.cos(math.pi * t / 48)) / 2),
    ],
)  # fmt: skip
def test_a_schedule_has_the_values_of_its_formula(
    kind: str, given: dict[str, Any], warmup: int, after: Any
) -> None:
    found, steps = rates(kind, **given)
    expected = [up(t, warmup) if t < warmup else after(t) for t in range(STEPS)]
    assert steps == warmup
    assert found == pytest.approx(expected, abs=1e-12)


class Line(FactoryTrainer):
    scheduler_factory_type = lookup("scheduler_factory", "linear")

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return (self.model(x) - y).square().mean()

    def configure(self) -> None:
        self.lr_scheduler = lookup("scheduler_factory", "linear")(self)()


def test_the_length_of_the_run_is_known_by_itself() -> None:
    """24 batches for 2 epochs: a horizon of 48, of which 4 steps warm up."""
    given = settings(train_dataloader=batches(24, 1), epochs=2)
    del given["loss_fn"]
    trainer = Line(**given)
    trainer.fit()
    schedule: Any = trainer.lr_scheduler
    assert (trainer.training_horizon, schedule.total_steps, schedule.warmup_steps) == (48, 48, 4)


def test_a_schedule_of_epochs_is_as_long_as_they_are_many() -> None:
    given = settings(train_dataloader=batches(24, 1), epochs=8, lr_scheduler_interval="epoch")
    del given["loss_fn"]
    trainer = Line(**given)
    trainer.fit()
    schedule: Any = trainer.lr_scheduler
    assert (schedule.total_steps, schedule.last_epoch) == (8, 8)


def test_each_of_two_optimizers_has_its_schedule_and_an_endless_run_has_none() -> None:
    made = lookup("scheduler_factory", "constant")
    two = {n: torch.optim.SGD(line().parameters(), lr=lr) for n, lr in (("a", 1.0), ("b", 2.0))}
    trainer = SimpleNamespace(optimizer=two, schedule_length=40)
    assert {n: s.get_last_lr() for n, s in made(trainer)().items()} == {"a": [0.25], "b": [0.5]}
    endless = made(SimpleNamespace(optimizer=two, schedule_length=None))
    with pytest.raises(ConfigError, match=r"not known in advance: set trainer.max_steps"):
        endless()

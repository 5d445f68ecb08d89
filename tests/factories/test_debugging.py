"""Settings for debugging a trainer with factories: leaving it, overfitting, enough steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline import Callback, Trainer
from paceline.errors import ConfigError
from paceline.recipe import build_trainer, load_recipe
from paceline.testing import assert_resumes_exactly, bits, rows

Write = Callable[..., Path]


class Seen(Callback):
    """Keeps the inputs of each micro-batch of this rank."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Any, batch: Any, batch_idx: int, loss: torch.Tensor
    ) -> None:
        self.batches.append(batch[0])


def build(path: Path, run_dir: Path, *changes: str, callback: Callback | None = None) -> Trainer:
    """Three epochs over 16 samples by 4, unless changed."""
    said = [c if c.startswith("data.") else f"+{c}" for c in changes]
    trainer = build_trainer(load_recipe(path, [f"run.dir={run_dir}", *said]))
    trainer.callbacks += [] if callback is None else [callback]
    return trainer


def train(path: Path, run_dir: Path, *changes: str) -> tuple[Trainer, list[torch.Tensor]]:
    seen = Seen()
    trainer = build(path, run_dir, *changes, callback=seen)
    trainer.train()
    return trainer, seen.batches


def test_a_run_leaves_after_a_step_and_resumes_as_if_it_had_not(
    recipe: Write, tmp_path: Path
) -> None:
    path = recipe()
    ends = []
    for changes in (
        ["trainer.exit_step=7", "trainer.exit_step_this_run=5"],
        ["trainer.exit_step=7"],
        [],
    ):
        trainer, _ = train(path, tmp_path / "parts", *changes)
        ends.append((trainer.global_step, trainer.result.stopped_by))
    assert ends == [(5, "exit_step_this_run"), (7, "exit_step"), (12, "epochs")]
    whole, _ = train(path, tmp_path / "whole")
    assert bits(trainer.model.state_dict()) == bits(whole.model.state_dict())  # pyright: ignore
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_overfitting_every_batch_is_the_first_and_there_are_as_many(
    recipe: Write, tmp_path: Path
) -> None:
    """Of 18 samples by 4, that is 5 batches an epoch; the last, short one is whole too."""
    data = {"micro_batch_size": 4, "sources": [{"type": "rows", "rows": 18}]}
    path = recipe(data=data, optimizer={"type": "sgd", "lr": 0.1})
    changes = ["trainer.overfit_first_batch=true", "trainer.log_every=1"]
    trainer, batches = train(path, tmp_path / "overfit", *changes)
    first = torch.randn(18, 3, generator=torch.Generator().manual_seed(3))[:4]
    assert len(batches) == trainer.global_step == 15
    for batch in batches:
        assert torch.equal(batch, first)
    losses = [row["train/loss"] for row in rows(tmp_path / "overfit") if "train/loss" in row]
    assert losses[-1] < losses[0] / 2


def test_small_data_are_passed_over_until_there_are_enough_steps(
    recipe: Write, tmp_path: Path
) -> None:
    """In each epoch alike, and nothing of it is kept: another number counts at once."""
    data = {"micro_batch_size": 2, "sources": [{"type": "rows", "rows": 8}]}
    path = recipe(data=data)
    for wanted, steps in ((100, 102), (13, 15), (12, 12), (3, 12)):
        trainer, batches = train(path, tmp_path / str(wanted), f"trainer.min_steps={wanted}")
        assert (trainer.global_step, trainer.training_horizon, trainer.current_epoch) == (
            *(steps, steps),
            3,
        )
        counts = Counter(tuple(row.tolist()) for batch in batches for row in batch)
        assert len(counts) == 8
        assert max(counts.values()) - min(counts.values()) <= 1
    changes = ["trainer.gradient_accumulation_steps=3", "trainer.min_steps=13"]
    assert train(path, tmp_path / "windows", *changes)[0].global_step == 15


def test_overfitting_with_enough_steps_resumes_exactly(recipe: Write, tmp_path: Path) -> None:
    path = recipe().absolute()
    changes = ["trainer.overfit_first_batch=true", "trainer.min_steps=14"]
    make = partial(build_changed, path, changes)
    assert_resumes_exactly(make, tmp_path / "runs", stop_at=6, ranks=2)


def build_changed(path: Path, changes: list[str], run_dir: Path) -> Trainer:
    return build(path, run_dir, *changes)


def test_what_would_have_no_effect_is_refused(recipe: Write, tmp_path: Path) -> None:
    path = recipe()
    for changes, message in (
        (["trainer.min_steps=20", "trainer.max_steps=9"], "is more than max_steps=9"),
        (["trainer.min_steps=20", "trainer.epoch_length=9"], "and epoch_length both say"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(path, tmp_path / "run", *changes)
    path = recipe(trainer={"type": "mine", "max_steps": 9, "min_steps": 3})
    with pytest.raises(ConfigError, match=r"min_steps=3 has no effect without epochs"):
        build(path, tmp_path / "run")
    trainer: Any = build(recipe(), tmp_path / "run", "trainer.overfit_first_batch=true")
    trainer.train_dataloader = [(torch.ones(1, 3), torch.ones(1, 1))]
    with pytest.raises(ConfigError, match=r"overfit_first_batch needs a DataLoader over a map"):
        trainer.train()

"""Tests of one's own trainer: a good one passes, a faulty one is found out, and told why."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import paceline.testing
from builders import Noisy, Regression, loader, make_model
from paceline import Callback, CheckpointPolicy
from paceline.testing import assert_resumes_exactly, assert_undisturbed

HERE_AND_ON_TWO_RANKS = pytest.mark.parametrize("ranks", [None, 2])
calls = 0  # of `CountingInItsModule`


class Counting(Regression):
    """Its loss grows with each call, and no checkpoint has the count."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().training_step(batch, batch_idx) * self.calls


class CountingInItsModule(Regression):
    """The same, but new objects count on."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        global calls
        calls += 1
        return super().training_step(batch, batch_idx) * (1 + calls % 5)


class Unseeded(Regression):
    """Its noise comes from the operating system."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * random.SystemRandom().random()


class Meddling(Callback):
    """Leaves its mark on the weights in each validation."""

    def on_validation_end(self, trainer: Any) -> None:
        with torch.no_grad():
            next(trainer.model.parameters()).mul_(1.001)


def build(
    run_dir: Path, kind: type[Regression] = Regression, *callbacks: Callback, **settings: Any
) -> Regression:
    """4 windows an epoch (3 on 2 ranks) with dropout and augmentation; 6 in all."""
    model = make_model()
    return kind(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        train_dataloader=loader(Noisy(40)),
        val_dataloader=loader(Noisy(8), shuffle=False),
        callbacks=callbacks,
        progress=False,
        log_every=1,
        run_dir=run_dir,
        **{"max_steps": 6, **settings},
    )


@HERE_AND_ON_TWO_RANKS
def test_a_good_trainer_resumes_exactly(ranks: int | None, tmp_path: Path) -> None:
    assert_resumes_exactly(build, tmp_path, stop_at=[2, 3], ranks=ranks)


@HERE_AND_ON_TWO_RANKS
def test_state_that_no_checkpoint_has_is_found(ranks: int | None, tmp_path: Path) -> None:
    """The message names the first row and the tensors that differ, and that the resume is why."""
    with pytest.raises(AssertionError) as caught:
        assert_resumes_exactly(partial(build, kind=Counting), tmp_path, stop_at=2, ranks=ranks)
    said = str(caught.value)
    assert "metrics.jsonl: step 3: train/loss" in said
    assert "state: models/model/0.weight, " in said
    assert ("rank 1, state: " in said) == (ranks == 2)
    assert "Two uninterrupted runs are equal" in said
    assert "checkpoint_objects" in said


def test_randomness_that_nobody_seeds_is_found(tmp_path: Path) -> None:
    """The message says that the resume is not to blame."""
    with pytest.raises(AssertionError, match="Two uninterrupted runs differ as well") as caught:
        assert_resumes_exactly(partial(build, kind=Unseeded), tmp_path, stop_at=2)
    assert "metrics.jsonl: step 1: train/loss" in str(caught.value)


def test_new_processes_find_state_that_hides_in_a_module(tmp_path: Path) -> None:
    hidden = partial(build, kind=CountingInItsModule)
    with pytest.raises(AssertionError, match="Two uninterrupted runs are equal"):
        assert_resumes_exactly(hidden, tmp_path, stop_at=2, ranks=1)


@pytest.mark.parametrize(
    ("settings", "stop_at", "said"),
    [
        ({}, 9, "did not stop at step 9, but ended at step 6 (max_steps)"),
        ({}, [3, 2], "did not stop at step 2, but ended at step 6"),
        ({"checkpoint": None}, 2, "saved no checkpoint"),
        ({"run_dir": None}, 2, "saved no checkpoint"),
    ],
)
def test_what_would_test_nothing_is_refused(
    settings: dict[str, Any], stop_at: Any, said: str, tmp_path: Path
) -> None:
    def made(run_dir: Path) -> Regression:
        return build(**{"run_dir": run_dir, **settings})

    with pytest.raises(AssertionError) as caught:
        assert_resumes_exactly(made, tmp_path, stop_at=stop_at)
    assert said in str(caught.value)


def looks_on(run_dir: Path, *callbacks: Callback, **settings: Any) -> Regression:
    saves = CheckpointPolicy(every_steps=1)
    return build(run_dir, Regression, *callbacks, validate_every=1, checkpoint=saves, **settings)


def test_what_looks_on_changes_nothing(tmp_path: Path) -> None:
    assert_undisturbed(build, looks_on, tmp_path)


def meddles(run_dir: Path) -> Regression:
    return looks_on(run_dir, Meddling())


@HERE_AND_ON_TWO_RANKS
def test_a_callback_that_meddles_is_found(ranks: int | None, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_undisturbed(build, meddles, tmp_path, ranks=ranks)
    said = str(caught.value)
    assert "models/model/0.weight" in said
    assert ("rank 1: models" in said) == (ranks == 2)
    assert "unwatched runs differ" not in said


def test_a_watched_trainer_that_is_not_reproducible_is_told_so(tmp_path: Path) -> None:
    unseeded = partial(build, kind=Unseeded)
    with pytest.raises(AssertionError, match="Two unwatched runs differ as well"):
        assert_undisturbed(unseeded, unseeded, tmp_path)


def test_no_test_runner_is_needed() -> None:
    """Users of unittest have no pytest."""
    for path in Path(paceline.testing.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert "pytest" not in names, path


def test_a_function_that_ranks_cannot_import_is_refused(tmp_path: Path) -> None:
    made: Callable[..., Any] = lambda run_dir: build(run_dir)  # noqa: E731
    with pytest.raises(TypeError, match="top level of a module"):
        assert_resumes_exactly(made, tmp_path, stop_at=2, ranks=1)

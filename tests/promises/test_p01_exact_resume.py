"""P1 Exact resume: stopped after any step and resumed, a run ends as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import Noisy, Regression, loader, make_model
from paceline import Callback, CheckpointPolicy, MetricMonitor
from paceline.callbacks import AveragedWeights
from paceline.checkpoint import load_tree
from paceline.errors import ResumeError
from paceline.testing import Ending, Ranks, StopAt, assert_continues, bits, traced_run

STEPS = 25


def build(run_dir: Path, workers: int = 0, **settings: Any) -> Regression:
    """10 batches an epoch (97 samples), accumulation 3: 4 windows an epoch, the last one short."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 5)
    return Regression(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [5]),
        train_dataloader=loader(Noisy(), num_workers=workers),
        val_dataloader=loader(Noisy(23), shuffle=False),
        gradient_accumulation_steps=3,
        max_grad_norm=1.0,
        metric_monitor=MetricMonitor(),
        early_stop=50,
        callbacks=[AveragedWeights(decay=0.9)],
        checkpoint=CheckpointPolicy(every_steps=4),
        progress=False,
        log_every=3,
        run_dir=run_dir,
        **{"max_steps": STEPS, **settings},
    )


@dataclass(frozen=True)
class Part:
    """A run, or its part up to a stop: what came of it, and the sample ids of each step."""

    ending: Ending
    seen: dict[int, list[int]]


def run(run_dir: Path, *callbacks: Callback, **settings: Any) -> Part:
    """Trains as far as the callbacks let it."""
    trainer = build(run_dir, **settings)
    ending = traced_run(lambda _: trainer, run_dir, *callbacks, seed=11)
    return Part(ending, trainer.seen)


@dataclass(frozen=True)
class Unbroken:
    """A run that never stopped, and the bytes of its rows."""

    run: Part
    rows: bytes


def train_unbroken(folder: Path) -> Unbroken:
    whole = run(folder)
    assert whole.ending.result.global_step == STEPS
    return Unbroken(whole, (folder / "metrics.jsonl").read_bytes())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return train_unbroken(tmp_path_factory.mktemp("unbroken"))


def check_resumed(folder: Path, parts: list[Part], unbroken: Unbroken | None) -> None:
    """The parts of a stopped run against the unbroken one: state, events, rows and sample ids."""
    whole = unbroken or train_unbroken(folder.with_name("unbroken"))
    assert_continues([part.ending for part in parts], whole.run.ending)
    assert (folder / "metrics.jsonl").read_bytes() == whole.rows
    seen: dict[int, list[int]] = {}
    for part in parts:
        seen.update(part.seen)
    assert seen == whole.run.seen


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_stopped_at_any_step_it_ends_the_same(
    step: int, tmp_path: Path, unbroken: Unbroken
) -> None:
    """Given a run stopped after `step` windows, when it is started again with fresh objects in the
    same folder, then every byte of weights, optimizer state, rows, ids and events is the same."""
    check_stopped(tmp_path, step, unbroken)


def check_stopped(folder: Path, step: int, unbroken: Unbroken | None = None) -> None:
    folder /= "run"
    check_resumed(folder, [run(folder, StopAt(step)), run(folder)], unbroken)


def test_stopped_twice_it_ends_the_same(tmp_path: Path, unbroken: Unbroken) -> None:
    parts = [run(tmp_path, StopAt(7)), run(tmp_path, StopAt(8)), run(tmp_path)]
    check_resumed(tmp_path, parts, unbroken)


class StopInValidation(Callback):
    """Asks for a stop in the middle of the validation after step 8."""

    def on_validation_batch_end(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 8 and batch_idx == 1:
            trainer.request_stop("test")


def test_stopped_in_validation_it_validates_again(tmp_path: Path, unbroken: Unbroken) -> None:
    """A validation under way is abandoned, and the resumed run begins with it."""
    check_stopped_in_validation(tmp_path, unbroken)


def check_stopped_in_validation(folder: Path, unbroken: Unbroken | None = None) -> None:
    folder /= "run"
    first = run(folder, StopInValidation())
    assert first.ending.result.global_step == 8
    second = run(folder)
    assert ("on_validation_start", 8) in second.ending.events
    check_resumed(folder, [first, second], unbroken)
    assert first.ending.state is not None
    assert first.ending.state["progress"]["pending"] == ["validation"]


@pytest.mark.parametrize("step", [1, 6, 12])
def test_worker_processes_change_nothing(step: int, tmp_path: Path, unbroken: Unbroken) -> None:
    """With two loader workers, persistent or not, stopped and resumed: the bits of none."""
    parts = [run(tmp_path, StopAt(step), workers=2), run(tmp_path, workers=2)]
    check_resumed(tmp_path, parts, unbroken)


@pytest.mark.parametrize("step", [3, 11, 24])
def test_in_new_processes_it_ends_the_same(
    step: int, ranks: Ranks, tmp_path: Path, unbroken: Unbroken
) -> None:
    """Stopped in one that has trained before, and resumed in one that has not, whose hashes of
    strings are others."""
    first = run(tmp_path, StopAt(step))
    [second] = ranks(run, 1, tmp_path)
    check_resumed(tmp_path, [first, second], unbroken)
    newest = load_tree(tmp_path / "checkpoints" / f"step_{STEPS:08d}")
    expected = unbroken.run.ending.state
    assert expected is not None
    for part in ("models", "optimizers", "schedulers", "callbacks"):
        assert bits(newest[part]) == bits(expected[part]), part


def test_a_run_resumes_only_as_what_it_was(tmp_path: Path) -> None:
    """Given a run that was stopped, when another dropout or data would continue it, it refuses."""

    def trained(dropout: float, noise: float, *callbacks: Callback) -> None:
        model = make_model(dropout)
        Regression(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1e-2),
            train_dataloader=loader(Noisy(noise=noise)),
            epochs=1,
            callbacks=list(callbacks),
            progress=False,
            run_dir=tmp_path,
        ).fit(seed=0)

    trained(0.2, 0.1, StopAt(3))
    with pytest.raises(ResumeError, match=r"models\.model\.Dropout\.p: 0\.2 then, 0\.5 now"):
        trained(0.5, 0.1)
    with pytest.raises(ResumeError, match=r"data\.dataset\.noise: 0\.1 then, 0\.2 now"):
        trained(0.2, 0.2)
    trained(0.2, 0.1)

"""P1 Exact resume: stopped after any step and resumed, a run ends as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from builders import Noisy, Recorder, Regression, StopAt, bits, loader, make_model
from paceline import Callback, CheckpointPolicy, MetricMonitor
from paceline.callbacks import AveragedWeights
from paceline.checkpoint import load_tree
from ranks import Ranks

STEPS = 25


def build(run_dir: Path, *callbacks: Any, workers: int = 0, **settings: Any) -> Regression:
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
        callbacks=[AveragedWeights(decay=0.9), *callbacks],
        checkpoint=CheckpointPolicy(every_steps=4),
        progress=False,
        log_every=3,
        run_dir=run_dir,
        **{"max_steps": STEPS, **settings},
    )


def outcome(trainer: Regression, run_dir: Path) -> dict[str, Any]:
    """All that must be equal: parameters, optimizer state, rows and every other bit of state."""
    state = trainer.checkpointed
    return {
        "models": bits(state["models"]),
        "optimizers": bits(state["optimizers"]),
        "schedulers": bits(state["schedulers"]),
        "callbacks": bits(state["callbacks"]),
        "progress": state["progress"],
        "monitor": state["monitor"],
        "rows": (run_dir / "metrics.jsonl").read_bytes(),
    }


def run(run_dir: Path, *callbacks: Any, **settings: Any) -> tuple[Regression, Recorder]:
    """Trains as far as the callbacks let it."""
    recorder = Recorder()
    trainer = build(run_dir, recorder, *callbacks, **settings)
    trainer.on_save_checkpoint = lambda state: setattr(trainer, "checkpointed", state)
    trainer.train(seed=11)
    return trainer, recorder


def train_unbroken(folder: Path) -> tuple[dict[str, Any], Any, Any]:
    trainer, recorder = run(folder)
    assert trainer.global_step == STEPS
    return outcome(trainer, folder), recorder.trace, trainer.seen


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any, Any]:
    return train_unbroken(tmp_path_factory.mktemp("unbroken"))


def check_resumed(folder: Path, first: Any, second: Any, unbroken: Any) -> None:
    """The two parts of a stopped run against the unbroken one."""
    expected, trace, seen = unbroken or train_unbroken(folder.with_name("unbroken"))
    (before, _), (after, resumed) = first, second
    assert outcome(after, folder) == expected
    assert {**before.seen, **after.seen} == seen
    assert_suffix(resumed.trace, trace)


def assert_suffix(resumed: list[Any], trace: list[Any]) -> None:
    """After on_train_start, a resumed run's events are the last of the unbroken run's.

    Saving is left out: stopping saved once more, and what was saved is not saved again.
    """
    start = [event for event, _ in resumed].index("on_train_start") + 1
    suffix = [entry for entry in resumed[start:] if entry[0] != "on_save_checkpoint"]
    plain = [entry for entry in trace if entry[0] != "on_save_checkpoint"]
    assert suffix == plain[len(plain) - len(suffix) :]


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_stopped_at_any_step_it_ends_the_same(step: int, tmp_path: Path, unbroken: Any) -> None:
    """Given a run stopped after `step` windows, when it is started again with fresh objects in the
    same folder, then every byte of weights, optimizer state, rows, ids and events is the same."""
    check_stopped(tmp_path, step, unbroken)


def check_stopped(folder: Path, step: int, unbroken: Any = None) -> None:
    folder /= "run"
    first = run(folder, StopAt(step))
    second = run(folder)
    check_resumed(folder, first, second, unbroken)


def test_stopped_twice_it_ends_the_same(tmp_path: Path, unbroken: Any) -> None:
    expected, _, seen = unbroken
    parts = [run(tmp_path, StopAt(7)), run(tmp_path, StopAt(8)), run(tmp_path)]
    assert outcome(parts[-1][0], tmp_path) == expected
    together: dict[int, list[int]] = {}
    for trainer, _ in parts:
        together.update(trainer.seen)
    assert together == seen


class StopInValidation(Callback):
    """Asks for a stop in the middle of the validation after step 8."""

    def on_validation_batch_end(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 8 and batch_idx == 1:
            trainer.request_stop("test")


def test_stopped_in_validation_it_validates_again(tmp_path: Path, unbroken: Any) -> None:
    """A validation under way is abandoned, and the resumed run begins with it."""
    check_stopped_in_validation(tmp_path, unbroken)


def check_stopped_in_validation(folder: Path, unbroken: Any = None) -> None:
    folder /= "run"
    first = run(folder, StopInValidation())
    assert first[0].global_step == 8
    second = run(folder)
    assert ("on_validation_start", 8) in second[1].trace
    check_resumed(folder, first, second, unbroken)
    assert first[0].checkpointed["progress"]["pending"] == ["validation"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 6, 12])
def test_worker_processes_change_nothing(step: int, tmp_path: Path, unbroken: Any) -> None:
    """With two loader workers, persistent or not, stopped and resumed: the bits of none."""
    first = run(tmp_path, StopAt(step), workers=2)
    second = run(tmp_path, workers=2)
    check_resumed(tmp_path, first, second, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 11, 24])
def test_in_new_processes_it_ends_the_same(
    step: int, ranks: Ranks, tmp_path: Path, unbroken: Any
) -> None:
    """Stopped in one that has trained before, and resumed in one that has not, whose hashes of
    strings are others."""
    run(tmp_path, StopAt(step))
    ranks(run_anew, 1, tmp_path)
    expected = unbroken[0]
    newest = load_tree(tmp_path / "checkpoints" / f"step_{STEPS:08d}")
    for part in ("models", "optimizers", "schedulers", "callbacks"):
        assert bits(newest[part]) == expected[part], part
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected["rows"]


def run_anew(folder: Path) -> None:
    run(folder)

"""P1 Exact resume: stopped after any step and resumed, a run ends as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Noisy, Recorder, Regression, StopAt, bits, loader, make_model
from paceline import CheckpointPolicy, MetricMonitor
from paceline.callbacks import AveragedWeights

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


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any, Any]:
    folder = tmp_path_factory.mktemp("unbroken")
    trainer, recorder = run(folder)
    assert trainer.global_step == STEPS
    return outcome(trainer, folder), recorder.trace, trainer.seen


def check_resumed(folder: Path, first: Any, second: Any, unbroken: Any) -> None:
    expected, trace, seen = unbroken
    (before, stopped), (after, resumed) = first, second
    assert outcome(after, folder) == expected
    assert {**before.seen, **after.seen} == seen
    start = [event for event, _ in resumed.trace].index("on_train_start") + 1
    suffix = [e for e in resumed.trace[start:] if e[0] != "on_save_checkpoint"]
    plain = [e for e in trace if e[0] != "on_save_checkpoint"]
    assert suffix == plain[len(plain) - len(suffix) :]


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_stopped_at_any_step_it_ends_the_same(step: int, tmp_path: Path, unbroken: Any) -> None:
    first = run(tmp_path, StopAt(step))
    assert first[0].result.stopped_by == ("test" if step < STEPS else "max_steps") or step == STEPS
    second = run(tmp_path)
    check_resumed(tmp_path, first, second, unbroken)

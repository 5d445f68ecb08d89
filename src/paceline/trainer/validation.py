"""Validation: each sample once over all ranks, disturbing nothing of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from paceline.errors import DataError, MetricError
from paceline.trainer.base import TrainerBase
from paceline.trainer.blame import in_validation
from paceline.trainer.progress import as_number
from paceline.trainer.run import Run
from paceline.trainer.stop import behind_boundary
from paceline.trainer.window import buffers_kept
from paceline.world.dtensors import reshard
from paceline.world.seeding import mix, seed_everything, stream


def validate(trainer: TrainerBase, run: Run) -> dict[str, float] | None:
    """Runs the validation data through `validation_step`.

    Args:
        trainer: whose models, data and steps these are.
        run: at a boundary.

    Returns:
        The metrics over all ranks: those logged, means over items; those of `get_val_metrics`,
        means over ranks weighted by their items. None if a stop was agreed on meanwhile.
    """
    with _evaluating(trainer, run), torch.no_grad():
        for hook in run.events.on_validation_start:
            hook()
        samples = _run_batches(trainer, run)
        everywhere = run.world.gather_parts(samples)
        if samples is None or None in everywhere:
            return None
        if sum(everywhere) == 0:
            raise DataError("the validation loader yields no batch: give it data, or none at all.")
        for hook in run.events.on_validation_end:
            hook()
        own = _own_metrics(trainer, samples)
        metrics = trainer.recorder.validation_metrics(own, samples)
    return metrics


def _run_batches(trainer: TrainerBase, run: Run) -> float | None:
    """This rank's samples, or None if it left early."""
    assert trainer.validation is not None
    step, placement = run.progress.global_step, run.placement
    key = stream(run.seed, "val", step, run.world.part)
    events, samples = run.events, 0
    for batch_idx, (batch, size) in enumerate(trainer.validation.batches()):
        if run.stop.abandons(behind_boundary(step), batch_idx):
            return None
        batch = placement.local_batch(batch)
        if size == 0:  # it only keeps this rank in step with the others
            # The user's step is not run: it may count what it sees.
            with buffers_kept(run), trainer.autocast:
                placement.call_again()
            continue
        placement.calls.clear()
        if run.count_items is not None or size < 0:
            size = trainer.count_items(batch)
        run.batch_items = size
        samples += size
        seed_everything(mix(key, batch_idx))
        for hook in events.on_validation_batch_start:
            hook(batch, batch_idx)
        try:
            with trainer.autocast:
                trainer.validation_step(batch, batch_idx)
        except Exception as error:
            shown = in_validation(trainer, run, error, batch, batch_idx)
            if shown is not error:
                raise shown from error
            raise
        for hook in events.on_validation_batch_end:
            hook(batch, batch_idx)
    return as_number(samples)


@contextmanager
def _evaluating(trainer: TrainerBase, run: Run) -> Iterator[None]:
    """Models in eval mode, no replica's buffers exchanged, values logged to the validation."""
    named = trainer.named_models()
    models = list(named.values())
    modes = [(module, module.training) for model in models for module in model.modules()]
    run.placement.share_buffers(named)
    for model in models:
        model.eval()
    trainer.recorder.val.reset()
    run.validating = True
    try:
        with run.placement.unsynchronized():
            yield
    finally:
        run.validating = False
        run.batch_items = None
        reshard(models)
        for module, mode in modes:
            module.training = mode


def _own_metrics(trainer: TrainerBase, samples: float) -> dict[str, float]:
    try:
        metrics: Any = trainer.get_val_metrics()
    except ZeroDivisionError:
        if samples:
            raise
        metrics = {}  # a rank without samples has no means to give
    if not isinstance(metrics, dict):
        raise MetricError(f"get_val_metrics returned {metrics!r:.80}; it returns a dictionary.")
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MetricError(
                f"get_val_metrics()[{name!r}] is {value!r:.80}, which is no number."
            ) from error
    return numbers

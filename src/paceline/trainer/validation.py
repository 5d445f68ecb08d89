"""Validation: each sample once over all ranks, disturbing nothing of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from paceline.data.source import Validation
from paceline.errors import DataError, MetricError
from paceline.trainer.base import TrainerBase
from paceline.trainer.error_context import in_validation
from paceline.trainer.monitor import metric_of
from paceline.trainer.progress import as_number
from paceline.trainer.run import Run
from paceline.trainer.stop import behind_boundary
from paceline.trainer.window import buffers_kept
from paceline.world.dtensors import reshard
from paceline.world.seeding import mix, seed_everything, seed_of, stream

# Ranks agree on the batch before which a validation is abandoned. Numbered like this, the batches
# of a loader have the same numbers on every rank, however many the loaders before it have there.
_BATCHES_A_LOADER = 1 << 32


def measure(trainer: TrainerBase, run: Run) -> dict[str, float] | None:
    """Calls `trainer.evaluate()` where a validation is due.

    One of the user's own runs as a validation step does: in eval mode, without gradients, under a
    random stream of its own.

    Args:
        trainer: whose `evaluate` it is.
        run: at a boundary.

    Returns:
        The metrics, equal on every rank: those that rank 0's `evaluate` returned, and means over
        all ranks of what one of the user's own logged. None if it returned None and the run is to
        stop here, with the validation still to be done.
    """
    step, logged = run.progress.global_step, {}
    if trainer.is_overridden("evaluate"):
        with validating(trainer, run):
            seed_everything(stream(run.seed, "val", step, run.world.part))
            returned = trainer.evaluate()
            returned = None if returned is None else _numbers("evaluate()", returned)
            returned = run.world.broadcast_object(returned)
            if returned is None and run.stop.reached(behind_boundary(run.progress.place)):
                return None
            _end(run)
            logged = trainer.recorder.validation_metrics({}, 0)
    else:
        returned = run.world.broadcast_object(trainer.evaluate())
        if returned is None and run.stop.reached(behind_boundary(run.progress.place)):
            return None
    return {**logged, **(returned or {})}


def judge(trainer: TrainerBase, run: Run, metrics: dict[str, float]) -> bool:
    """Hands a validation's metrics to hooks, sinks, the monitor and schedulers.

    Args:
        trainer: whose validation it was.
        run: at the boundary.
        metrics: equal on every rank.

    Returns:
        Whether they are the best so far.
    """
    progress = run.progress
    if not metrics and progress.validated_at < 0:
        trainer.say(
            "the validation measured nothing: call self.log in validation_step, or return metrics "
            "from get_val_metrics."
        )
    progress.validated_at = progress.global_step
    progress.metrics = metrics
    for hook in run.events.on_metrics:
        hook(metrics)
    trainer.recorder.write_metrics(metrics)
    monitor = trainer.metric_monitor
    improved = monitor is not None and monitor(metrics)
    left_out = monitor is not None and monitor.is_left_out(metrics)
    if trainer.lr_scheduler_interval == "metric" and not left_out:
        name = "val/loss" if monitor is None else monitor.metric_name
        trainer.optimization.step_schedulers("metric", metric_of(metrics, name))
    return improved


def validate(trainer: TrainerBase, run: Run) -> dict[str, float] | None:
    """Runs the validation data through `validation_step`.

    Args:
        trainer: whose models, data and steps these are.
        run: at a boundary.

    Returns:
        The metrics over all ranks: those logged, means over items; those of `get_val_metrics`,
        means over ranks weighted by their items. None if a stop was agreed on meanwhile.

    Raises:
        DataError: a loader yields no batch.
    """
    if not trainer.validation:
        return {}
    with validating(trainer, run):
        _start(run)
        counts = _run_loaders(trainer, run)
        everywhere = run.world.gather_parts(counts)
        if counts is None or None in everywhere:
            return None
        for name, each in zip(trainer.validation, zip(*everywhere, strict=True), strict=True):
            if sum(each) == 0:
                which = "the validation loader" if name is None else f"val_dataloader[{name!r}]"
                raise DataError(f"{which} yields no batch: give it data, or none at all.")
        _end(run)
        samples = sum(counts)
        metrics = trainer.recorder.validation_metrics(_own_metrics(trainer, samples), samples)
        run.batch_items = None
    return metrics


def _run_loaders(trainer: TrainerBase, run: Run) -> list[float] | None:
    """This rank's samples from each loader, or None if it left early."""
    counts: list[float] = []
    for i, (name, data) in enumerate(trainer.validation.items()):
        run.val_name = name
        samples = _run_batches(trainer, run, data, i * _BATCHES_A_LOADER)
        run.val_name = None
        if samples is None:
            return None
        counts.append(samples)
    return counts


def _run_batches(trainer: TrainerBase, run: Run, data: Validation, first: int) -> float | None:
    """This rank's samples from one loader, or None if it left early.

    Args:
        trainer: whose validation steps these are.
        run: in a validation.
        data: of the loader at hand.
        first: the number of its first batch in the whole validation.
    """
    placement, behind = run.placement, behind_boundary(run.progress.place)
    key = stream(seed_of(run.val_name, run.seed), "val", run.global_step, run.world.part)
    events, samples = run.events, 0
    most = trainer.max_val_batches
    if most is not None and data.length is not None and data.length <= most:
        most = None  # it is read to its end
    for batch_idx, (batch, size) in enumerate(islice(data.batches(), most)):
        if run.stop.abandons(behind, first + batch_idx):
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
            in_validation(trainer, run, error, batch, batch_idx)
            raise
        for hook in events.on_validation_batch_end:
            hook(batch, batch_idx)
    return as_number(samples)


@contextmanager
def validating(trainer: TrainerBase, run: Run) -> Iterator[None]:
    """Models in eval mode, no gradients, no buffers exchanged, values logged to the validation.

    Within a validation, nothing: an `evaluate` of the user's own may call the Trainer's.

    Args:
        trainer: whose models these are.
        run: at a boundary.
    """
    if run.validating:
        yield
        return
    named = trainer.named_models()
    models = list(named.values())
    modes = [(module, module.training) for model in models for module in model.modules()]
    run.placement.share_buffers(named)
    for model in models:
        model.eval()
    trainer.recorder.val.reset()
    run.validating = True
    try:
        with run.placement.unsynchronized(), torch.no_grad():
            _start(run)
            yield
    finally:
        run.validating = run.started_validation = False
        run.batch_items = run.val_name = None
        reshard(models)
        for module, mode in modes:
            module.training = mode


def _start(run: Run) -> None:
    """Calls who listens to a validation's start, unless it has started."""
    if not run.started_validation:
        run.started_validation = True
        for hook in run.events.on_validation_start:
            hook()


def _end(run: Run) -> None:
    """Calls who listens to a validation's end, unless it has ended."""
    if run.started_validation:
        run.started_validation = False
        for hook in run.events.on_validation_end:
            hook()


def _own_metrics(trainer: TrainerBase, samples: float) -> dict[str, float]:
    try:
        metrics: Any = trainer.get_val_metrics()
    except ZeroDivisionError:
        if samples:
            raise
        metrics = {}  # a rank without samples has no means to give
    return _numbers("get_val_metrics()", metrics)


def _numbers(source: str, metrics: Any) -> dict[str, float]:
    """Metrics as plain numbers.

    Args:
        source: the call that returned them.
        metrics: what it returned.

    Raises:
        MetricError: they are no dictionary of numbers.
    """
    if not isinstance(metrics, dict):
        raise MetricError(f"{source} returned {metrics!r:.80}; it returns a dictionary.")
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MetricError(
                f"{source}[{name!r}] is {value!r:.80}, which is no number."
            ) from error
    return numbers

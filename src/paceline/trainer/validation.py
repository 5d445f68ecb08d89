"""Validation: each sample once over all ranks, disturbing nothing of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from paceline.errors import ConfigError, DataError, MetricError
from paceline.trainer.blame import in_validation
from paceline.trainer.ddp import Replica
from paceline.trainer.placement import share_buffers
from paceline.trainer.progress import as_number
from paceline.trainer.window import buffers_kept, here
from paceline.world.dtensors import reshard
from paceline.world.seeding import mix, seed_everything, stream

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


def validate(trainer: Trainer) -> dict[str, float] | None:
    """Runs the validation data through `validation_step`.

    Returns:
        The metrics over all ranks: those logged, means over items; those of `get_val_metrics`,
        means over ranks weighted by their items. None if a stop was agreed on meanwhile.
    """
    if not trainer._open:
        raise ConfigError(
            "evaluate() works within a run: call it from a hook or a train() of yours."
        )
    with _evaluating(trainer), torch.no_grad():
        for hook in trainer.events.on_validation_start:
            hook()
        samples = _run_batches(trainer)
        everywhere = trainer.world.gather_parts(samples)
        if samples is None or None in everywhere:
            return None
        if sum(everywhere) == 0:
            raise DataError("the validation loader yields no batch: give it data, or none at all.")
        for hook in trainer.events.on_validation_end:
            hook()
        own = _own_metrics(trainer, samples)
        metrics = trainer.recorder.validation_metrics(own, samples)
    return metrics


def _run_batches(trainer: Trainer) -> float | None:
    """This rank's samples, or None if it left early."""
    assert trainer.validation is not None
    key = stream(trainer.seed, "val", trainer.global_step, trainer.world.part)
    events, samples = trainer.events, 0
    for batch_idx, (batch, size) in enumerate(trainer.validation.batches()):
        if trainer.stop_agreement.abandons(2 * trainer.global_step + 1, batch_idx):
            return None
        batch = here(trainer, batch)
        if size == 0:  # it only keeps this rank in step with the others
            _stand_in(trainer)
            continue
        trainer.validation_calls.clear()
        if trainer.counts_items or size < 0:
            size = trainer.count_items(batch)
        trainer.batch_items = size
        samples += size
        seed_everything(mix(key, batch_idx))
        for hook in events.on_validation_batch_start:
            hook(batch, batch_idx)
        try:
            with trainer.autocast:
                trainer.validation_step(batch, batch_idx)
        except Exception as error:
            shown = in_validation(trainer, error, batch, batch_idx)
            if shown is not error:
                raise shown from error
            raise
        for hook in events.on_validation_batch_end:
            hook(batch, batch_idx)
    return as_number(samples)


def _stand_in(trainer: Trainer) -> None:
    """Where other ranks wait for its models, calls them as the batch before did.

    The user's step is not run: it may count what it sees.
    """
    if not trainer.parallel.calls_together:
        return
    from paceline.trainer.sharding import call_again

    with buffers_kept(trainer), trainer.autocast:
        call_again(trainer.validation_calls)


@contextmanager
def _evaluating(trainer: Trainer) -> Iterator[None]:
    """Models in eval mode, no replica's buffers exchanged, values logged to the validation."""
    models = list(trainer.named_models().values())
    modes = [(module, module.training) for model in models for module in model.modules()]
    share_buffers(trainer)
    for model in models:
        model.eval()
    replicas = [replica for replica in trainer.replicas if isinstance(replica, Replica)]
    for replica in replicas:
        # Ranks may have unequal numbers of batches: no exchange may depend on one.
        replica.require_forward_param_sync = replica.require_backward_grad_sync = False
    trainer.recorder.val.reset()
    trainer._validating = True
    try:
        yield
    finally:
        trainer._validating = False
        trainer.batch_items = None
        for replica in replicas:
            replica.require_forward_param_sync = True
        reshard(models)
        for module, mode in modes:
            module.training = mode


def _own_metrics(trainer: Trainer, samples: float) -> dict[str, float]:
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

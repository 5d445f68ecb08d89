"""What an error in a user's code was about: the step, the rank, the samples, the batch itself.

Nothing here runs before an error does, so the loop pays nothing for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from paceline.data.batches import describe
from paceline.errors import (
    LossError,
    NonFiniteError,
    PacelineError,
    PeerError,
    StateError,
    some,
)
from paceline.trainer.base import TrainerBase
from paceline.trainer.run import Run
from paceline.trainer.stop import is_lost_connection, timed_out

# What a model raises that gets a batch it is not made for.
_MISFITS = (RuntimeError, TypeError, ValueError, IndexError, KeyError)
_SECOND_BACKWARD = (
    "the loss has no graph any more. Does training_step call backward() itself? It returns the "
    "loss, and the loop calls backward() and steps the optimizer; to do so yourself, override "
    "step(window) with self.backward(loss) and self.optimizer_step(). Does the loss depend on a "
    "tensor of an earlier step? Detach that tensor."
)
_SHARDED = (
    "A sharded model has its parameters whole while it is called: put what uses them, or another "
    "method of the model, into its forward(), and call the model itself, self.model(...)."
)
_LEFT_OUT = (
    "To leave an attribute of the Trainer out of checkpoints, begin its name with an underscore."
)
_SHOWN = 32  # sample indices in a message


def whereabouts(trainer: TrainerBase, run: Run) -> str:
    """Which step and batch the run is at, in words; may be asked from another thread.

    Args:
        trainer: with the window at hand.
        run: under way.
    """
    step = run.progress.global_step
    if run.predicted is not None:
        return f"batch {run.predicted} of the prediction"
    if run.validating:
        which = "" if run.val_name is None else f" {run.val_name!r}"
        return f"the validation{which} after step {step}"
    if run.batch_items is None:  # none is at hand
        return f"after step {step}" if step else "before step 1"
    return f"step {step + 1}, batch {trainer.window.batch_idx} of epoch {trainer.current_epoch}"


def _called(trainer: TrainerBase, run: Run) -> str:
    """Which models this rank has called in its last micro-batch, to compare with other ranks."""
    replicas = run.placement.replicas
    spread = {id(getattr(each, "module", each)): each.called for each in replicas}
    models = {name: spread.get(id(model)) for name, model in trainer.named_models().items()}
    called = [name for name, is_called in models.items() if is_called]
    others = [name for name, is_called in models.items() if is_called is False]
    if not called or not others:
        return ""
    return f" In this micro-batch this one has called {some(called)}, and not {some(others)}."


def in_training(trainer: TrainerBase, run: Run, error: BaseException) -> BaseException:
    """The error to raise instead: one of ours where the cause is known, else itself.

    A note on it says which batch it is about; at the first batch, what to look at too.

    Args:
        trainer: whose window may be at hand.
        run: that fails.
        error: what its training raised.
    """
    if timed_out(error):
        return PeerError(
            f"{whereabouts(trainer, run)}: rank {run.world.rank} has waited in a collective for "
            f"{run.world.timeout:g} s (parallel.timeout), and another rank has not joined it: do "
            f"all ranks call the same models equally often?{_called(trainer, run)} The report "
            f"above, of some rank, says where each of them was. ({error})"
        )
    if isinstance(error, StateError) and str(error).startswith("objects."):
        error.add_note(_LEFT_OUT)
    if run.batch_items is None or not isinstance(error, Exception):
        return error
    if is_lost_connection(error):
        error.add_note(f"in {whereabouts(trainer, run)}, rank {run.world.rank}")
        return error
    if isinstance(error, NonFiniteError):
        return error  # says all of this itself
    window = trainer.window
    where = (
        f"{whereabouts(trainer, run)}, rank {run.world.rank}: {describe(window.batch)}; "
        f"samples {_some(window.ids())}"
    )
    if isinstance(error, RuntimeError) and "through the graph a second time" in str(error):
        instead = LossError(_SECOND_BACKWARD)
        instead.add_note(f"in {where}")
        return instead
    steps: list[Callable[..., Any]] = [trainer.training_step]
    if trainer.is_overridden("step"):
        steps.append(trainer.step)
    first = trainer.local_batches == 0 and _passed_through(error, steps)
    _note(error, "training_step", where, _hint(trainer, window.batch) if first else None)
    return error


def in_validation(
    trainer: TrainerBase, run: Run, error: Exception, batch: Any, batch_idx: int
) -> None:
    """The same for a batch of a validation.

    Args:
        trainer: whose validation it is.
        run: that fails.
        error: what its validation step raised.
        batch: that the step was given.
        batch_idx: its index.
    """
    if is_lost_connection(error):
        return
    rank = run.world.rank
    which = "" if run.predicted is not None else f", batch {batch_idx}"
    where = f"{whereabouts(trainer, run)}{which}, rank {rank}: {describe(batch)}"
    first = batch_idx == 0 and run.progress.validated_at < 0
    first = first and _passed_through(error, [trainer.validation_step])
    _note(error, "validation_step", where, _hint(trainer, batch) if first else None)


def _hint(trainer: TrainerBase, batch: Any) -> str:
    """What to look at when a step fails on its first batch."""
    text = (
        "Do the shapes, the dtypes and the order of what the loader yields fit the model and the "
        "loss?"
    )
    own = any(map(trainer.is_overridden, ("loss", "training_step", "validation_step", "step")))
    if own or not isinstance(batch, Mapping):
        return text
    return (
        "The model got a dictionary of all but the targets: take it in its forward, or override "
        f"loss(batch), e.g. with self.model(**inputs).\n{text}"
    )


def _note(error: Exception, step: str, where: str, hint: str | None) -> None:
    """Adds to an error, which keeps its type, what its batch was.

    Args:
        error: the error.
        step: the method that was given the batch.
        where: the batch, in words.
        hint: what to look at, if the step raised the error for its first batch.
    """
    if "mixed torch.Tensor and DTensor" in str(error):
        error.add_note(f"in {where}\n{_SHARDED}")
        return
    known = isinstance(error, (PacelineError, torch.OutOfMemoryError))
    if hint is None or known or not isinstance(error, _MISFITS):
        error.add_note(f"in {where}")
    else:
        error.add_note(f"{step} failed on its first batch: {where}\n{hint}")


def _passed_through(error: BaseException, functions: list[Callable[..., Any]]) -> bool:
    """Whether the error was raised by one of the functions, or by what it called."""
    codes = {getattr(each, "__code__", None) for f in functions for each in (f, inspect.unwrap(f))}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return True
        trace = trace.tb_next
    return False


def _some(ids: list[Any]) -> str:
    rest = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return f"{ids[:_SHOWN]}{rest}" if ids else "unknown"

"""What is decided at a boundary: whether training is over, and whether to save.

Each decision is a function of values that are equal on every rank.
"""

from __future__ import annotations

from paceline.checkpoint import reasons_due
from paceline.trainer.base import TrainerBase
from paceline.trainer.run import Run


def out_of_patience(trainer: TrainerBase) -> bool:
    """Whether `early_stop` validations have brought nothing better, or a callback says so."""
    monitor, patience = trainer.metric_monitor, trainer.early_stop
    if patience is not None and monitor is not None and monitor.worse_count >= patience:
        return True
    return any(callback.out_of_patience for callback in trainer.callbacks)


def ending(trainer: TrainerBase, run: Run, *, epoch_ends: bool) -> str | None:
    """Why training is over after this window, if it has reached its horizon.

    Args:
        trainer: with the horizon.
        run: at the boundary.
        epoch_ends: whether this window is its epoch's last.
    """
    progress = run.progress
    if epoch_ends and trainer.epochs is not None and progress.epoch + 1 >= trainer.epochs:
        return "epochs"
    if trainer.max_steps is not None and progress.global_step >= trainer.max_steps:
        return "max_steps"
    return None


def save_reasons(
    trainer: TrainerBase, run: Run, *, epoch_ended: bool = False, improved: bool = False
) -> list[str]:
    """Why the policy, or anybody who asked, wants a checkpoint at this boundary.

    Args:
        trainer: with the policy.
        run: at the boundary.
        epoch_ended: whether an epoch has ended here.
        improved: whether the validation here was the best so far.
    """
    if run.saver is None or trainer.checkpoint_policy is None:
        return []
    done = run.progress.epoch if epoch_ended else None
    step = run.progress.global_step
    due = reasons_due(trainer.checkpoint_policy, step=step, epochs_done=done, improved=improved)
    return due + run.asked_saves

"""What is decided at a boundary: whether training is over, and whether to save.

Each decision is a function of values that are equal on every rank.
"""

from __future__ import annotations

from paceline.checkpoint import reasons_due
from paceline.checkpoint.policy import among_best
from paceline.trainer.base import TrainerBase
from paceline.trainer.callback import EARLY_STOP
from paceline.trainer.run import Run
from paceline.trainer.saving import wait_for_saves
from paceline.trainer.settings import epochs_between


def out_of_patience(trainer: TrainerBase) -> str | None:
    """Why `early_stop` or a callback ends the run; None if none of them does."""
    monitor, patience = trainer.metric_monitor, trainer.early_stop
    if patience is not None and monitor is not None and monitor.worse_count >= patience:
        return EARLY_STOP
    ending = (callback.ends_with for callback in trainer.callbacks if callback.out_of_patience)
    return next(ending, None)


def validates(trainer: TrainerBase, run: Run) -> bool:
    """Whether a validation is due at the end of the present epoch, by `validate_every`.

    Args:
        trainer: with the setting.
        run: at the boundary.
    """
    between = epochs_between(trainer.validate_every)
    return between is not None and (run.progress.epoch + 1) % between == 0


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


def worth_keeping(trainer: TrainerBase, run: Run) -> bool:
    """Whether the validation just made is among the `keep_best` best, of which there are several.

    Args:
        trainer: with the policy and the monitor.
        run: at the boundary.
    """
    policy, monitor = trainer.checkpoint_policy, trainer.metric_monitor
    if run.saver is None or policy is None or policy.keep_best == 1 or monitor is None:
        return False
    score = monitor.score(run.progress.metrics)
    wait_for_saves(run)  # the one in flight counts too
    return score is not None and among_best(score, run.saver.list(), policy.keep_best)


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

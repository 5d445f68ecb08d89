"""What is decided at a boundary: what is best, whether training is over, whether to save.

Each decision is a function of values that are equal on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.checkpoint import reasons_due
from paceline.trainer.monitor import metric_of

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


def judge(trainer: Trainer, metrics: dict[str, float]) -> bool:
    """Tells everybody who waits for a validation; returns whether it is the best so far."""
    if not metrics and trainer.progress.validated_at < 0:
        trainer.say(
            "the validation measured nothing: call self.log in validation_step, or return metrics "
            "from get_val_metrics."
        )
    trainer.progress.validated_at = trainer.global_step
    trainer.progress.metrics = metrics
    for hook in trainer.events.on_metrics:
        hook(metrics)
    trainer.recorder.write_validation(metrics)
    monitor = trainer.metric_monitor
    improved = monitor is not None and monitor(metrics)
    if trainer.lr_scheduler_interval == "metric":
        name = "val/loss" if monitor is None else monitor.metric_name
        trainer.optimization.step_schedulers("metric", metric_of(metrics, name))
    return improved


def out_of_patience(trainer: Trainer) -> bool:
    """Whether `early_stop` validations have brought nothing better, or a callback says so."""
    monitor, patience = trainer.metric_monitor, trainer.early_stop
    if patience is not None and monitor is not None and monitor.worse_count >= patience:
        return True
    return any(callback.out_of_patience for callback in trainer.callbacks)


def ending(trainer: Trainer, *, epoch_ends: bool) -> str | None:
    """Why training is over after this window, if it has reached its horizon."""
    if epoch_ends and trainer.epochs is not None and trainer.current_epoch + 1 >= trainer.epochs:
        return "epochs"
    if trainer.max_steps is not None and trainer.global_step >= trainer.max_steps:
        return "max_steps"
    return None


def save_reasons(
    trainer: Trainer, *, epoch_ended: bool = False, improved: bool = False
) -> list[str]:
    """Why the policy, or anybody who asked, wants a checkpoint at this boundary."""
    if trainer.saver is None or trainer.checkpoint_policy is None:
        return []
    done = trainer.current_epoch if epoch_ended else None
    step = trainer.global_step
    due = reasons_due(trainer.checkpoint_policy, step=step, epochs_done=done, improved=improved)
    return due + trainer._asked_saves

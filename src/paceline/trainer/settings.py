"""Settings of a Trainer that belong together, and the checks on them before anything runs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError, nearest
from paceline.trainer.events import misspelt_hooks

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

_MODES = ("auto", "never", "must", "fresh")
_ELSEWHERE = {
    "criterion": "loss_fn",
    "loss": "loss_fn",
    "scheduler": "lr_scheduler",
    "max_epochs": "epochs",
    "n_epochs": "epochs",
    "num_train_epochs": "epochs",
    "train_loader": "train_dataloader",
    "train_dataloaders": "train_dataloader",
    "val_loader": "val_dataloader",
    "val_dataloaders": "val_dataloader",
    "eval_dataloader": "val_dataloader",
    "gradient_clip_val": "max_grad_norm",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "log_every_n_steps": "log_every",
    "logger": "loggers",
    "save_every_n_steps": "checkpoint=CheckpointPolicy(every_steps=...)",
    "permanent_save_every_n_steps": "checkpoint=CheckpointPolicy(keep_every_steps=...)",
    "save_every_n_epochs": "checkpoint=CheckpointPolicy(every_epochs=...)",
    "save_last_k": "checkpoint=CheckpointPolicy(keep_last=...)",
    "resume_from_checkpoint": "resume",
    "project_dir": "run_dir",
    "early_stopping_config": "early_stop=... with metric_monitor=MetricMonitor(...)",
    "device": "nothing: the device follows from the machine (trainer.device)",
}


@dataclass(frozen=True)
class Resume:
    """How a run that finds an earlier one in its folder goes on.

    Args:
        mode: "auto" goes on from the newest intact checkpoint, or starts if there is none;
            "must" fails if there is none; "never" fails if there is one; "fresh" moves an earlier
            run aside; any other text is the path of a checkpoint.
        accept: identity keys that may differ from the checkpoint's, e.g. ("optimizer.lr",).
        init_from: a checkpoint or run folder whose model weights a new run starts from.
    """

    mode: str = "auto"
    accept: tuple[str, ...] = ()
    init_from: str | Path | None = None

    @property
    def path(self) -> Path | None:
        """The checkpoint asked for by path."""
        return None if self.mode in _MODES else Path(self.mode)


def unknown_keyword(names: dict[str, Any], trainer: type) -> ConfigError:
    """The error for keywords that the Trainer does not have; another system's get ours named."""
    known = [name for name in inspect.signature(trainer).parameters if name != "unknown"]
    lines = [
        f"{name}: "
        + (
            f"here it is {_ELSEWHERE[name]}."
            if name in _ELSEWHERE
            else f"no such setting{nearest(name, known)}"
        )
        for name in names
    ]
    return ConfigError("Trainer(...) got what it does not have:\n  " + "\n  ".join(lines))


def check_settings(trainer: Trainer) -> None:
    """Refuses impossible settings, all of them at once.

    Raises:
        ConfigError: with one line a mistake.
    """
    wrong = [m for listener in (trainer, *trainer.callbacks) for m in misspelt_hooks(listener)]
    _check_choices(trainer, wrong)
    _check_numbers(trainer, wrong)
    if trainer.early_stop is not None and trainer.metric_monitor is None:
        wrong.append(
            "early_stop: it counts validations without a better metric, so it needs "
            "metric_monitor=MetricMonitor(...)."
        )
    if trainer.metric_monitor is not None and trainer.val_dataloader is None:
        wrong.append("metric_monitor: nothing is ever validated without a val_dataloader.")
    if trainer.run_dir is None and trainer.resume.path is not None:
        wrong.append("resume: a run without run_dir cannot go on from a checkpoint.")
    if trainer.on_nonfinite == "rewind" and (
        trainer.run_dir is None or trainer.checkpoint_policy is None
    ):
        wrong.append("on_nonfinite='rewind': it goes back to a checkpoint, and none is written.")
    if trainer.epochs is None and trainer.max_steps is None:
        wrong.append("epochs: say where the run ends, with epochs=... or max_steps=...")
    if trainer.train_dataloader is None:
        wrong.append("train_dataloader: there is nothing to train on.")
    if wrong:
        raise ConfigError("these settings cannot work:\n  " + "\n  ".join(wrong))


def _check_choices(trainer: Trainer, wrong: list[str]) -> None:
    for name, choices in {
        "lr_scheduler_interval": ("step", "epoch", "metric"),
        "precision": ("fp32", "bf16", "fp16"),
        "on_nonfinite": ("raise", "stop", "skip", "rewind"),
    }.items():
        value = getattr(trainer, name)
        if value not in choices:
            wrong.append(f"{name}={value!r}: expected one of {', '.join(choices)}.")
    every = trainer.validate_every
    if every != "epoch" and not (isinstance(every, int) and every > 0):
        wrong.append(f"validate_every={every!r}: expected 'epoch' or a number of steps.")


def _check_numbers(trainer: Trainer, wrong: list[str]) -> None:
    for name in (
        "epochs",
        "max_steps",
        "epoch_length",
        "global_batch_size",
        "early_stop",
        "gradient_accumulation_steps",
        "log_every",
    ):
        value = getattr(trainer, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            wrong.append(f"{name}={value!r}: expected a whole number.")
        elif value is not None and value < 1:
            wrong.append(f"{name}={value!r}: expected at least 1.")
    norm = trainer.max_grad_norm
    if norm is not None and not norm > 0:
        wrong.append(f"max_grad_norm={norm!r}: expected a positive norm, or None not to clip.")
    if trainer.global_batch_size is not None and trainer.gradient_accumulation_steps != 1:
        wrong.append(
            "global_batch_size and gradient_accumulation_steps: give one of them; the "
            "accumulation follows from the global batch size."
        )

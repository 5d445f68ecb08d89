"""The costs of a whole run: validations, checkpoints on the disk, seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.checkpoint import CheckpointPolicy
from paceline.trainer.settings import epochs_between

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


@dataclass(frozen=True)
class Length:
    """The length of a run; each is None if unknown until the data ends.

    Attributes:
        steps: optimizer steps.
        epochs: whole epochs.
        validations: all validations, including the one at the end.
    """

    steps: int | None
    epochs: int | None
    validations: int | None


def length_of(trainer: Trainer, validate_every: str | int) -> Length:
    """The length of the run that a started trainer would make.

    Args:
        trainer: one that has been started, so that its data are counted.
        validate_every: the recipe's setting.
    """
    steps, an_epoch = trainer.training_horizon, trainer.source.windows_per_epoch
    epochs = trainer.epochs
    if steps is not None and an_epoch is not None:
        epochs = steps // an_epoch
    if not trainer.has_validation:
        validations: int | None = 0
    elif isinstance(validate_every, int):
        validations = None if steps is None else -(-steps // validate_every)
    else:
        begun = epochs if steps is None or an_epoch is None else -(-steps // an_epoch)
        validations = None if begun is None else -(-begun // (epochs_between(validate_every) or 1))
    return Length(steps, epochs, validations)


def most_checkpoints(policy: CheckpointPolicy, length: Length, *, monitored: bool) -> int | None:
    """The most checkpoints on the disk at any time, including the one being written.

    Args:
        policy: when to save and what to keep.
        length: the run's length.
        monitored: whether a metric decides which is best.

    Returns:
        Their number, or None if it depends on a length that is unknown.
    """
    best = policy.keep_best if policy.save_best and monitored else 0
    known = length.steps is not None and length.epochs is not None
    saves: int | None = None
    if known and length.validations is not None:
        assert length.steps is not None
        assert length.epochs is not None
        saves = 1 + bool(best) * length.validations  # the last one, and each that may be the best
        saves += length.steps // policy.every_steps if policy.every_steps else 0
        saves += length.epochs // policy.every_epochs if policy.every_epochs else 0
    if policy.keep_last is None:
        return saves
    kept = policy.keep_last + best + 1
    if policy.keep_every_steps is not None:
        if length.steps is None:
            return None
        kept += length.steps // policy.keep_every_steps
    return kept if saves is None else min(kept, saves)

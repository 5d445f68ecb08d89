"""What a whole run will take: validations, checkpoints on the disk, seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.checkpoint import CheckpointPolicy

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer


@dataclass(frozen=True)
class Length:
    """How long a run is; each is None if only the data's end will tell.

    Attributes:
        steps: optimizer steps.
        epochs: whole epochs.
        validations: those within the run, the one at its end included.
    """

    steps: int | None
    epochs: int | None
    validations: int | None


def length_of(trainer: Trainer, validate_every: str | int) -> Length:
    """The length of the run that a started trainer would make.

    Args:
        trainer: its data are counted.
        validate_every: the recipe's.
    """
    steps, an_epoch = trainer.training_horizon, trainer.source.windows_per_epoch
    epochs = trainer.epochs
    if steps is not None and an_epoch is not None:
        epochs = steps // an_epoch
    if not trainer.has_validation:
        validations: int | None = 0
    elif isinstance(validate_every, int):
        validations = None if steps is None else -(-steps // validate_every)
    elif steps is None or an_epoch is None:
        validations = epochs
    else:
        validations = -(-steps // an_epoch)
    return Length(steps, epochs, validations)


def most_checkpoints(policy: CheckpointPolicy, length: Length, *, monitored: bool) -> int | None:
    """The most checkpoints that lie on the disk at once, the one being written included.

    Args:
        policy: when to save and what to keep.
        length: of the run.
        monitored: a metric decides what is best.

    Returns:
        Their number, None if it depends on a length that is not known.
    """
    best = policy.save_best and monitored
    known = length.steps is not None and length.epochs is not None
    saves: int | None = None
    if known and length.validations is not None:
        assert length.steps is not None
        assert length.epochs is not None
        saves = 1 + best * length.validations  # the last, and each that may be the best
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

"""When to write a checkpoint, and which ones to keep."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from paceline.errors import ConfigError

NATIVE = "native"
"""The name of the checkpoint engine that ships with Paceline."""


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """When a run saves checkpoints, and which of them it keeps.

    Whatever the policy, the final state is saved, whether the run finished or was stopped.

    Args:
        every_epochs: save at the end of every n-th epoch; None for never.
        every_steps: save after every n-th optimizer step; None for never.
        keep_last: how many of the newest checkpoints to keep; None for all. The same limit applies
            to checkpoints set aside as damaged, and to those set aside as abandoned.
        keep_every_steps: also keep, permanently, checkpoints at multiples of this many steps.
        save_best: save when the monitored metric improves, and keep the best checkpoint.
        asynchronous: write in the background while training continues. Takes host memory for one
            copy of the state.
        engine: what stores the checkpoints: "native", or a `CheckpointEngine` of your own by the
            name under which it is registered. `paceline export` reads native ones alone.

    Raises:
        ConfigError: a value has the wrong type, or a number is not at least 1.
    """

    every_epochs: int | None = 1
    every_steps: int | None = None
    keep_last: int | None = 1
    keep_every_steps: int | None = None
    save_best: bool = True
    asynchronous: bool = True
    engine: str = NATIVE

    def __post_init__(self) -> None:
        mistakes = []
        for name in ("every_epochs", "every_steps", "keep_last", "keep_every_steps"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                mistakes.append(
                    f"{name} must be a whole number of at least 1 or None, not {value!r}"
                )
        for name in ("save_best", "asynchronous"):
            if type(getattr(self, name)) is not bool:
                mistakes.append(f"{name} must be true or false, not {getattr(self, name)!r}")
        if type(self.engine) is not str:
            mistakes.append(f"engine must be the name of a checkpoint engine, not {self.engine!r}")
        if mistakes:
            raise ConfigError("checkpoint: " + "; ".join(mistakes))


class Kept(Protocol):
    """What `to_keep` needs to know about a checkpoint."""

    @property
    def save_id(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def best(self) -> bool: ...


def reasons_due(
    policy: CheckpointPolicy,
    *,
    step: int,
    epochs_done: int | None = None,
    improved: bool = False,
) -> list[str]:
    """The reasons for a checkpoint at this boundary.

    Args:
        policy: the settings.
        step: optimizer steps done.
        epochs_done: epochs done, if one has just ended; None in the middle of an epoch.
        improved: whether the monitored metric has just improved.

    Returns:
        Some of `"step"`, `"epoch"`, `"best"`, in this order; empty if no checkpoint is due.
    """
    reasons = []
    if policy.every_steps is not None and step > 0 and step % policy.every_steps == 0:
        reasons.append("step")
    if policy.every_epochs is not None and epochs_done and epochs_done % policy.every_epochs == 0:
        reasons.append("epoch")
    if policy.save_best and improved:
        reasons.append("best")
    return reasons


def to_keep(
    policy: CheckpointPolicy, checkpoints: Iterable[Kept], also: Collection[int] = ()
) -> set[int]:
    """The `save_id`s that pruning must leave alone.

    Args:
        policy: the settings.
        checkpoints: all that exist.
        also: further `save_id`s to keep.
    """
    by_age = sorted(checkpoints, key=lambda checkpoint: checkpoint.save_id)
    newest = by_age if policy.keep_last is None else by_age[-policy.keep_last :]
    keep = {checkpoint.save_id for checkpoint in newest} | set(also)
    if policy.save_best:
        keep |= {checkpoint.save_id for checkpoint in [c for c in by_age if c.best][-1:]}
    if policy.keep_every_steps is not None:
        keep |= {c.save_id for c in by_age if c.step % policy.keep_every_steps == 0}
    return keep

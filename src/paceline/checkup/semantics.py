"""Settings that are of the right type and still cannot be meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline.checkup.report import Check
from paceline.recipe.components import HORIZON
from paceline.recipe.mistakes import dotted
from paceline.recipe.parts import each
from paceline.recipe.recipe import Recipe

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

_NAME = "settings"
_WARMUPS = ("num_warmup_steps", "warmup_steps", "warmup")


def wrong_settings(recipe: Recipe) -> list[Check]:
    """What the recipe alone tells: nothing is built."""
    checks: list[Check] = []
    for _, optimizer in each(recipe.parts.get("optimizer")):
        rate = optimizer.kwargs.get("lr")
        if isinstance(rate, int | float) and rate <= 0:
            name = dotted((*optimizer.path, "lr"))
            text = f"{name} is {rate}: nothing is learned unless it is above zero"
            checks.append(Check(_NAME, "FAIL", text))
    return checks


def wrong_lengths(trainer: Trainer, recipe: Recipe, validations: int | None) -> list[Check]:
    """Settings that do not fit the length of the run.

    Args:
        trainer: one that has been started, so that its data are counted.
        recipe: what it was built from.
        validations: in the whole run; None if that is not known.
    """
    told: list[str] = []
    if validations is not None:
        patience = {"early_stop": trainer.early_stop} | {
            f"the patience of {type(c).__name__}": getattr(c, "patience", None)
            for c in trainer.callbacks
        }
        told += [
            f"{name} is {count} and the run has {validations} validations: it can never stop early"
            for name, count in patience.items()
            if isinstance(count, int) and count >= validations
        ]
    interval = trainer.lr_scheduler_interval
    length = trainer.epochs if interval == "epoch" else trainer.training_horizon
    if length is None or interval == "metric":
        return [Check(_NAME, "WARN", text) for text in told]
    unit = "epochs" if interval == "epoch" else "optimizer steps"
    written = {dotted(s.path): s.kwargs for _, s in each(recipe.parts.get("lr_scheduler"))}
    for name, scheduler in (trainer.named_schedulers() or {}).items():
        told += _wrong_schedule(name, scheduler, written.get(name, {}), length, unit)
    return [Check(_NAME, "WARN", text) for text in told]


def _wrong_schedule(name: str, scheduler: Any, written: Any, length: int, unit: str) -> list[str]:
    """What a schedule's own numbers say of a run of `length` steps of it."""
    inner = getattr(scheduler, "_schedulers", None)
    milestones = getattr(scheduler, "_milestones", None)
    if inner and milestones:  # SequentialLR: each has its part
        late = [m for m in milestones if m >= length]
        told = [f"{name}: its milestone {m} lies beyond the run's {length} {unit}" for m in late]
        ends = [*milestones, length]
        for i, (part, begin, end) in enumerate(zip(inner, [0, *milestones], ends, strict=True)):
            told += _wrong_schedule(f"{name}.{i}", part, {}, end - begin, unit)
        return told
    told = []
    for key in HORIZON:
        value = getattr(scheduler, key, written.get(key))
        if isinstance(value, int) and value != length:
            told.append(f"{name}.{key} is {value} and the run has {length} {unit}")
    for key in _WARMUPS:
        value = getattr(scheduler, key, written.get(key))
        if isinstance(value, int) and not isinstance(value, bool) and 0 < length <= value:
            told.append(f"{name}: {value} steps of warm-up take all of the run's {length} {unit}")
            break
    reached = getattr(scheduler, "milestones", None)
    if reached and min(reached) >= length:
        told.append(f"{name}: no milestone lies within the run's {length} {unit}")
    return told

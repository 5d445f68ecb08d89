"""Settings that have the right type but are probably a mistake."""

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
    """Wrong settings that can be found from the recipe alone, without building anything."""
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
        recipe: the recipe that it was built from.
        validations: validations in the whole run; None if unknown.
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


def _wrong_schedule(
    name: str, scheduler: Any, written: Any, length: int, unit: str, part: bool = False
) -> list[str]:
    """What is wrong with a schedule's own numbers, given the `length` steps that it has."""
    inner = getattr(scheduler, "_schedulers", None)
    if inner:  # a SequentialLR splits the length over them; a ChainedScheduler gives it to each
        begins = getattr(scheduler, "_milestones", None)
        told = [
            f"{name}: its milestone {begin} lies beyond the run's {length} {unit}"
            for begin in begins or ()
            if begin >= length
        ]
        if told:
            return told
        ends = [*begins, length] if begins else [length] * len(inner)
        starts = [0, *begins] if begins else [0] * len(inner)
        for i, (one, start, end) in enumerate(zip(inner, starts, ends, strict=True)):
            told += _wrong_schedule(f"{name}.{i}", one, {}, end - start, unit, part=True)
        return told
    told = []
    for key in HORIZON:
        value = getattr(scheduler, key, written.get(key))
        if isinstance(value, int) and value != length:
            of = "its part of the run" if part else "the run"
            told.append(f"{name}.{key} is {value} and {of} has {length} {unit}")
    warmup = _warmup(scheduler, written)
    if warmup is not None and (warmup > length if part else warmup >= length):
        told.append(f"{name}: {warmup} steps of warm-up take all of the run's {length} {unit}")
    reached = getattr(scheduler, "milestones", None)
    if reached and min(reached) >= length:
        told.append(f"{name}: no milestone lies within the run's {length} {unit}")
    return told


def _warmup(scheduler: Any, written: Any) -> int | None:
    """The steps of a schedule's warm-up, if it says so."""
    if getattr(scheduler, "start_factor", 1.0) < getattr(scheduler, "end_factor", 1.0):
        return scheduler.total_iters  # LinearLR
    named = (getattr(scheduler, key, written.get(key)) for key in _WARMUPS)
    return next((n for n in named if isinstance(n, int) and not isinstance(n, bool) and n), None)

"""Trains one trial of a study: a recipe with values of the space, once for each seed."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paceline.errors import MetricError, nearest
from paceline.log.run_record import PRUNED
from paceline.recipe.builder import build_trainer
from paceline.recipe.recipe import Recipe, check
from paceline.recipe.seeds import train_recipe
from paceline.trainer.settings import Resume
from paceline.tune.checks import Checked
from paceline.tune.pruners import verdict
from paceline.tune.reporting import TrialReports, value_over_seeds
from paceline.tune.settings import SECTION

if TYPE_CHECKING:
    import optuna

    from paceline.trainer.result import Result
    from paceline.trainer.trainer import Trainer

State = Literal["COMPLETE", "PRUNED", "FAIL"]


@dataclass(frozen=True)
class Outcome:
    """How a trial has ended.

    Attributes:
        state: as Optuna calls it.
        values: of each metric, if it is complete.
        cause: why it has failed.
        seeds: each seed's values, if there are several.
        of_peer: whether another rank's error is the cause.
    """

    state: State
    values: list[float] | None = None
    cause: str | None = None
    seeds: dict[str, list[float]] | None = None
    of_peer: bool = False


def recipe_of(
    checked: Checked, stored: Mapping[str, Any], run_dir: Path, seed: int | None = None
) -> Recipe:
    """The recipe of a trial, without the section `tune:`.

    Args:
        checked: the study.
        stored: the trial's parameters, as Optuna has them.
        run_dir: its run folder.
        seed: the run's, if the trial has several.

    Raises:
        RecipeError: the values do not fit together.
    """
    changes = checked.space.overrides(stored)
    changes |= {"run.project": checked.recipe.project, "run.name": run_dir.name}
    changes["run.dir"] = str(run_dir)
    if seed is not None:
        changes["seed"] = seed
    return check(checked.composed.changed(changes, SECTION), checked.trust)


def train_trial(
    checked: Checked,
    stored: Mapping[str, Any],
    folder: Path,
    trial: optuna.Trial | None,
    *,
    heeded: bool = True,
    agree: Callable[[Any], Any] = lambda value: value,
) -> Outcome:
    """Trains a trial, or goes on with one that was stopped.

    The seeds are trained one after the other. Only the first reports to the pruner and may be
    pruned; a trial that survives it trains all of them. The pruner "wilcoxon" compares seeds
    instead: after each it is given that seed's value.

    Args:
        checked: the study.
        stored: the parameters, as Optuna has them.
        folder: of the trial.
        trial: Optuna's, on rank 0.
        heeded: whether it may be pruned.
        agree: gives every rank what rank 0 has.

    Raises:
        SystemExit: a signal, a time limit or a stop file has stopped it; it goes on when it is
            trained again.
        Exception: the run has failed.
    """
    settings, values = checked.settings, {}
    by_seed = settings.pruner["type"] == "wilcoxon"
    for place, seed in enumerate(settings.seeds or [None]):
        run_dir = folder if seed is None else folder / f"seed_{seed}"
        recipe = recipe_of(checked, stored, run_dir, seed)
        judged = settings.pruner["type"] != "none" and not by_seed and place == 0
        reports = TrialReports(
            settings.metrics,
            settings.directions,
            settings.reports,
            trial,
            judged=judged,
            heeded=heeded,
        )
        result = _train(recipe, reports)
        if result.stopped_by == PRUNED:
            return Outcome("PRUNED")
        values[str(seed)] = _values(checked, result, reports)
        judge = by_seed and heeded
        worse = judge and trial is not None and _is_worse(trial, place, values[str(seed)])
        if judge and agree(worse):
            return Outcome("PRUNED", seeds=values)
    columns = [list(column) for column in zip(*values.values(), strict=True)]
    totals = [
        value_over_seeds(column, settings.over_seeds, direction)
        for column, direction in zip(columns, settings.directions, strict=True)
    ]
    for metric, total in zip(settings.metrics, totals, strict=True):
        if not math.isfinite(total):
            return Outcome("FAIL", cause=f"it ended with {metric} = {total}")
    return Outcome("COMPLETE", totals, seeds=None if settings.seeds is None else values)


def _train(recipe: Recipe, reports: TrialReports) -> Result:
    def build(recipe: Recipe, resume: Resume) -> Trainer:
        trainer = build_trainer(recipe, resume=resume)
        trainer.show_progress = False
        trainer.callbacks = [*trainer.callbacks, reports]
        return trainer

    try:
        return train_recipe(recipe, Resume("auto"), build)
    finally:
        gc.collect()  # frees the run's tensors before the next run
        gc.freeze()  # what is left lives on: the next collection need not look through it


def _values(checked: Checked, result: Result, reports: TrialReports) -> list[float]:
    """A run's value of each metric.

    Raises:
        MetricError: it was never measured.
    """
    found = result.metrics if checked.settings.value == "last" else reports.best
    for metric in checked.settings.metrics:
        if metric not in found:
            there = ", ".join(sorted(found)) or "nothing"
            raise MetricError(
                f"tune.metric: the last validation has no {metric!r}{nearest(metric, found)} It "
                f"has: {there}."
            )
    return [float(found[metric]) for metric in checked.settings.metrics]


def _is_worse(trial: optuna.Trial, place: int, values: list[float]) -> bool:
    """Whether the pruner ends the trial behind one of its seeds."""
    stored = trial.study._storage.get_trial(trial._trial_id).intermediate_values
    if place not in stored:
        trial.report(values[0], step=place)
    return verdict(trial.study, trial, place)

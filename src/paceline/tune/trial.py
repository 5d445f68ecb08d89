"""One trial: a run, or one for each of its seeds, and what it is worth."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from paceline.errors import ConfigError
from paceline.log.secrets import mask_credentials
from paceline.log.traceback import told_in_full
from paceline.recipe.builder import build_trainer
from paceline.recipe.recipe import Recipe
from paceline.recipe.seeds import train_recipe
from paceline.trainer.settings import Resume
from paceline.trainer.trainer import Trainer
from paceline.tune.reporting import Ask, Direction, TrialReports
from paceline.world.world import World

State = Literal["COMPLETE", "PRUNED", "FAIL"]


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        state: how it ended.
        values: one for each of the study's metrics; of a pruned trial those at the last
            validation; None of one that failed.
        reports: (report, value) each, of the first seed.
        seeds: each seed's values, of a trial with several.
        cause: of one that failed, its error with its traceback, credentials masked.
    """

    state: State
    values: list[float] | None = None
    reports: list[tuple[int, float]] = field(default_factory=list)
    seeds: dict[int, list[float]] = field(default_factory=dict)
    cause: str = ""


@dataclass(frozen=True)
class Judged:
    """By what a trial is judged.

    Args:
        metrics: their names among a validation's; the first is reported.
        directions: of each.
        value: what the run is worth: the metrics of its "last" validation, or the "best" of all.
        over_seeds: of several seeds' values: their "mean", or the "worst".
        reports: at how many equal shares of the run the first metric is reported.
        seeds_are_reports: report i is the i-th seed's value, for a pruner that compares seeds; else
            the first seed reports as it is trained, and it alone may be pruned.
    """

    metrics: Sequence[str]
    directions: Sequence[Direction]
    value: Literal["last", "best"] = "last"
    over_seeds: Literal["mean", "worst"] = "mean"
    reports: int = 20
    seeds_are_reports: bool = False

    def over(self, seeds: Sequence[Sequence[float]]) -> list[float]:
        """What several seeds' values come to, for each metric.

        Args:
            seeds: each seed's values.
        """
        worst = {"min": max, "max": min}
        return [
            statistics.fmean(found) if self.over_seeds == "mean" else worst[direction](found)
            for found, direction in zip(zip(*seeds, strict=True), self.directions, strict=True)
        ]


def train_trial(
    recipe: Recipe,
    judged: Judged,
    *,
    ask: Ask | None = None,
    forgive: bool = False,
    world: World | None = None,
) -> Outcome:
    """Trains a trial to its end, or until it is pruned; it goes on where it was stopped.

    With several seeds, these train one after the other. Only the first one reports and may be
    pruned: what survives it is trained with all seeds.

    Args:
        recipe: of the trial, in its own folder.
        judged: by what it is judged.
        ask: on rank 0, takes new reports and returns whether to prune; None to ask nobody.
        forgive: go on although it was pruned.
        world: the study's processes, if there are several.

    Returns:
        On every rank the same. An error of the run is an outcome too, but on several ranks, where
        it ends the process, since the others may have left.

    Raises:
        SystemExit: with code 75: the run was stopped and saved; the same call resumes it.
        Exception: on several ranks, that of the run.
    """
    world = world or World()
    try:
        return _train(recipe, judged, ask, forgive, world)
    except Exception as error:
        if world.size > 1:
            raise
        return Outcome("FAIL", cause=mask_credentials(told_in_full(error)))
    finally:
        gc.collect()  # frees the run's tensors before the next trial


def _train(recipe: Recipe, judged: Judged, ask: Ask | None, forgive: bool, world: World) -> Outcome:
    runs = {seed: recipe.of_seed(seed) for seed in recipe.seeds} or {recipe.seed: recipe}
    first = next(iter(runs))
    reports: list[tuple[int, float]] = []
    seeds: dict[int, list[float]] = {}
    for seed, run in runs.items():
        asked = ask if seed == first and not judged.seeds_are_reports else None
        heard = TrialReports(
            judged.metrics,
            judged.directions,
            reports=judged.reports,
            ask=asked,
            forgive=forgive,
        )
        train_recipe(run, Resume(), _with(heard))
        values = heard.values(judged.value)
        if values is None:
            raise ConfigError(
                f"tune.metric: the run in {run.run_dir} ended without a validation that measured "
                f"{', '.join(judged.metrics)}."
            )
        seeds[seed] = values
        if judged.seeds_are_reports:
            new = [(len(seeds), values[0])]
            reports += new
            asks = ask is not None and not forgive and len(seeds) < len(runs)
            pruned = asks and world.broadcast_object(world.is_main and ask(new))
        else:
            reports = reports or heard.reports
            pruned = heard.out_of_patience
        if pruned:
            return Outcome("PRUNED", heard.values("last"), reports, _several(seeds))
    return Outcome("COMPLETE", judged.over(list(seeds.values())), reports, _several(seeds))


def _with(reports: TrialReports) -> Any:
    """Builds a run's trainer, with the callback that reports."""

    def build(recipe: Recipe, resume: Resume) -> Trainer:
        trainer = build_trainer(recipe, resume=resume)
        trainer.callbacks = [*trainer.callbacks, reports]
        return trainer

    return build


def _several(seeds: dict[int, list[float]]) -> dict[int, list[float]]:
    return seeds if len(seeds) > 1 else {}

"""Trains a recipe: one run, or one for each of its seeds."""

from __future__ import annotations

import gc
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from paceline.errors import ConfigError
from paceline.exit_codes import STOPPED
from paceline.log.files import replacing
from paceline.log.floats import as_text
from paceline.log.kept_code import RECIPE_FILE
from paceline.log.run_record import read_run
from paceline.log.secrets import mask_credentials
from paceline.log.traceback import told_in_full
from paceline.recipe.builder import build_trainer
from paceline.recipe.recipe import Recipe
from paceline.trainer.result import Result
from paceline.trainer.settings import Resume
from paceline.trainer.stop import TO_BE_RESUMED
from paceline.trainer.trainer import Trainer
from paceline.world.environment import refuse_replica_groups
from paceline.world.world import World

SEEDS_FILE = "seeds.json"
# A resolver of Hydra's or the user's own may give something else each time.
_LOOKED_UP = re.compile(r"\$\{[^}:]*:")


Build = Callable[[Recipe, Resume], Trainer]
"""Makes the Trainer of one run."""


@dataclass(frozen=True)
class Seeds:
    """The results of a recipe's seeds.

    Attributes:
        metric: the metric that is compared: the monitored one, else "val/loss".
        metrics: each finished seed's final validation metrics, in the order of the recipe.
        failed: why a seed failed, for those that did; they count in no mean.
    """

    metric: str
    metrics: dict[int, dict[str, float]]
    failed: dict[int, str] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """The mean of a metric over the finished seeds; None if one did not measure it."""
        values = self._values(name)
        return statistics.fmean(values) if values else None

    def std(self, name: str) -> float | None:
        """The sample standard deviation (divided by n - 1); None for fewer than two seeds."""
        values = self._values(name)
        # stdev fails on a value that is not finite, and the mean already shows it.
        return (
            statistics.stdev(values)
            if len(values) > 1 and all(map(math.isfinite, values))
            else None
        )

    def table(self) -> str:
        """Every seed's metric, then mean and standard deviation, as lines of text."""
        lines = [f"{'seed':<8}{self.metric}"]
        for seed, metrics in self.metrics.items():
            lines.append(f"{seed:<8}{_shown(metrics.get(self.metric))}")
        lines += [f"{seed:<8}failed: {why}" for seed, why in self.failed.items()]
        lines += [
            f"{'mean':<8}{_shown(self.mean(self.metric))}",
            f"{'std':<8}{_shown(self.std(self.metric))}",
        ]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Writes `seeds.json`: the metrics of every seed, their means and standard deviations."""
        names = sorted({name for metrics in self.metrics.values() for name in metrics})
        content = {
            "metric": self.metric,
            "seeds": {str(seed): _plain(metrics) for seed, metrics in self.metrics.items()},
            "failed": {str(seed): why for seed, why in self.failed.items()},
            "mean": _plain({name: self.mean(name) for name in names}),
            "std": _plain({name: self.std(name) for name in names}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / SEEDS_FILE) as file:
            file.write(json.dumps(content, indent=2, allow_nan=False) + "\n")

    def _values(self, name: str) -> list[float]:
        values = [metrics[name] for metrics in self.metrics.values() if name in metrics]
        return values if len(values) == len(self.metrics) else []


def train_recipe(recipe: Recipe, resume: Resume, build: Build | None = None) -> Result:
    """Trains one run to its end.

    Args:
        recipe: one with a single seed.
        resume: how to resume.
        build: makes its Trainer; `build_trainer` unless given.

    Raises:
        SystemExit: with code 75, if the run was stopped and saved, to be resumed.
    """
    trainer = build(recipe, resume) if build else build_trainer(recipe, resume=resume)
    trainer.fit(seed=recipe.seed)  # the user's own train() may take no seed
    if trainer.result.stopped_by in TO_BE_RESUMED:  # as after a signal: start the same again
        raise SystemExit(STOPPED)
    return trainer.result


def train_seeds(recipe: Recipe, resume: Resume, build: Build | None = None) -> Seeds:
    """Trains one run per seed, one after the other, in `seed_<n>` below the recipe's folder.

    A complete run is skipped, and a stopped one is resumed. One that fails, or whose metric is not
    finite in the end, is recorded as failed and keeps no other from training; on several ranks an
    error ends the call. When all are done, the results of this recipe's seeds are printed and
    written to `seeds.json`.

    Args:
        recipe: one with `seeds`.
        resume: how to resume each of the runs.
        build: makes the Trainer of one run; `build_trainer` unless given.

    Raises:
        ConfigError: `resume` names one checkpoint, but each seed has its own; or this process is a
            replica group.
        Exception: the first seed's, if every seed failed; on several ranks, that of any seed.
        SystemExit: with code 75, if a run was stopped; the same call resumes it.
    """
    refuse_replica_groups("several `seeds` do")
    if resume.path is not None or resume.mode == "must":
        raise ConfigError(
            f"--resume {resume.mode}: each seed has its own run. Leave the option out to resume "
            "those that were stopped, or train one of them with `~seeds seed=...`."
        )
    runs = {seed: recipe.of_seed(seed) for seed in recipe.seeds}
    monitor = recipe.setting("metric_monitor")

    def train(seed: int) -> dict[str, float]:
        run = runs[seed]
        found = None if resume.mode == "fresh" else finished(run)
        done = "" if found is None else " is already complete"
        place = list(runs).index(seed) + 1
        _say(f"seed {seed}, {place} of {len(runs)}, in {run.run_dir}{done}")
        return found if found is not None else train_recipe(run, resume, build).metrics

    name = "val/loss" if monitor is None else monitor.metric_name
    seeds = each_seed(list(runs), train, name, recipe.run_dir)
    if World().is_main:
        print(seeds.table(), flush=True)
    return seeds


def each_seed(
    seeds: Sequence[int], train: Callable[[int], dict[str, float]], metric: str, folder: Path
) -> Seeds:
    """Trains one seed after the other, and writes their results to `seeds.json`.

    Args:
        seeds: the seeds.
        train: trains one, and returns its final validation metrics.
        metric: the metric that is compared; a seed whose value is not finite has failed.
        folder: of all seeds.

    Raises:
        ConfigError: the settings are wrong, for every seed alike.
        Exception: the first seed's, if every seed failed; on several ranks, that of any seed.
    """
    outcome, errors = Seeds(metric, {}), []
    for seed in seeds:
        try:
            metrics = train(seed)
        except ConfigError:
            raise
        except Exception as error:
            if World().size > 1:  # a rank that waited for the one that failed has left
                rest = ", ".join(map(str, seeds[seeds.index(seed) + 1 :]))
                if rest:
                    error.add_note(f"On several ranks the seeds after it wait: seeds=[{rest}].")
                raise
            errors.append(error)
            why = mask_credentials(f"{type(error).__name__}: {error}")
            if len(seeds) > 1:
                _say(f"seed {seed} failed:\n{told_in_full(error)}")
        else:
            value = metrics.get(metric, 0.0)
            why = "" if math.isfinite(value) else f"ended with {metric} = {value}"
            if not why:
                outcome.metrics[seed] = metrics
        if why:
            outcome.failed[seed] = why.splitlines()[0]
        gc.collect()  # frees the run's tensors before the next run
    if World().is_main:
        outcome.write(folder)
    if len(errors) == len(seeds):
        raise errors[0]
    return outcome


def finished(recipe: Recipe) -> dict[str, Any] | None:
    """The final metrics of a complete run that was trained by exactly this recipe.

    Builds nothing. Returns None if the recipes differ or use resolvers: then only the trainer can
    tell whether the run is complete.
    """
    try:
        kept = (recipe.run_dir / RECIPE_FILE).read_text(encoding="utf-8")
        record = read_run(recipe.run_dir)
        # The order of keys does not matter.
        changed = yaml.safe_load(kept) != yaml.safe_load(recipe.text)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if changed or _LOOKED_UP.search(kept) or record.get("status") != "complete":
        return None
    return dict(record.get("metrics") or {})


def _say(text: str) -> None:
    if World().is_main:
        print(f"paceline: {text}", file=sys.stderr, flush=True)


def _plain(values: Mapping[str, float | None]) -> dict[str, Any]:
    """Values as JSON has them."""
    return {name: None if v is None else as_text(v) for name, v in values.items()}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"

"""pruner_for: what ends trials early, by comparing their reports."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError
from paceline.tune.arguments import Argument, Mistake, refuse, wrong_arguments

if TYPE_CHECKING:
    import optuna
    from optuna.pruners import BasePruner

_COUNT = Argument(int, 0)
_LEAST = Argument(int, 1)
_WHEN = {"n_warmup_steps": _COUNT, "interval_steps": _LEAST}
_COMPARED = {"n_startup_trials": _COUNT, "n_min_trials": _LEAST, **_WHEN}
_RUNGS = {
    "min_resource": _LEAST,
    "reduction_factor": Argument(int, 2),
    "bootstrap_count": _COUNT,
}
PRUNERS: dict[str, dict[str, Argument]] = {
    "none": {},
    "median": _COMPARED,
    "percentile": {"percentile": Argument(float, 0, 100, required=True), **_COMPARED},
    "halving": {**_RUNGS, "min_early_stopping_rate": _COUNT},
    "hyperband": _RUNGS,
    "patient": {
        "pruner": Argument(dict),
        "patience": Argument(int, 0, required=True),
        "min_delta": Argument(float, 0),
    },
    "wilcoxon": {"p_threshold": Argument(float, 0, 1), "n_startup_steps": _COUNT},
    "threshold": {"lower": Argument(float), "upper": Argument(float), **_WHEN},
    "predicted_final": {
        "top_k": _LEAST,
        "z": Argument(float, 0),
        "min_points": Argument(int, 6),
    },
}
"""The arguments of each pruner. Those of Optuna's have its names; a step is a report."""


def wrong_pruner(settings: Mapping[str, Any], reports: int = 20) -> list[Mistake]:
    """What is wrong with the section `tune.pruner`.

    Args:
        settings: `type:` and arguments.
        reports: how many reports a trial gives.

    Returns:
        A key of the section and a message, for each mistake.
    """
    found = wrong_arguments("pruner", settings, PRUNERS)
    if found:
        return found
    kind = settings["type"]
    for name in ("min_resource", "min_points", "n_warmup_steps"):
        if settings.get(name, 0) > reports:
            found.append(
                (name, f"it counts reports, and a trial gives {reports} (`tune.reports`).")
            )
    if kind == "predicted_final" and reports < settings.get("min_points", 6):
        found.append(("type", f"a prediction needs 6 reports, and `tune.reports` is {reports}."))
    if kind == "threshold":
        lower, upper = settings.get("lower", -math.inf), settings.get("upper", math.inf)
        if math.isinf(lower) and math.isinf(upper):
            found.append(("type", "'threshold' needs `lower:` or `upper:`."))
        elif lower > upper:
            found.append(("lower", f"expected at most `upper:` ({upper}), got {lower}."))
    if kind == "patient" and "pruner" in settings:
        inner = settings["pruner"]
        if inner.get("type") in ("patient", "wilcoxon"):
            found.append(("pruner.type", f"{inner['type']!r} cannot be the pruner that waits."))
        else:
            wrong = wrong_pruner(inner, reports)
            found += [(f"pruner.{key}", text) for key, text in wrong]
    return found


def pruner_for(
    settings: Mapping[str, Any], reports: int = 20, *, value: str = "last"
) -> BasePruner:
    """The pruner of a study. It keeps nothing between two questions.

    Trials are compared at their reports 1 to `reports`, whatever the lengths of their epochs.

    - `none` ends no trial.
    - `median`, `percentile`: the best report so far is worse than the median (the percentile) of
      the complete trials' reports at the same place.
    - `halving`, `hyperband`: of the trials that reached a rung, one in `reduction_factor` goes on.
    - `patient`: as `pruner`, once `patience` reports have brought no improvement.
    - `wilcoxon`: by the signed-rank test, the seeds' values are worse than the best trial's.
    - `threshold`: a report is below `lower`, above `upper`, or not a number.
    - `predicted_final`: see `paceline.tune.PredictedFinal`.

    Args:
        settings: `type:` and arguments, see `PRUNERS`.
        reports: how many a trial gives.
        value: "last" or "best": which of its validations a trial's value is.

    Returns:
        A pruner for `study.pruner`; `verdict` asks it.

    Raises:
        ConfigError: a setting is wrong; all of them are listed.
    """
    refuse("pruner", wrong_pruner(settings, reports))
    import optuna

    arguments = {key: value for key, value in settings.items() if key != "type"}
    kind, pruners = settings["type"], optuna.pruners
    if kind == "predicted_final":
        from paceline.tune.predicted_final import PredictedFinal

        return PredictedFinal(reports, value=value, **arguments)
    if kind in ("halving", "hyperband"):
        from paceline.tune.rungs import Halving, Hyperband

        return Halving(**arguments) if kind == "halving" else Hyperband(reports, **arguments)
    if kind == "patient":
        inner = arguments.pop("pruner", None)
        waiting = None if inner is None else pruner_for(inner, reports, value=value)
        arguments["wrapped_pruner"] = waiting
    classes = {
        "none": pruners.NopPruner,
        "median": pruners.MedianPruner,
        "percentile": pruners.PercentilePruner,
        "patient": pruners.PatientPruner,
        "wilcoxon": pruners.WilcoxonPruner,
        "threshold": pruners.ThresholdPruner,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return classes[kind](**arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"tune.pruner: {error}") from error


def verdict(study: optuna.Study, trial: optuna.Trial, step: int) -> bool:
    """Whether a study's pruner ends a trial at one of its reports.

    A resumed trial comes again to reports that are in the storage already, with later ones. The
    pruner is shown none that is later than the one at hand, so that it says what it said before.

    Args:
        study: of Optuna, with a pruner of `pruner_for`.
        trial: a running trial of it.
        step: the report at which it stands.
    """
    frozen = copy.copy(study._storage.get_trial(trial._trial_id))
    known = sorted(frozen.intermediate_values.items())
    frozen.intermediate_values = {at: value for at, value in known if at <= step}
    return bool(frozen.intermediate_values) and study.pruner.prune(study, frozen)

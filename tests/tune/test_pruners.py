"""Pruners: verdicts that follow from stored reports alone, beside Optuna's own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

optuna = pytest.importorskip("optuna")

from optuna.trial import TrialState, create_trial  # noqa: E402

from paceline.callbacks.loss_prediction import predict_final  # noqa: E402
from paceline.errors import ConfigError  # noqa: E402
from paceline.tune.predicted_final import PredictedFinal  # noqa: E402
from paceline.tune.pruners import pruner_for, verdict, wrong_pruner  # noqa: E402
from paceline.tune.rungs import Hyperband  # noqa: E402

REPORTS = 20


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def curves(count: int, seed: int = 0) -> np.ndarray:
    """Noisy exponential curves, one for each trial (trials x reports)."""
    random = np.random.default_rng(seed)
    ends, rates = random.uniform(0, 1, (count, 1)), random.uniform(0.1, 0.5, (count, 1))
    t = np.arange(1, REPORTS + 1)
    return ends + np.exp(-rates * t) + 0.01 * random.standard_normal((count, REPORTS))


def lengths(pruner: Any, values: np.ndarray, direction: str = "minimize") -> list[int]:
    """How many reports each trial gives before it is ended."""
    study = optuna.create_study(direction=direction, pruner=pruner)
    found = []
    for curve in values:
        trial = study.ask()
        for step, value in enumerate(curve, 1):
            trial.report(float(value), step)
            if verdict(study, trial, step):
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, float(curve[-1]))
        found.append(step)
    return found


OPTUNAS = [
    ({"type": "median"}, lambda: optuna.pruners.MedianPruner()),
    (
        {"type": "median", "n_startup_trials": 2, "n_warmup_steps": 4, "interval_steps": 3},
        lambda: optuna.pruners.MedianPruner(2, 4, 3),
    ),
    (
        {"type": "percentile", "percentile": 25, "n_min_trials": 3},
        lambda: optuna.pruners.PercentilePruner(25, n_min_trials=3),
    ),
    (
        {"type": "halving", "min_resource": 2, "reduction_factor": 3},
        lambda: optuna.pruners.SuccessiveHalvingPruner(2, 3),
    ),
    (
        {"type": "halving", "min_early_stopping_rate": 1, "bootstrap_count": 2},
        lambda: optuna.pruners.SuccessiveHalvingPruner(1, 4, 1, 2),
    ),
    (
        {"type": "patient", "patience": 2, "pruner": {"type": "median"}},
        lambda: optuna.pruners.PatientPruner(optuna.pruners.MedianPruner(), 2),
    ),
    (
        {"type": "threshold", "upper": 0.9, "n_warmup_steps": 5},
        lambda: optuna.pruners.ThresholdPruner(upper=0.9, n_warmup_steps=5),
    ),
    ({"type": "none"}, lambda: optuna.pruners.NopPruner()),
]


@pytest.mark.parametrize(("settings", "optunas"), OPTUNAS)
def test_verdicts_are_those_of_optuna(settings: dict[str, Any], optunas: Any) -> None:
    values = curves(25)
    ours = lengths(pruner_for(settings, REPORTS), values)
    assert ours == lengths(optunas(), values)
    assert lengths(pruner_for(settings, REPORTS), -values, "maximize") == ours or (
        settings["type"] == "threshold"
    )
    assert (min(ours) < REPORTS) == (settings["type"] not in ("none",))


def test_hyperband_is_halving_within_each_bracket() -> None:
    values = curves(60)
    pruner = Hyperband(REPORTS)
    ours = lengths(pruner_for({"type": "hyperband"}, REPORTS), values)
    brackets = [pruner.bracket_of(number) for number in range(60)]
    assert sorted(set(brackets)) == [0, 1, 2]
    assert brackets.count(0) > brackets.count(2)
    for bracket in range(3):
        own = [number for number in range(60) if brackets[number] == bracket]
        halving = pruner_for(
            {"type": "halving", "reduction_factor": 3, "min_early_stopping_rate": bracket}, REPORTS
        )
        assert [ours[number] for number in own] == lengths(halving, values[own])


EVERY = [settings for settings, _ in OPTUNAS[:-1]] + [
    {"type": "hyperband"},
    {"type": "predicted_final", "top_k": 2, "z": 0.0},
]


@pytest.mark.parametrize("settings", EVERY, ids=lambda settings: settings["type"])
def test_a_trial_that_is_resumed_gets_the_same_verdicts(settings: dict[str, Any]) -> None:
    values = curves(12, seed=5)
    whole = lengths(pruner_for(settings, REPORTS), values)
    study = optuna.create_study()
    for curve, length in zip(values, whole, strict=True):
        trial = study.ask()
        for step in range(1, length + 1):  # killed here, once the report is in the storage
            trial.report(float(curve[step - 1]), step)
        study.pruner = pruner_for(settings, REPORTS)
        asked = [verdict(study, trial, step) for step in range(1, length + 1)]
        assert asked == [False] * (length - 1) + [length < REPORTS or asked[-1]]
        if asked[-1]:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, float(curve[-1]))
    assert min(whole) < REPORTS


def complete(study: Any, *ends: float, state: TrialState = TrialState.COMPLETE) -> None:
    for end in ends:
        study.add_trial(
            create_trial(
                state=state,
                value=end if state == TrialState.COMPLETE else None,
                intermediate_values=dict.fromkeys(range(1, REPORTS + 1), end),
            )
        )


def asked(study: Any, values: Sequence[float], **settings: Any) -> bool:
    """Whether predicted_final ends a trial with these reports."""
    study.pruner = pruner_for({"type": "predicted_final", **settings}, REPORTS)
    trial = study.ask()
    for step, value in enumerate(values, 1):
        trial.report(value, step)
    ended = verdict(study, trial, len(values))
    study.tell(trial, state=TrialState.FAIL)
    return ended


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_prediction_is_compared_with_the_k_best_complete_trials(direction: str) -> None:
    sign = 1.0 if direction == "minimize" else -1.0
    losses = (curves(1)[0][:8] + 1).tolist()
    end, error = predict_final(range(1, 9), losses, REPORTS)
    values = [sign * loss for loss in losses]
    study = optuna.create_study(direction=direction)
    complete(study, sign * (end - 3), sign * (end - 2))
    assert not asked(study, values, top_k=3)  # too few to compare with
    complete(study, sign * 0.0, sign * -1.0, state=TrialState.PRUNED)
    complete(study, sign * 0.0, state=TrialState.FAIL)
    assert not asked(study, values, top_k=3)  # none of these is a reference
    assert asked(study, values, top_k=2, z=1.0)
    complete(study, sign * (end - 1.5 * error))
    assert asked(study, values, top_k=3, z=1.4)
    assert not asked(study, values, top_k=3, z=1.6)
    assert not asked(study, values[:5], top_k=2, z=0.0)  # too few reports
    assert not asked(study, values[:7], top_k=2, z=0.0, min_points=8)
    assert asked(study, [*values[:3], math.nan * sign, *values[4:]], top_k=1, z=0.0)


def test_the_best_report_counts_where_a_trials_value_is_its_best() -> None:
    study = optuna.create_study()
    complete(study, 0.5)
    values = [1.0, 0.4, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]
    trial = study.ask()
    for step, value in enumerate(values, 1):
        trial.report(value, step)
    settings = {"type": "predicted_final", "top_k": 1, "z": 0.0}
    study.pruner = pruner_for(settings, REPORTS)
    assert verdict(study, trial, 8)
    study.pruner = pruner_for(settings, REPORTS, value="best")
    assert not verdict(study, trial, 8)


def test_seeds_are_compared_by_the_signed_rank_test() -> None:
    study = optuna.create_study(pruner=pruner_for({"type": "wilcoxon", "p_threshold": 0.1}))
    for values, ended in ([1.0, 1.1, 0.9, 1.0], False), ([2.0, 2.1, 1.9, 2.2], True):
        trial = study.ask()
        for seed, value in enumerate(values, 1):
            trial.report(value, seed)
        assert verdict(study, trial, 4) == ended
        study.tell(trial, float(np.mean(values)))


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"type": "medain"}, "type", "there is no pruner 'medain'; did you mean 'median'"),
        ({"type": "halving", "min_ressource": 1}, "min_ressource", "did you mean 'min_resource'"),
        ({"type": "halving", "min_resource": 21}, "min_resource", "it counts reports"),
        ({"type": "hyperband", "reduction_factor": 1}, "reduction_factor", "at least 2, got 1"),
        ({"type": "percentile"}, "percentile", "'percentile' needs it"),
        ({"type": "percentile", "percentile": 101}, "percentile", "from 0 to 100"),
        ({"type": "patient"}, "patience", "'patient' needs it"),
        (
            {"type": "patient", "patience": 1, "pruner": {"type": "median", "x": 1}},
            "pruner.x",
            "no such argument",
        ),
        (
            {"type": "patient", "patience": 1, "pruner": {"type": "patient"}},
            "pruner.type",
            "cannot be the pruner that waits",
        ),
        ({"type": "threshold"}, "type", "needs `lower:` or `upper:`"),
        ({"type": "threshold", "lower": 2, "upper": 1}, "lower", "at most `upper:`"),
        ({"type": "predicted_final", "min_points": 5}, "min_points", "at least 6, got 5"),
        ({"type": "predicted_final", "z": -1}, "z", "at least 0, got -1"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], key: str, message: str) -> None:
    [(where, text)] = wrong_pruner(settings, REPORTS)
    assert where == key
    assert message in text
    with pytest.raises(ConfigError, match=rf"tune\.pruner\.{key}: "):
        pruner_for(settings, REPORTS)


def test_a_prediction_needs_enough_reports() -> None:
    [(_, text)] = wrong_pruner({"type": "predicted_final"}, reports=5)
    assert "`tune.reports` is 5" in text
    with pytest.raises(ConfigError, match="expected at least 1, 0 and 6"):
        PredictedFinal(20, min_points=2)

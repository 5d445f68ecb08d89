"""PredictedFinal: ends trials whose predicted end is worse than the best that others reached.

It imports Optuna: import this module inside a function.
"""

from __future__ import annotations

import math

import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from paceline.callbacks.loss_prediction import predict_final
from paceline.errors import ConfigError


class PredictedFinal(BasePruner):
    """Ends a trial if `predict_final` puts its end below the `top_k`-th best of complete trials.

    A curve is fitted to the trial's reports and extrapolated to the last one. The trial ends if the
    predicted value, moved towards the better by `z` standard errors, is still worse than the
    `top_k`-th best end of the complete trials; neither pruned nor failed trials count among these.
    Before `top_k` trials are complete, and before a trial has `min_points` reports, none ends. A
    curve says nothing about what makes it bend later (a learning rate that is lowered at the end):
    a late bloomer is ended like any other.

    The defaults were chosen on stored curves of real trainings (`benchmarks/pruning.py`).
    Everything follows from the trials in the storage; the object keeps nothing.

    Args:
        reports: how many reports a complete trial gives.
        top_k: of how many a trial has to promise to be one.
        z: how many standard errors a prediction is given in its favour.
        min_points: the reports needed for a prediction, at least 6.
        value: "last" or "best": of "best", a trial's value is the best of its reports and of the
            predicted end.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        reports: int,
        top_k: int = 5,
        z: float = 2.75,
        min_points: int = 6,
        *,
        value: str = "last",
    ) -> None:
        if top_k < 1 or z < 0 or min_points < 6:
            raise ConfigError(
                f"PredictedFinal(top_k={top_k}, z={z}, min_points={min_points}): expected at least "
                "1, 0 and 6"
            )
        self._reports = reports
        self._top_k = top_k
        self._z = z
        self._min_points = min_points
        self._best = value == "best"

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial ends at its last report."""
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ends = sorted(
            end
            for other in complete
            if other.number != trial.number
            and (end := self._end(other, sign)) is not None
            and math.isfinite(end)
        )
        points = [
            (step, sign * value)
            for step, value in sorted(trial.intermediate_values.items())
            if math.isfinite(value)
        ]
        if len(ends) < self._top_k or len(points) < self._min_points:
            return False
        steps, losses = zip(*points, strict=True)
        if steps[-1] >= self._reports:
            return False  # it is at its end: to go on costs nothing
        predicted, error = predict_final(steps, losses, self._reports)
        hoped = predicted - self._z * error
        if self._best:
            hoped = min(hoped, *losses)
        return hoped > ends[self._top_k - 1]

    def _end(self, trial: FrozenTrial, sign: float) -> float | None:
        """What a complete trial has come to, smaller being better; None if it is unknown."""
        values = [sign * value for _, value in sorted(trial.intermediate_values.items())]
        if not values:  # it gave no reports
            return None if trial.value is None else sign * trial.value
        return min(values) if self._best else values[-1]

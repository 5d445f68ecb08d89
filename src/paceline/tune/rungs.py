"""Successive halving and Hyperband whose verdicts follow from stored reports alone.

It imports Optuna: import this module inside a function.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable

import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial


class Halving(BasePruner):
    """Asynchronous successive halving.

    Rung r is the report `min_resource * reduction_factor ** (min_early_stopping_rate + r)`. A trial
    that reaches it goes on if it is among the best of those that have reached it so far, one in
    `reduction_factor`, itself included. Optuna's own notes in the storage which rungs a trial has
    passed: asked again after a kill, it would answer otherwise.

    Args:
        min_resource: the report of the first rung.
        reduction_factor: one in so many goes on.
        min_early_stopping_rate: how many rungs are left out at the beginning.
        bootstrap_count: as many trials have to reach a rung before one goes on from it.
        competes: which trials are compared; all by default.
    """

    def __init__(
        self,
        min_resource: int = 1,
        reduction_factor: int = 4,
        min_early_stopping_rate: int = 0,
        bootstrap_count: int = 0,
        *,
        competes: Callable[[FrozenTrial], bool] = lambda trial: True,
    ) -> None:
        self._first = min_resource * reduction_factor**min_early_stopping_rate
        self._factor = reduction_factor
        self._bootstrap = bootstrap_count
        self._competes = competes

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial ends at its last report."""
        step = trial.last_step
        if step is None or not self._is_rung(step):
            return False
        value = trial.intermediate_values[step]
        if math.isnan(value):
            return True
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
        others = [
            sign * other.intermediate_values[step]
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number
            and step in other.intermediate_values
            and self._competes(other)
        ]
        ranked = sorted([sign * value, *(one for one in others if not math.isnan(one))])
        if len(ranked) <= self._bootstrap:
            return True
        # The best goes on, also where there are fewer than `reduction_factor`.
        return sign * value > ranked[max(len(ranked) // self._factor, 1) - 1]

    def _is_rung(self, step: int) -> bool:
        rung = self._first
        while rung < step:
            rung *= self._factor
        return rung == step


class Hyperband(BasePruner):
    """Successive halving in several brackets, which begin to end trials at different rungs.

    A trial's bracket follows from its number; trials are compared within a bracket.

    Args:
        reports: how many a trial gives.
        min_resource: the report of the first rung of the first bracket.
        reduction_factor: one in so many goes on.
        bootstrap_count: as many trials have to reach a rung before one goes on from it.
    """

    def __init__(
        self,
        reports: int,
        min_resource: int = 1,
        reduction_factor: int = 3,
        bootstrap_count: int = 0,
    ) -> None:
        count = 1
        while min_resource * reduction_factor**count <= reports:
            count += 1
        # Brackets that end trials late get fewer of them: each costs about the same.
        self._shares = [
            math.ceil(count * reduction_factor ** (count - 1 - bracket) / (count - bracket))
            for bracket in range(count)
        ]
        self._brackets = [
            Halving(
                min_resource,
                reduction_factor,
                bracket,
                bootstrap_count,
                competes=lambda trial, own=bracket: self.bracket_of(trial.number) == own,
            )
            for bracket in range(count)
        ]

    def bracket_of(self, number: int) -> int:
        """The bracket of a trial.

        Args:
            number: of the trial.
        """
        ends = list(itertools.accumulate(self._shares))
        place = zlib.crc32(str(number).encode()) % ends[-1]
        return next(bracket for bracket, end in enumerate(ends) if place < end)

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial ends at its last report."""
        return self._brackets[self.bracket_of(trial.number)].prune(study, trial)

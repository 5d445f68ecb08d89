"""TrialReports: tells a study how a trial's run is doing, and ends it if the pruner says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError
from paceline.log.run_record import PRUNED
from paceline.trainer.callback import Callback
from paceline.tune.pruners import verdict

if TYPE_CHECKING:
    import optuna

    from paceline.trainer.trainer import Trainer


class TrialReports(Callback):
    """Reports a metric at equal shares of the run's steps, and asks the pruner after each.

    Report i of n is the last validation at or before the share i / n of the horizon, so that trials
    are compared at equal shares, whatever their batch size. The verdict is stored in the
    checkpoint, so a resumed run follows it.

    Args:
        metrics: what the study optimises; the first of them is reported.
        directions: "min" or "max" for each.
        reports: how many shares.
        trial: Optuna's, on rank 0; None where nothing is reported.
        judged: whether the pruner is asked, on every rank.
        heeded: whether the run ends when the pruner says so, now or before. A trial that goes on
            after it was pruned heeds none.

    Attributes:
        best: the best value of each metric so far.
    """

    ends_with = PRUNED

    def __init__(
        self,
        metrics: list[str],
        directions: list[Any],
        reports: int,
        trial: optuna.Trial | None = None,
        *,
        judged: bool = True,
        heeded: bool = True,
    ) -> None:
        self.metrics = metrics
        self.directions = directions
        self.reports = reports
        self.judged = judged
        self.heeded = heeded
        self._trial = trial
        self._forget()

    def _forget(self) -> None:
        self.best: dict[str, float] = {}
        self._given: list[list[float]] = []  # number and value of each report
        self._last: float | None = None  # the value of the last validation
        self._verdict = False
        self._next = 1  # the number of the next report

    @property
    def out_of_patience(self) -> bool:
        """Whether the pruner has ended the trial."""
        return self._verdict and self.heeded

    def on_setup(self, trainer: Trainer) -> None:
        """Begins anew; a checkpoint's state is loaded afterwards."""
        self._forget()
        if self.judged and trainer.training_horizon is None:
            raise ConfigError(
                "tune.pruner: trials are compared at equal shares of their steps, and only the end "
                "of the data will tell how many there are: set `trainer.max_steps`."
            )

    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Gives the reports that are due, and asks the pruner."""
        for metric, direction in zip(self.metrics, self.directions, strict=True):
            value = metrics.get(metric)
            if value is None or math.isnan(value):
                continue
            better = min if direction == "min" else max
            self.best[metric] = better(self.best.get(metric, value), value)
        if not self.judged or self.metrics[0] not in metrics:
            return
        new = self._due(trainer.global_step, trainer.training_horizon or 1, metrics)
        self._last = metrics[self.metrics[0]]
        if not new:
            return
        self._given += new
        box: tuple[bool, str | None] = (False, None)
        if trainer.world.is_main:
            try:
                box = self._ask([(int(step), value) for step, value in new]), None
            except Exception as error:  # the other ranks wait for the verdict
                if trainer.world.size == 1:
                    raise
                box = False, f"{type(error).__name__}: {error}"
        pruned, failure = trainer.world.broadcast_object(box)
        if failure is not None:
            raise RuntimeError(f"the study's storage: {failure}")
        self._verdict = self._verdict or pruned

    def _due(self, step: int, horizon: int, metrics: Mapping[str, float]) -> list[list[float]]:
        """The reports up to this step that were not given: of this validation or the last."""
        new: list[list[float]] = []
        for number in range(self._next, self.reports + 1):
            ahead = number * horizon - step * self.reports  # in whole numbers: no rounding
            if ahead > 0:
                break
            self._next = number + 1  # also behind a share before the first validation
            value = metrics[self.metrics[0]] if ahead == 0 else self._last
            if value is not None:
                new.append([number, value])
        return new

    def _ask(self, new: list[tuple[int, float]]) -> bool:
        """Reports on rank 0; whether the pruner ends the trial."""
        assert self._trial is not None
        trial, storage = self._trial, self._trial.study._storage
        there = storage.get_trial(trial._trial_id).intermediate_values
        for number, value in new:
            if number not in there:
                trial.report(value, step=number)
        return self.heeded and any(verdict(trial.study, trial, number) for number, _ in new)

    def state_dict(self) -> dict[str, Any]:
        """The reports, the best values and the verdict."""
        return {
            "best": dict(self.best),
            "given": [list(pair) for pair in self._given],
            "last": self._last,
            "verdict": self._verdict,
            "next": self._next,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.best = dict(state["best"])
        self._given = [list(pair) for pair in state["given"]]
        self._last = state["last"]
        # One that heeds no verdict ends with the state of a trial that was never pruned.
        self._verdict = state["verdict"] and self.heeded
        self._next = int(state["next"])


def value_over_seeds(values: list[float], how: str, direction: str) -> float:
    """A trial's value, from those of its seeds.

    Args:
        values: of each seed.
        how: "mean" or "worst".
        direction: "min" or "max".
    """
    if how == "mean":
        return math.fsum(values) / len(values)
    worst: Callable[[list[float]], float] = max if direction == "min" else min
    return worst(values)

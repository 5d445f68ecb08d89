"""TrialReports: what a trial's run tells its study, and what it hears from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from paceline.errors import ConfigError, MetricError, PacelineError
from paceline.log.run_record import PRUNED
from paceline.trainer.callback import Callback
from paceline.trainer.checks import never_measured

if TYPE_CHECKING:
    from paceline.trainer.trainer import Trainer

Direction = Literal["min", "max"]
Ask = Callable[[list[tuple[int, float]]], bool]
"""Takes a trial's new reports, (report, value) each, and returns whether to prune it."""


class TrialReports(Callback):
    """Reports a trial's metric to its study at equal shares of the run, and asks whether to prune.

    Trials may differ in everything, the batch size and so the number of steps too, and are compared
    at equal shares of their runs. Report i of n is the value of the last validation at or before
    i / n of the run's steps; shares before the first validation have none. It is given at the
    first validation that shows it: the one at this share, or else the next.

    The verdict is rank 0's, and all ranks take it. It is kept in the callback's state, so that a
    pruned trial stays so when it is started again.

    Args:
        metrics: the names of the study's metrics among a validation's; the first is reported.
        directions: of each.
        reports: n.
        ask: called on rank 0 with new reports; None to report nothing.
        forgive: go on although the trial was pruned, and never prune it again.

    Raises:
        ConfigError: at the start of the run: no validation will measure a metric, or there is
            something to report and the run's length is unknown.
        MetricError: a validation lacks a metric, or it is not finite.
    """

    priority = 900  # behind what may still add to a validation's metrics
    ends_with = PRUNED

    def __init__(
        self,
        metrics: Sequence[str],
        directions: Sequence[Direction],
        *,
        reports: int = 20,
        ask: Ask | None = None,
        forgive: bool = False,
    ) -> None:
        self.metrics, self.directions = tuple(metrics), tuple(directions)
        self.count, self.ask, self.forgive = reports, ask, forgive
        self._forget()

    def _forget(self) -> None:
        self.reports: list[tuple[int, float]] = []
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.pruned = False
        self._before: float | None = None  # the first metric at the last validation
        self._due = 1  # the next report

    @property
    def out_of_patience(self) -> bool:
        """Whether the study has pruned the trial."""
        return self.pruned and not self.forgive

    def values(self, which: Literal["last", "best"]) -> list[float] | None:
        """The metrics of the last validation, or the best of all; None before the first.

        Args:
            which: of the two. Of several metrics each has its own best.
        """
        found = self.last if which == "last" else self.best
        return [found[name] for name in self.metrics] if found else None

    def on_setup(self, trainer: Trainer) -> None:
        """Resets everything, and checks that the metrics will be there."""
        self._forget()
        if not trainer.has_validation:
            raise ConfigError(
                f"tune.metric: {', '.join(self.metrics)} cannot be had, since the run has no "
                "validation: give it a val_dataloader."
            )
        for name in self.metrics:
            if wrong := never_measured(trainer, name):
                raise ConfigError(f"tune.metric: {wrong[0]}")
        if self.ask is not None and trainer.training_horizon is None:
            raise ConfigError(
                "tune.pruner: trials are compared at equal shares of their runs, and this run's "
                "length is unknown: give trainer.max_steps or trainer.epoch_length."
            )

    def on_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Takes a validation's metrics, reports what is due and hears the verdict."""
        for name, direction in zip(self.metrics, self.directions, strict=True):
            value = _finite(name, metrics, trainer.global_step)
            before = self.best.get(name)
            better = min if direction == "min" else max
            self.best[name] = value if before is None else better(before, value)
            self.last[name] = value
        new = self._new_reports(trainer)
        self._before = self.last[self.metrics[0]]
        self.reports += new
        if new and self.ask is not None and not self.forgive:
            self.pruned = self._hear(trainer, self.ask, new)
            if self.pruned:
                trainer.say(f"pruned: other trials are better at report {new[-1][0]}.")

    def _new_reports(self, trainer: Trainer) -> list[tuple[int, float]]:
        horizon, step = trainer.training_horizon, trainer.global_step
        new: list[tuple[int, float]] = []
        # Whole numbers: a share is at a step or it is not.
        while horizon and self._due <= self.count and self._due * horizon <= step * self.count:
            here = self._due * horizon == step * self.count
            value = self.last[self.metrics[0]] if here else self._before
            if value is not None:
                new.append((self._due, value))
            self._due += 1
        return new

    def _hear(self, trainer: Trainer, ask: Ask, new: list[tuple[int, float]]) -> bool:
        """Rank 0's verdict, on all ranks; an error of rank 0 is one of all."""
        verdict: bool | str = False
        failure: Exception | None = None
        if trainer.world.is_main:
            try:
                verdict = ask(new)
            except Exception as error:  # noqa: BLE001  the others wait for a word
                failure, verdict = error, f"{type(error).__name__}: {error}"
        verdict = trainer.world.broadcast_object(verdict)
        if failure is not None:
            raise failure
        if isinstance(verdict, str):
            raise PacelineError(f"rank 0 could not report to the study: {verdict}")
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """The reports, the metrics and the verdict."""
        return {
            "reports": [list(report) for report in self.reports],
            "last": dict(self.last),
            "best": dict(self.best),
            "pruned": self.pruned,
            "before": self._before,
            "due": self._due,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.reports = [(int(i), float(value)) for i, value in state["reports"]]
        self.last, self.best = dict(state["last"]), dict(state["best"])
        self.pruned, self._before, self._due = state["pruned"], state["before"], state["due"]


def _finite(name: str, metrics: Mapping[str, float], step: int) -> float:
    if name not in metrics:
        raise MetricError(
            f"tune.metric: the validation at step {step} did not measure {name!r}; it gave: "
            f"{', '.join(metrics) or 'nothing'}."
        )
    value = float(metrics[name])
    if not math.isfinite(value):
        raise MetricError(f"tune.metric: {name} is {value} at step {step}, which is no result.")
    return value

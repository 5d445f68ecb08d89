"""Samplers whose suggestions follow from a seed, a trial's number and stored trials alone.

They import Optuna: import this module inside a function.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, BruteForceSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

GRID_LIMIT = 100_000  # points
Space = dict[str, BaseDistribution]


def derived_seed(seed: int, *of: int | str) -> int:
    """A seed of 32 bits for one use of many.

    Args:
        seed: of the study.
        of: a trial's number, a parameter's name.
    """
    digest = hashlib.sha256(repr((seed, *of)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


class Stateless(BaseSampler):
    """Asks a new sampler of Optuna for each trial, and for each parameter drawn by itself.

    Optuna's samplers draw from one stream, so that a value depends on those that the same process
    has drawn before. Here a parameter's own stream depends on its name, since a trial that is
    continued finds the parameters stored that it has already.

    Args:
        make: a sampler for a seed.
        seed: of the study.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make = make
        self._seed = seed
        # Told when trials begin and end, for which Optuna's samplers draw nothing.
        self._told = make(derived_seed(seed))
        self._asked: tuple[int, BaseSampler] | None = None
        self._common: tuple[Any, dict[str, IntersectionSearchSpace]] = None, {}

    def _of(self, trial: FrozenTrial, *name: str) -> BaseSampler:
        return self._make(derived_seed(self._seed, trial.number, *name))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        """The parameters that are suggested together."""
        sampler = self._of(trial)
        self._share_search_space(study, sampler)
        self._asked = trial.number, sampler  # some remember what `sample_relative` needs
        return sampler.infer_relative_search_space(study, trial)

    def _share_search_space(self, study: optuna.Study, sampler: BaseSampler) -> None:
        """Hands on what all trials have in common, found so far.

        It follows from the stored trials, but to look at all of them anew for each trial would have
        the cost of a trial grow with their number.
        """
        if type(study) is not optuna.Study:  # a pruner has filtered its trials
            return
        of = study._storage, study._study_id
        if self._common[0] != of:
            self._common = of, {}
        for name in ("_search_space", "_intersection_search_space"):
            own = getattr(sampler, name, None)
            if isinstance(own, IntersectionSearchSpace):
                setattr(sampler, name, self._common[1].setdefault(name, own))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Space
    ) -> dict[str, Any]:
        """Suggests them."""
        if self._asked is None or self._asked[0] != trial.number:
            self.infer_relative_search_space(study, trial)
        assert self._asked is not None
        (_, sampler), self._asked = self._asked, None
        return sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Suggests one of the others."""
        sampler = self._of(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Called by `ask`."""
        self._told.before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Called by `tell`."""
        if not isinstance(self._told, BruteForceSampler):  # which would stop Optuna's own loop
            self._told.after_trial(study, trial, state, values)

    def is_exhausted(self, study: optuna.Study) -> bool:
        """Whether every point is done or being tried. Only brute force ends.

        Args:
            study: of Optuna.
        """
        if not isinstance(self._told, BruteForceSampler):
            return False
        done = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and t.params]
        if not done:
            return False
        asked: Any = _Stoppable(study)
        self._told.after_trial(asked, done[-1], done[-1].state, done[-1].values)
        return asked.stopped


class _Stoppable:
    """A study that notes that it was to stop."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)


class _InSequence(BaseSampler):
    """Suggests all parameters together, from a sequence; what it does not know it draws."""

    def __init__(self, seed: int) -> None:
        self._others = Stateless(lambda own: RandomSampler(seed=own), seed)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draws a parameter that the sequence does not have."""
        return self._others.sample_independent(study, trial, param_name, param_distribution)


class Grid(_InSequence):
    """Every combination of values once, in an order that the seed shuffles.

    A combination counts as tried once a trial has it, whatever became of the trial. Parameters
    that a trial does not have (their condition was not met) do not tell combinations apart.

    Args:
        space: the distribution of each parameter, each with an end of values.
        seed: of the study.
    """

    def __init__(self, space: Space, seed: int) -> None:
        super().__init__(seed)
        self._space = space
        self._points = list(itertools.product(*(_values(one) for one in space.values())))
        random.Random(derived_seed(seed)).shuffle(self._points)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        """The whole space."""
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Space
    ) -> dict[str, Any]:
        """The next combination; once all were tried, one of them by the trial's number."""
        left = self._left(study, trial.number)
        point = left[0] if left else self._points[trial.number % len(self._points)]
        return dict(zip(self._space, point, strict=True))

    def is_exhausted(self, study: optuna.Study) -> bool:
        """Whether every combination is done or being tried.

        Args:
            study: of Optuna.
        """
        return not self._left(study, None)

    def _left(self, study: optuna.Study, but: int | None) -> list[tuple[Any, ...]]:
        places = {name: place for place, name in enumerate(self._space)}
        tried: dict[tuple[int, ...], set[tuple[Any, ...]]] = {}
        for trial in study.get_trials(deepcopy=False):
            own = [(places[name], value) for name, value in trial.params.items() if name in places]
            if own and trial.number != but and trial.state != TrialState.WAITING:
                own.sort(key=lambda pair: pair[0])
                where, values = zip(*own, strict=True)
                tried.setdefault(where, set()).add(_marked(values))
        return [
            point
            for point in self._points
            if not any(_marked([point[i] for i in at]) in had for at, had in tried.items())
        ]


def _marked(values: Sequence[Any]) -> tuple[Any, ...]:
    """Values that tell 1, 1.0 and True apart, and NaN equal to itself."""
    return tuple((type(value).__name__, repr(value)) for value in values)


def _values(distribution: BaseDistribution) -> Sequence[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is None:  # a single value
        return [distribution.low]
    return [_stepped(distribution, i) for i in range(_steps(distribution) + 1)]


def grid_size(space: Mapping[str, BaseDistribution]) -> int:
    """The number of points of a grid.

    Args:
        space: the distribution of each parameter, each with an end of values.
    """
    return math.prod(len(_values(one)) for one in space.values())


def _steps(distribution: FloatDistribution) -> int:
    assert distribution.step is not None
    return round((distribution.high - distribution.low) / distribution.step)


def _stepped(distribution: FloatDistribution, i: int) -> float:
    assert distribution.step is not None
    return min(distribution.low + i * distribution.step, distribution.high)


class QuasiRandom(_InSequence):
    """A low-discrepancy sequence: trial n takes its point n, whatever other trials took.

    Optuna's own counts in the storage how many points were taken, and so skips the point of a trial
    that is asked for twice; it also draws choices at random. Here choices are a dimension too.

    Args:
        space: the distribution of each parameter; None to take those of the first trial that has
            any.
        seed: of the scrambling.
        qmc_type: "sobol" or "halton".
        scramble: whether the points are scrambled; without it the first is the lowest corner.
    """

    def __init__(
        self, space: Space | None, seed: int, *, qmc_type: str = "sobol", scramble: bool = True
    ) -> None:
        super().__init__(seed)
        self._space = space
        self._seed = seed
        self._type = qmc_type
        self._scramble = scramble

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        """The whole space, or that of the first trial."""
        if self._space is not None:
            return self._space
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        for other in study.get_trials(deepcopy=False, states=states):
            if other.distributions and other.number < trial.number:
                return dict(other.distributions)
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Space
    ) -> dict[str, Any]:
        """The point of the trial's number."""
        if not search_space:
            return {}
        from scipy.stats import qmc

        kind = qmc.Sobol if self._type == "sobol" else qmc.Halton
        engine = kind(len(search_space), scramble=self._scramble, rng=derived_seed(self._seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a number that is no power of two
            if trial.number:
                engine.fast_forward(trial.number)
            point = engine.random(1)[0]
        return {
            name: _at(one, float(share))
            for (name, one), share in zip(search_space.items(), point, strict=True)
        }


def _at(distribution: BaseDistribution, share: float) -> Any:
    """The value at a share (from 0 to 1) of a distribution's range."""
    if isinstance(distribution, CategoricalDistribution):
        count = len(distribution.choices)
        return distribution.choices[min(int(share * count), count - 1)]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = float(distribution.low), float(distribution.high)
    whole = isinstance(distribution, IntDistribution)
    if distribution.log:
        # Half a step more on both sides, so that each whole number has its share.
        edge = 0.5 if whole else 0.0
        value = math.exp(
            math.log(low - edge) + share * (math.log(high + edge) - math.log(low - edge))
        )
        value = round(value) if whole else value
    elif whole:
        steps = (distribution.high - distribution.low) // distribution.step
        value = distribution.low + distribution.step * min(int(share * (steps + 1)), steps)
    elif distribution.step is not None:
        steps = _steps(distribution)
        value = _stepped(distribution, min(int(share * (steps + 1)), steps))
    else:
        value = low + share * (high - low)
    return min(max(value, distribution.low), distribution.high)

"""sampler_for: what suggests a trial's values, from a seed and stored trials alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError
from paceline.tune.arguments import Argument, Mistake, refuse, wrong_arguments

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

_STARTUP = Argument(int, 0)
_SHARE = Argument(float, 0, 1)
_FLAG = Argument(bool)
SAMPLERS: dict[str, dict[str, Argument]] = {
    "tpe": {
        "n_startup_trials": _STARTUP,
        "n_ei_candidates": Argument(int, 1),
        "multivariate": _FLAG,
        "group": _FLAG,
        "constant_liar": _FLAG,
    },
    "gp": {"n_startup_trials": _STARTUP, "deterministic_objective": _FLAG},
    "cmaes": {
        "n_startup_trials": _STARTUP,
        "popsize": Argument(int, 2),
        "use_separable_cma": _FLAG,
        "with_margin": _FLAG,
        "lr_adapt": _FLAG,
        "consider_pruned_trials": _FLAG,
    },
    "nsga2": {
        "population_size": Argument(int, 2),
        "mutation_prob": _SHARE,
        "crossover_prob": _SHARE,
        "swapping_prob": _SHARE,
    },
    "qmc": {"qmc_type": Argument(str, choices=("sobol", "halton")), "scramble": _FLAG},
    "grid": {},
    "random": {},
    "brute": {},
}
"""The arguments of each sampler. They are Optuna's, by name and meaning."""
_SEVERAL_OBJECTIVES = ("tpe", "gp", "nsga2", "qmc", "grid", "random", "brute")
_FINITE = ("grid", "brute")


def wrong_sampler(
    settings: Mapping[str, Any],
    space: Mapping[str, BaseDistribution] | None = None,
    *,
    objectives: int = 1,
) -> list[Mistake]:
    """What is wrong with the section `tune.sampler`.

    Args:
        settings: `type:` and arguments.
        space: the distribution of each parameter; None for a function that suggests its own.
        objectives: how many metrics are optimised.

    Returns:
        A key of the section and a message, for each mistake.
    """
    found = wrong_arguments("sampler", settings, SAMPLERS)
    kind = settings.get("type")
    if found:
        return found
    if settings.get("group") and not settings.get("multivariate"):
        found.append(("group", "it splits the space of `multivariate: true`: set that too."))
    if settings.get("with_margin") and settings.get("use_separable_cma"):
        found.append(("with_margin", "it cannot be combined with `use_separable_cma`."))
    if objectives > 1 and kind not in _SEVERAL_OBJECTIVES:
        names = ", ".join(_SEVERAL_OBJECTIVES)
        found.append(
            ("type", f"{kind!r} optimises one metric, and there are {objectives}: use {names}.")
        )
    if kind == "grid" and space is None:
        found.append(("type", "a grid needs a `space:`; for a function use 'brute'."))
    if kind in _FINITE:
        endless = [name for name, one in (space or {}).items() if _is_endless(one)]
        if endless:
            found.append(
                (
                    "type",
                    f"{kind!r} tries every value, and {', '.join(endless)} has no end of them: "
                    "give a `step:`, or a list of choices.",
                )
            )
        elif kind == "grid" and space:
            from paceline.tune.stateless import GRID_LIMIT, grid_size

            if (size := grid_size(space)) > GRID_LIMIT:
                found.append(
                    (
                        "type",
                        f"the grid has {size:,} points, and at most {GRID_LIMIT:,} can be listed: "
                        "use 'brute', 'random' or 'tpe'.",
                    )
                )
    return found


def sampler_for(
    settings: Mapping[str, Any], seed: int, *, space: Mapping[str, BaseDistribution] | None = None
) -> BaseSampler:
    """The sampler of a study. It keeps nothing between two trials.

    What it suggests for a parameter of a trial follows from the seed, the trial's number, the
    parameter's name and the trials in the storage. So a study that is stopped and continued
    suggests what it would have suggested, also for a trial that was killed between two of its
    parameters, and any process may ask for any trial. Grid and QMC go through one sequence, which
    the seed shuffles; the trial's number, or what was tried, says where it stands.

    Args:
        settings: `type:` and arguments, see `SAMPLERS`.
        seed: of the study.
        space: the distribution of each parameter, in the order in which they are suggested; None
            for a function that suggests its own.

    Returns:
        A sampler for `study.sampler`; `is_exhausted` asks it whether every value was tried.

    Raises:
        ConfigError: a setting is wrong; all of them are listed.
    """
    refuse("sampler", wrong_sampler(settings, space))
    from paceline.tune.stateless import Grid, QuasiRandom, Stateless

    arguments = {key: value for key, value in settings.items() if key != "type"}
    kind = settings["type"]
    if kind == "grid":
        return Grid(dict(space or {}), seed)
    if kind == "qmc":
        return QuasiRandom(None if space is None else dict(space), seed, **arguments)
    return Stateless(_maker(kind, arguments), seed)


def is_exhausted(study: optuna.Study) -> bool:
    """Whether a study's sampler has nothing left to suggest: every point is done or being tried.

    Args:
        study: of Optuna, with a sampler of `sampler_for`.
    """
    exhausted = getattr(study.sampler, "is_exhausted", None)
    return exhausted is not None and exhausted(study)


def _maker(kind: str, arguments: dict[str, Any]) -> Callable[[int], BaseSampler]:
    import optuna

    samplers = optuna.samplers
    quiet = {"warn_independent_sampling": False}  # it would be said anew for each trial
    classes: dict[str, tuple[Callable[..., BaseSampler], dict[str, Any]]] = {
        "tpe": (samplers.TPESampler, {}),
        "gp": (samplers.GPSampler, quiet),
        "cmaes": (samplers.CmaEsSampler, quiet),
        "nsga2": (samplers.NSGAIISampler, {}),
        "random": (samplers.RandomSampler, {}),
        "brute": (samplers.BruteForceSampler, {}),
    }
    make, fixed = classes[kind]

    def made(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return make(seed=seed, **fixed, **arguments)

    try:
        first = made(0)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"tune.sampler: {error}") from error
    if kind == "tpe" and not arguments.get("group"):
        return _seeded_again(first)
    return made


def _seeded_again(sampler: Any) -> Callable[[int], BaseSampler]:
    """One TPE sampler, as if it were made anew each time.

    To make two random states takes longer than all else that a trial costs beside its storage.
    """
    from optuna.search_space import IntersectionSearchSpace

    def made(seed: int) -> BaseSampler:
        sampler._rng.rng.seed(seed)
        sampler._random_sampler._rng.rng.seed(seed)
        sampler._search_space = IntersectionSearchSpace(include_pruned=True)
        return sampler

    return made


def _is_endless(distribution: BaseDistribution) -> bool:
    from optuna.distributions import FloatDistribution

    return (
        isinstance(distribution, FloatDistribution)
        and distribution.step is None
        and not distribution.single()
    )

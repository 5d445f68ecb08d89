"""sampler_for: suggestions that a restart does not change, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

optuna = pytest.importorskip("optuna")

from optuna.distributions import (  # noqa: E402
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState  # noqa: E402

from paceline.errors import ConfigError  # noqa: E402
from paceline.tune.samplers import is_exhausted, sampler_for, wrong_sampler  # noqa: E402

SPACE = {
    "lr": FloatDistribution(1e-4, 0.1, log=True),
    "width": IntDistribution(16, 128, step=16),
    "depth": IntDistribution(1, 8, log=True),
    "act": CategoricalDistribution(["relu", "gelu", True, None]),
    "drop": FloatDistribution(0, 0.5, step=0.1),
}
FINITE = {name: one for name, one in SPACE.items() if name != "lr"}
Tried = list[tuple[tuple[str, Any], ...]]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def suggested(trial: Any, space: Mapping[str, Any]) -> dict[str, Any]:
    return {name: trial._suggest(name, one) for name, one in space.items()}


def value(params: Mapping[str, Any]) -> float:
    base = params["width"] / 128 + abs(params["depth"] - 3) + params["drop"]
    return (
        base + abs(params.get("lr", 0) - 0.01) + ["relu", "gelu", True, None].index(params["act"])
    )


def searched(
    settings: Mapping[str, Any],
    parts: tuple[int, ...],
    space: Mapping[str, Any] = SPACE,
    seed: int = 3,
    known: bool = True,
) -> Tried:
    """The parameters of the trials of a study that is begun again with new objects."""
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage, study_name="s")
    for count in parts:
        study = optuna.load_study(storage=storage, study_name="s")
        study.sampler = sampler_for(settings, seed, space=space if known else None)
        for _ in range(count):
            trial = study.ask()
            study.tell(trial, value(suggested(trial, space)))
    return [tuple(trial.params.items()) for trial in study.get_trials()]


EACH = [
    ({"type": "tpe", "n_startup_trials": 5}, SPACE, (20, 5, 13)),
    ({"type": "tpe", "multivariate": True, "n_startup_trials": 5}, SPACE, (20, 5, 13)),
    (
        {"type": "tpe", "multivariate": True, "group": True, "n_startup_trials": 5},
        SPACE,
        (20, 5, 13),
    ),
    ({"type": "cmaes", "popsize": 4}, SPACE, (20, 5, 13)),
    ({"type": "nsga2", "population_size": 4}, SPACE, (20, 5, 13)),
    ({"type": "qmc"}, SPACE, (20, 5, 13)),
    ({"type": "qmc", "qmc_type": "halton"}, SPACE, (20, 5, 13)),
    ({"type": "random"}, SPACE, (20, 5, 13)),
    ({"type": "grid"}, FINITE, (20, 5, 13)),
    ({"type": "brute"}, FINITE, (20, 5, 13)),
    ({"type": "gp", "n_startup_trials": 4}, SPACE, (7, 3, 5)),
]


@pytest.mark.parametrize(
    ("settings", "space", "counts"), EACH, ids=["-".join(map(str, s.values())) for s, *_ in EACH]
)
def test_a_study_in_parts_suggests_what_one_in_one_go_does(
    settings: dict[str, Any], space: dict[str, Any], counts: tuple[int, int, int]
) -> None:
    count, first, second = counts
    whole = searched(settings, (count,), space)
    assert searched(settings, (first, second - first, count - second), space) == whole
    assert searched(settings, (count // 2, count - count // 2), space) == whole
    assert len(set(map(str, whole))) > count / 2  # and does not repeat itself
    assert searched(settings, (3,), space, seed=4) != whole[:3]


@pytest.mark.parametrize("kind", ["tpe", "cmaes", "qmc", "random"])
def test_a_trial_killed_between_two_of_its_parameters_gets_the_same_ones(kind: str) -> None:
    def tried(killed_at: int) -> Tried:
        study = optuna.create_study()
        study.sampler = sampler_for({"type": kind}, 1, space=SPACE)
        for number in range(14):
            trial = study.ask()
            if number == killed_at:
                suggested(trial, dict(itertools.islice(SPACE.items(), 2)))
                study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
                study.sampler = sampler_for({"type": kind}, 1, space=SPACE)
                trial = study.ask()
                assert trial.number == number
            study.tell(trial, value(suggested(trial, SPACE)))
        return [tuple(trial.params.items()) for trial in study.get_trials()]

    whole = tried(-1)
    assert tried(3) == tried(12) == whole


def test_a_grid_tries_every_point_once_and_then_ends() -> None:
    space = {"a": IntDistribution(1, 3), "b": CategoricalDistribution([1, "1", "x"])}
    study = optuna.create_study()
    study.sampler = sampler_for({"type": "grid"}, 0, space=space)
    study.enqueue_trial({"a": 2, "b": "x"})
    seen = []
    while not is_exhausted(study):
        trial = study.ask()
        seen.append(tuple(suggested(trial, space).items()))
        failed = len(seen) == 4
        study.tell(trial, None if failed else 1, state=TrialState.FAIL if failed else None)
    assert seen[0] == (("a", 2), ("b", "x"))
    assert len(seen) == len(set(map(str, seen))) == 9


def test_a_grid_with_a_condition_tries_what_differs() -> None:
    space = {"opt": CategoricalDistribution(["sgd", "adam"]), "momentum": IntDistribution(0, 3)}
    study = optuna.create_study()
    study.sampler = sampler_for({"type": "grid"}, 0, space=space)
    while not is_exhausted(study):
        trial = study.ask()
        if suggested(trial, {"opt": space["opt"]})["opt"] == "sgd":
            suggested(trial, {"momentum": space["momentum"]})
        study.tell(trial, 1)
    tried = [trial.params for trial in study.get_trials()]
    assert len(tried) == 5
    assert tried.count({"opt": "adam"}) == 1


def test_brute_force_ends_after_a_restart_too() -> None:
    space = {"a": IntDistribution(1, 2), "b": CategoricalDistribution(["x", "y"])}
    study = optuna.create_study()
    study.sampler = sampler_for({"type": "brute"}, 0, space=space)
    assert not is_exhausted(study)
    for left in (3, 2, 1, 0):
        trial = study.ask()
        suggested(trial, space)
        study.tell(trial, 1)
        study.sampler = sampler_for({"type": "brute"}, 0, space=space)
        assert is_exhausted(study) == (left == 0)
    assert len({str(trial.params) for trial in study.get_trials()}) == 4


def test_qmc_fills_the_space_evenly() -> None:
    tried = [dict(one) for one in searched({"type": "qmc"}, (16,))]
    assert len({one["width"] for one in tried}) == 8
    counts = [sum(one["act"] is choice for one in tried) for choice in SPACE["act"].choices]
    assert counts == [4, 4, 4, 4]
    assert sum(one["lr"] < 10**-2.5 for one in tried) == 8
    unscrambled = dict(searched({"type": "qmc", "scramble": False}, (1,))[0])
    assert unscrambled["lr"] == pytest.approx(1e-4)


def test_qmc_of_a_function_takes_the_space_of_the_first_trial() -> None:
    tried = searched({"type": "qmc"}, (17,), known=False)
    assert tried[1:] == searched({"type": "qmc"}, (17,))[1:]
    assert searched({"type": "qmc"}, (4, 13), known=False) == tried


@pytest.mark.parametrize(
    ("settings", "space", "objectives", "message"),
    [
        ({"type": "tp"}, SPACE, 1, "there is no sampler 'tp'; did you mean 'tpe'"),
        ({"type": "tpe", "multivariat": True}, SPACE, 1, "did you mean 'multivariate'"),
        ({"type": "random", "seed": 1}, SPACE, 1, "takes no arguments"),
        ({"type": "tpe", "n_startup_trials": -1}, SPACE, 1, "at least 0, got -1"),
        ({"type": "tpe", "n_startup_trials": True}, SPACE, 1, "a whole number, got True"),
        ({"type": "tpe", "multivariate": 1}, SPACE, 1, "true or false, got 1"),
        ({"type": "tpe", "group": True}, SPACE, 1, "multivariate: true"),
        ({"type": "qmc", "qmc_type": "sobl"}, SPACE, 1, "did you mean 'sobol'"),
        ({"type": "nsga2", "mutation_prob": 2}, SPACE, 1, "from 0 to 1, got 2"),
        ({"type": "cmaes"}, SPACE, 2, "optimises one metric"),
        ({"type": "grid"}, SPACE, 1, "tries every value, and lr has no end"),
        ({"type": "brute"}, SPACE, 1, "tries every value, and lr has no end"),
        ({"type": "grid"}, None, 1, "needs a `space:`"),
        ({"type": "grid"}, {"a": IntDistribution(1, 10**6)}, 1, "1,000,000 points"),
        (
            {"type": "cmaes", "with_margin": True, "use_separable_cma": True},
            SPACE,
            1,
            "cannot be combined",
        ),
    ],
)
def test_what_is_refused(
    settings: dict[str, Any], space: dict[str, Any] | None, objectives: int, message: str
) -> None:
    [(key, text)] = wrong_sampler(settings, space, objectives=objectives)
    assert message in text
    assert key in settings
    if objectives == 1:
        with pytest.raises(ConfigError, match=rf"tune\.sampler\.{key}: "):
            sampler_for(settings, 0, space=space)


def test_each_argument_reaches_its_sampler() -> None:
    from paceline.tune.samplers import SAMPLERS

    for kind, arguments in SAMPLERS.items():
        if kind in ("grid", "qmc"):
            continue
        for name, argument in arguments.items():
            given = argument.kind(max(argument.low, 0.5) + 1) if argument.high > 1 else 0.3
            settings: dict[str, Any] = {
                "type": kind,
                name: True if argument.kind is bool else given,
            }
            if name == "group":
                settings["multivariate"] = True
            sampler_for(settings, 0, space=FINITE)

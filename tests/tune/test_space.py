"""The space of a study: what is written, what Optuna stores, and what the recipe gets."""

from __future__ import annotations

from typing import Any

import optuna
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import distribution_to_json, json_to_distribution

from paceline.recipe.mistakes import Mistakes
from paceline.tune.checks import covering
from paceline.tune.space import Space, choice_names, read_space

SGD, ADAM = {"_target_": "torch.optim.SGD", "lr": 0.1}, {"_target_": "torch.optim.Adam"}
NODE = {
    "optimizer": [SGD, ADAM],
    "optimizer.momentum": {"float": [0, 0.9], "when": {"optimizer._target_": "torch.optim.SGD"}},
    "model": {"width": {"int": [16, 128], "step": 16}},
    "hidden": [[64], [64, 64]],
    "lr": {"float": [1e-4, 0.1], "log": True},
}


def read(node: Any) -> Space:
    mistakes = Mistakes(lambda _: "here")
    space = read_space(node, ("space",), mistakes)
    mistakes.raise_any("a test")
    return space


def test_keys_may_be_dotted_or_nested_and_keep_their_order() -> None:
    keys = [parameter.key for parameter in read(NODE).parameters]
    assert keys == ["optimizer", "optimizer.momentum", "model.width", "hidden", "lr"]


def test_choices_have_short_names_that_differ() -> None:
    assert choice_names([SGD, ADAM, None, 3]) == ["SGD", "Adam", None, 3]
    names = choice_names([SGD, {**SGD, "lr": 0.2}, "SGD", [1], {"width": 3}])
    assert len(set(names)) == 5
    assert names[2:] == ["SGD", "[1]", '{"width":3}']
    long = [{"_target_": "A", "x": "y" * 80, "z": i} for i in range(3)]
    assert len(set(choice_names(long))) == 3


def test_a_parameter_is_searched_where_its_condition_holds() -> None:
    space = read(NODE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    seen = set()
    for _ in range(10):
        trial = study.ask()
        stored = space.suggest(trial)
        assert stored == trial.params
        assert ("optimizer.momentum" in stored) == (stored["optimizer"] == "SGD")
        seen.add(stored["optimizer"])
    assert seen == {"SGD", "Adam"}


def test_samples_of_the_space_have_each_choice_and_both_ends() -> None:
    space = read(NODE)
    sets = list(covering(space))
    assert {stored["optimizer"] for stored in sets} == {"SGD", "Adam"}
    assert {stored.get("optimizer.momentum") for stored in sets} == {0.0, 0.9, None}
    assert {stored["model.width"] for stored in sets} == {16, 128}
    assert len(sets) <= 4
    assert list(covering(Space())) == [{}]


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-99, 99), st.floats(-9, 9), st.text(max_size=5)
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.text("abc", min_size=1, max_size=2), scalars, max_size=3),
)
choices = st.lists(values, min_size=1, max_size=5).filter(
    lambda found: all(left != right for i, left in enumerate(found) for right in found[:i])
)
floats = st.tuples(st.floats(1e-6, 1), st.floats(1, 1e3), st.booleans()).map(
    lambda drawn: {"float": [drawn[0], drawn[1]], "log": drawn[2]}
)
ints = st.tuples(st.integers(-5, 5), st.integers(0, 9), st.integers(1, 4)).map(
    lambda drawn: {"int": [drawn[0], drawn[0] + drawn[1] * drawn[2]], "step": drawn[2]}
)
spaces = st.dictionaries(
    st.text("xyz", min_size=1, max_size=3), st.one_of(choices, floats, ints), max_size=4
)


@given(spaces, st.integers(0, 9))
def test_parameters_become_overrides_and_parameters_again(node: Any, seed: int) -> None:
    space = read(node)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    stored = space.suggest(study.ask())
    overrides = space.overrides(stored)
    assert list(overrides) == [parameter.key for parameter in space.parameters]
    assert space.stored(overrides) == stored
    for parameter in space.parameters:
        distribution = parameter.distribution
        assert json_to_distribution(distribution_to_json(distribution)) == distribution

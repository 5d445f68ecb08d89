"""What a resolver gives that differs by time or chance is the same on all ranks and restarts."""

from __future__ import annotations

import itertools
import os

import pytest
from omegaconf import OmegaConf

from paceline.errors import RecipeError
from paceline.recipe import load_recipe
from paceline.recipe.resolvers import HANDED, handed_over
from paceline.testing import Ranks

DIR = "run.dir=runs/${now:%H-%M-%S-%f}"
count = itertools.count()


def test_a_call_is_resolved_once_in_a_recipe_and_anew_in_the_next(recipe) -> None:
    path = recipe(run={"dir": "a/${drawn:}", "name": "n${drawn:}"})
    OmegaConf.register_new_resolver("drawn", lambda: next(count))
    try:
        first, second = load_recipe(path), load_recipe(path)
    finally:
        OmegaConf.clear_resolver("drawn")
    assert first.run_dir.name == first.name.removeprefix("n")
    assert first.run_dir != second.run_dir
    assert (f"${{drawn:}} is {first.run_dir.name} on all ranks and after a restart") in [
        decision for decision, _ in first.plan
    ]


def test_several_seeds_share_what_was_resolved(recipe) -> None:
    whole = load_recipe(recipe(), ["+seeds=[1,2]", DIR])
    assert [whole.of_seed(seed).run_dir.parent for seed in (1, 2)] == [whole.run_dir] * 2


def test_a_launcher_hands_it_to_what_it_starts(recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe()
    launcher = load_recipe(path, [DIR])
    with handed_over():
        worker = load_recipe(path, [DIR])
        restarted = load_recipe(path, [DIR])
    assert worker.run_dir == restarted.run_dir == launcher.run_dir
    assert HANDED not in os.environ
    assert load_recipe(path, [DIR]).run_dir != launcher.run_dir


def folder(path: str) -> str:
    return str(load_recipe(path, [DIR]).run_dir)


def test_ranks_of_another_launcher_agree_in_their_store(recipe, ranks: Ranks) -> None:
    one, other = ranks(folder, 2, str(recipe()))
    assert one == other


@pytest.mark.parametrize("override", [DIR, "run.name=${now:%f}", "run.name=x${seed}-${now:%f}"])
def test_what_has_to_find_the_folder_again_refuses_it(recipe, override: str) -> None:
    loaded = load_recipe(recipe(seed=1), [override])
    with pytest.raises(RecipeError, match=r"run\.\w+: '.*' gives another folder at each start"):
        loaded.check_folder_stays("--resume must")
    load_recipe(recipe(seed=1), ["run.name=x${seed}"]).check_folder_stays("--slurm")

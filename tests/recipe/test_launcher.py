"""`Launcher`: the train command as a class whose parts may be overridden."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from paceline.errors import RecipeError
from paceline.recipe import Launcher
from paceline.recipe.seeds import Seeds
from paceline.trainer.result import Result

Write = Callable[..., Path]


def test_it_trains_what_the_command_would(recipe: Write):
    result = Launcher(recipe(), ["trainer.epochs=1"]).run()
    assert isinstance(result, Result)
    assert result.complete
    assert Path("runs/toy/baseline/recipe.yaml").exists()


def test_mistakes_are_told_before_anything_is_built(recipe: Write):
    with pytest.raises(RecipeError, match="did you mean 'epochs'"):
        Launcher(recipe(), ["trainer.epoch=1"]).run()


def test_a_recipe_is_dumped_and_not_trained(recipe: Write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOY_LR", "0.5")
    path = recipe()
    path.write_text(path.read_text().replace("lr: 0.01", "lr: ${oc.decode:${oc.env:TOY_LR}}"))
    assert Launcher(path, ["trainer.epochs=7"], dump_config="out.yaml").run() is None
    text = Path("out.yaml").read_text()
    assert "epochs: 7" in text
    assert "oc.env:TOY_LR" in text
    assert not Path("runs").exists()


def test_every_part_may_be_overridden(recipe: Write):
    """Given a launcher with a resolver and a builder of its own, when two seeds train, then both
    are used in each."""
    built: list[Any] = []

    class Mine(Launcher):
        def resolvers(self):
            return {"toy_double": lambda x: 2 * x}

        def build(self, recipe, resume):
            built.append(super().build(recipe, resume))
            return built[-1]

    path = recipe(model={"_target_": "toy.Net", "width": "${toy_double:${seed}}"})
    try:
        result = Mine(path, ["seeds=[2,3]"]).run()
    finally:
        OmegaConf.clear_resolver("toy_double")
    assert isinstance(result, Seeds)
    assert [trainer.model.layers[0].out_features for trainer in built] == [4, 6]

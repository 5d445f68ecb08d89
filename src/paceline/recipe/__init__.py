"""Recipes: a YAML file that describes a run, its checks, and the builder of its components.

`load_recipe(path, overrides)` reads and checks one; `build_trainer(recipe)` builds its Trainer;
`Launcher(path, overrides).run()` does both and trains; `load_model(run_dir)` returns the trained
model of a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.lazy import lazily

if TYPE_CHECKING:
    from paceline.recipe.builder import build_trainer
    from paceline.recipe.launcher import Launcher
    from paceline.recipe.recipe import Recipe, load_recipe
    from paceline.recipe.trained import load_model
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "Launcher": "paceline.recipe.launcher",
            "Recipe": "paceline.recipe.recipe",
            "build_trainer": "paceline.recipe.builder",
            "load_model": "paceline.recipe.trained",
            "load_recipe": "paceline.recipe.recipe",
        },
    )

__all__ = ["Launcher", "Recipe", "build_trainer", "load_model", "load_recipe"]

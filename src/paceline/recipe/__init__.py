"""Recipes: a YAML file that describes a run, its checks, and the builder of its components.

`load_recipe(path, overrides)` reads and checks one; `build_trainer(recipe)` builds its Trainer.
"""

from paceline.recipe.builder import build_trainer
from paceline.recipe.recipe import Recipe, load_recipe

__all__ = ["Recipe", "build_trainer", "load_recipe"]

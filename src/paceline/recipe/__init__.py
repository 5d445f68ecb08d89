"""Recipes: a YAML file that describes a run, its checks, and the builder of its components.

`load_recipe(path, overrides)` reads and checks one; `build_trainer(recipe)` builds its Trainer;
`Launcher(path, overrides).run()` does both and trains; `load_model(run_dir)` returns the trained
model of a run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.recipe.builder import build_trainer
    from paceline.recipe.launcher import Launcher
    from paceline.recipe.recipe import Recipe, load_recipe
    from paceline.recipe.trained import load_model

_WHERE = {
    "Launcher": "paceline.recipe.launcher",
    "Recipe": "paceline.recipe.recipe",
    "build_trainer": "paceline.recipe.builder",
    "load_model": "paceline.recipe.trained",
    "load_recipe": "paceline.recipe.recipe",
}
__all__ = ["Launcher", "Recipe", "build_trainer", "load_model", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: composing alone needs no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'paceline.recipe' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)

"""Arguments and options that several commands share, so that each is described once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from paceline.recipe.recipe import Recipe

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.", show_default=False),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.", show_default=False)]
Checkpoint = Annotated[
    str, typer.Option(metavar="latest|best|step_00000120", help="The run's checkpoint.")
]
Nproc = Annotated[int | None, typer.Option(min=1, help="Processes to start on this machine.")]


def check_tune(recipe: Recipe) -> None:
    """Checks the section `tune:`, which a command that trains the recipe alone leaves out.

    Args:
        recipe: as loaded.

    Raises:
        RecipeError: the section has mistakes.
    """
    if recipe.composed.config.get("tune") is not None:
        from paceline.tune.checks import check_section

        check_section(recipe)


class Weights(StrEnum):
    """Which weights of a checkpoint."""

    auto = "auto"
    live = "live"
    averaged = "averaged"


WhichWeights = Annotated[
    Weights,
    typer.Option(
        help="Those that the run validated with, the trained ones, or the average that a callback "
        "kept."
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Let the recipe name things from this package too, or read pickled weights of the "
        "model with this name_or_path.",
    ),
]

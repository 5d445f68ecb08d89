"""Arguments and options that several commands share, so that each is described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.", show_default=False),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(metavar="PACKAGE", help="Let the recipe name things from PACKAGE too."),
]

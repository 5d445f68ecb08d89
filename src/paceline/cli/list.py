"""`paceline list`: the names that recipes may use, and where each comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def list_names(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help="One kind, such as callback.  [default: all]"),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="RECIPE", help="Also what this recipe's `code:` adds."),
    ] = None,
) -> None:
    """Lists the registered names of trainers, callbacks, factories and other components.

    In a recipe, `type: NAME` chooses one.
    """
    from paceline import registry

    if recipe is not None:
        from paceline.recipe.recipe import load_code_of

        load_code_of(recipe)
    kinds = list(registry.KINDS) if kind is None else [kind]
    for each in kinds:
        names = registry.names(each)
        if not names and kind is None:
            continue
        typer.echo(f"{each}:" if names else f"no {each} has a registered name")
        width = max(map(len, names), default=0)
        for name in names:
            typer.echo(f"  {name:<{width}}  {registry.origin(each, name)}")

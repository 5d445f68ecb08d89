"""`paceline new`: a starter project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The project's name.", show_default=False)
    ],
    folder: Annotated[Path, typer.Option(help="Where to create its folder.")] = Path(),
) -> None:
    """Writes a project that trains: a recipe, its trainer, a test."""
    from paceline.starter import new_project

    files = new_project(name, folder)
    for file in files:
        typer.echo(file)
    typer.echo(f"next: cd {files[0].parent} && paceline train recipe.yaml")

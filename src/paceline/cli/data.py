"""`paceline data`: prepares the data of a language model, and shows it."""

from __future__ import annotations

import json as _json
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import Overrides, RecipeFile, Trust
from paceline.cli.reports import own_output_apart


def data(
    recipe: RecipeFile,
    overrides: Overrides = None,
    show: Annotated[
        int, typer.Option(min=0, metavar="N", help="Print N samples: trained tokens in colour.")
    ] = 0,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML file.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
    trust: Trust = None,
) -> None:
    """Tokenizes a recipe's data ahead of training, keeps it, and reports what it holds.

    Counts, lengths, what was dropped or cut and why, duplicates, and how much of each evaluation
    source is in the training data. No model is built.
    """
    from rich.console import Console

    from paceline.lm.data.overview import overview
    from paceline.recipe.recipe import load_recipe

    with own_output_apart():
        found = overview(load_recipe(recipe, overrides or (), trust=tuple(trust or ())), show)
    if html is not None:
        found.page(f"Data of {recipe.name}").write(html)
    if json:
        print(_json.dumps(found.report.to_json(), indent=2, allow_nan=False))
        return
    console = Console(highlight=False)
    console.print(found.report)
    found.show(console)
    if html is not None:
        console.print(f"{html}: written", markup=False)

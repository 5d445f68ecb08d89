"""`paceline preflight`: the first steps of a recipe's run, before anything is spent on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.reports import own_output_apart, show_report
from paceline.errors import ConfigError, Preempted


def preflight(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    trust: Annotated[
        list[str] | None,
        typer.Option(metavar="PACKAGE", help="Let the recipe name things from PACKAGE too."),
    ] = None,
) -> None:
    """Checks a recipe, then builds everything and takes a few real steps of its run.

    Exit codes: 0 no check fails, 1 one does, 2 wrong usage or mistakes in the recipe. The run's own
    folder is left alone; what the recipe's code prints goes to stderr.
    """
    from paceline.checkup.preflight import preflight
    from paceline.checkup.report import Check, PreflightReport
    from paceline.recipe.recipe import load_recipe

    try:
        with own_output_apart():
            report = preflight(load_recipe(recipe, overrides or (), trust=tuple(trust or ())))
    except ConfigError as error:
        if json:
            show_report(PreflightReport([Check("recipe", "FAIL", str(error))]), json=True)
        raise
    except Preempted as stop:
        print(f"paceline: preflight was ended by {stop.result.stopped_by}", file=sys.stderr)
        raise typer.Exit(1) from None
    if report.stack:
        print(report.stack, file=sys.stderr)
    show_report(report, json=json)
    if not report.passed:
        raise typer.Exit(1)

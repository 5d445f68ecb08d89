"""`paceline preflight`: takes the first steps of a recipe's run, as a test."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.options import Overrides, RecipeFile, Trust, check_tune
from paceline.cli.reports import own_output_apart, show_report
from paceline.errors import ConfigError, Preempted
from paceline.exit_codes import FAILED

if TYPE_CHECKING:
    from paceline.checkup.memory_fit import FitReport
    from paceline.recipe.recipe import Recipe


def preflight(
    recipe: RecipeFile,
    overrides: Overrides = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICES",
            help="Simulate the steps instead: do they fit on e.g. 64xH100-80GB?",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    trust: Trust = None,
) -> None:
    """Checks a recipe, then builds everything and takes a few real steps of its run.

    With --on nothing is trained and no device is needed: the steps' memory per rank is computed for
    the recipe's layout on those devices.

    Exit codes: 0 no check fails, 1 one does, or it does not fit; 2 wrong usage or mistakes in the
    recipe. The run folder is not touched; what the recipe's code prints goes to stderr.
    """
    from paceline.checkup.preflight import preflight
    from paceline.checkup.report import Check, Report
    from paceline.recipe.recipe import load_recipe

    try:
        with own_output_apart():
            checked = load_recipe(recipe, overrides or (), trust=tuple(trust or ()))
            check_tune(checked)
            report = preflight(checked) if on is None else _on_paper(checked, on)
    except ConfigError as error:
        if json:
            show_report(Report([Check("recipe", "FAIL", str(error))]), json=True)
        raise
    except Preempted as stop:
        print(f"paceline: preflight was stopped by {stop.result.stopped_by}", file=sys.stderr)
        raise typer.Exit(FAILED) from None
    if report.stack:
        print(report.stack, file=sys.stderr)
    show_report(report, json=json)
    if not report.passed:
        raise typer.Exit(FAILED)


def _on_paper(recipe: Recipe, on: str) -> FitReport:
    from paceline.checkup.memory_fit import fits

    return fits(recipe, on)

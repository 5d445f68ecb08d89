"""`paceline preview`: shows a recipe, its components and its run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli.options import Overrides, RecipeFile, Trust, check_tune
from paceline.cli.reports import own_output_apart

if TYPE_CHECKING:
    from paceline.checkup.preview import Preview
    from paceline.checkup.schedule import Schedule


def preview(
    recipe: RecipeFile,
    overrides: Overrides = None,
    depth: Annotated[
        int, typer.Option(min=0, help="How many levels of the model's modules to show.")
    ] = 3,
    trust: Trust = None,
) -> None:
    """Shows the resolved recipe, its model, its data and its learning rates; trains nothing."""
    from paceline.checkup.preview import preview
    from paceline.recipe.recipe import load_recipe

    with own_output_apart():
        checked = load_recipe(recipe, overrides or (), trust=tuple(trust or ()))
        check_tune(checked)
        shown = preview(checked)
    _heading("Recipe")
    _table((setting.key, setting.value, setting.place) for setting in shown.settings)
    _model(shown, depth)
    for title, rows in (
        ("Components", [*shown.components.items()]),
        ("Training data", [*shown.training.items()]),
        ("Validation data", [*shown.validation.items()]),
        ("Decided for you, and the setting that changes it", shown.plan),
    ):
        if rows:
            _heading(title)
            _table(rows)
    for schedule in shown.schedules:
        _schedule(schedule)


def _model(shown: Preview, depth: int) -> None:
    _heading("Model")
    _table(
        [("module", "type", "output", "parameters", "trainable")]
        + [
            (
                "  " * layer.depth + layer.name.rpartition(".")[2],
                layer.kind,
                layer.output,
                f"{layer.parameters:,}",
                f"{layer.trainable:,}",
            )
            for layer in shown.layers
            if layer.depth <= depth
        ]
    )
    parameters, trainable = shown.parameters
    print(f"{parameters:,} parameters, {trainable:,} of them trainable")
    if shown.flops is not None:
        print(f"{shown.flops:.4g} floating-point operations in the forward pass of one batch")
    if shown.problem:
        print(f"the forward pass failed, so nothing more is known: {shown.problem}")


def _schedule(schedule: Schedule) -> None:
    from paceline.checkup.schedule import plot

    _heading(f"Learning rate of {schedule.optimizer}")
    rates = schedule.rates
    if len(rates) > 1:
        plain = (sys.stdout.encoding or "ascii").lower().replace("-", "") != "utf8"
        for line in plot(rates, schedule.unit, width=_width(), ascii=plain):
            print(line)
    peak = f"peak {rates[schedule.peak]:.4g} at {schedule.peak:,}"
    print(f"start {rates[0]:.4g}, {peak}, end {rates[-1]:.4g}")
    if schedule.note:
        print(schedule.note)


def _width() -> int:
    return min(100, shutil.get_terminal_size((80, 24)).columns)


def _heading(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}")


def _table(rows: Iterable[Sequence[Any]]) -> None:
    """Prints aligned columns, folded to the terminal's width if there is a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        # Text, since a "[0.9, 0.95]" would be taken for rich markup.
        table.add_row(*(Text(str(cell), overflow="fold") for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())

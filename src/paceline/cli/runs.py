"""`paceline runs`: lists, filters, sorts and compares the runs in a folder."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.errors import ConfigError

if TYPE_CHECKING:
    from paceline.runs import RunFolder

_FIRST = ("name", "status", "step", "epoch", "monitor", "best")
_LAST = ("started", "duration")
_METRICS = 6  # the most columns of metrics, unless --columns chooses


def runs(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FOLDER] [FILTER]...",
            help="Where to look (default: runs), and conditions such as 'val/accuracy>0.9' "
            "model.depth=4 status=complete name~digits (= != < <= > >= ~), in quotes where the "
            "shell would take < or > for itself.",
            show_default=False,
        ),
    ] = None,
    sort: Annotated[
        str | None, typer.Option(metavar="KEY", help="Smallest first; by default the newest run.")
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="Reverse the order.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Show at most this many runs.")] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="KEY,...", help="What to show for each run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Compare two runs; the arguments are their folders.")
    ] = False,
) -> None:
    """Lists runs, their status and metrics; with --diff, compares two of them.

    Filters, --sort and --columns take any name in run.json, of a metric, or of the recipe (dotted,
    as in an override).
    """
    # Comparing is an option, not a subcommand: a folder of runs may be called "diff".
    if diff:
        _compare(words or [], as_json)
        return
    from paceline.runs import find_runs, select
    from paceline.runs.select import check_keys

    folder, filters = _folder_and_filters(words or [])
    found = find_runs(folder)
    chosen = select(found, filters, sort=sort, reverse=reverse, limit=limit)
    wanted = None if columns is None else [name.strip() for name in columns.split(",")]
    check_keys(found, wanted or ())
    if as_json:
        _print_json([_as_json(run, wanted) for run in chosen])
    elif chosen:
        keys = wanted or _columns(chosen)
        _print_table(keys, [[run.get(key) for key in keys] for run in chosen])
    if not chosen:
        many = f"no run of {len(found)} below {folder} matches."
        _note(many if found else f"there is no run below {folder}.")
    for run in chosen:
        if run.problem is not None:
            _note(f"{run.folder}: run.json is {run.status}: {run.problem}.")


def _folder_and_filters(words: list[str]) -> tuple[Path, list[str]]:
    """A word that has no operator, or is an existing folder, is the folder to search."""
    folders = [w for w in words if Path(w).is_dir() or not any(c in w for c in "=<>~")]
    if len(folders) > 1:
        raise ConfigError(f"give one folder to search, not {' and '.join(folders)!r}.")
    return Path(folders[0] if folders else "runs"), [w for w in words if w not in folders]


def _columns(chosen: list[RunFolder]) -> list[str]:
    """The default columns, without those that no run has."""
    metrics = Counter(name for run in chosen for name in run.metrics)
    shown = {name for name, _ in metrics.most_common(_METRICS)}
    keys = [*_FIRST, *(name for name in metrics if name in shown), *_LAST]
    return [key for key in keys if any(run.get(key) is not None for run in chosen)]


def _compare(words: list[str], as_json: bool) -> None:
    from paceline.runs import differences
    from paceline.runs.listing import read

    if len(words) != 2:
        raise ConfigError("--diff compares two runs: give two run folders.")
    for word in words:
        if not Path(word).is_dir():
            raise ConfigError(f"there is no run folder {word!r}.")
    left, right = (read(Path(word)) for word in words)
    lines = differences(left, right)
    if as_json:
        _print_json([{k: _plain(v) for k, v in asdict(line).items()} for line in lines])
    else:
        rows = [[line.part, line.key, line.left, line.right] for line in lines]
        _print_table(["", "key", *words], rows, by_key=True)
    for run in (left, right):
        if run.problem is not None:
            _note(f"{run.folder}: run.json is {run.status}: {run.problem}.")
        elif not run.recipe:
            _note(f"{run.folder} has no readable recipe.yaml: its settings are not compared.")


def _print_table(keys: list[str], rows: list[list[Any]], by_key: bool = False) -> None:
    """Prints a table; with `by_key` the second column is the key of the row's values."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from paceline.runs.text import cell, printable

    # Without a terminal nothing is cut off.
    console = Console(width=None if sys.stdout.isatty() else 100_000, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, key in enumerate(keys):
        numbers = not by_key and all(isinstance(row[i], int | float | None) for row in rows)
        table.add_column(
            Text(printable(key)), justify="right" if numbers else "left", overflow="fold"
        )
    for row in rows:
        names = [row[1]] * len(row) if by_key else keys
        table.add_row(*(Text(cell(*pair)) for pair in zip(names, row, strict=True)))
    console.print(table)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def _as_json(run: RunFolder, wanted: list[str] | None) -> dict[str, Any]:
    """One run: the chosen columns, or everything known about it."""
    if wanted is not None:
        return {key: _plain(run.get(key)) for key in wanted}
    values = {key: _plain(value) for key, value in run.values.items()}
    recipe = {key: _plain(value) for key, value in run.recipe.items()}
    metrics = {key: _plain(value) for key, value in run.metrics.items()}
    return {**values, "metrics": metrics, "recipe": recipe}


def _plain(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they are text, as in the rows of a run."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _note(text: str) -> None:
    from paceline.runs.text import printable

    typer.echo(printable(text), err=True)

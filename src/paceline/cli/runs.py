"""`paceline runs`: lists, filters, sorts and compares the runs in a folder."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.errors import ConfigError

if TYPE_CHECKING:
    from paceline.runs import RunFolder

_FIRST = ("name", "status", "step", "epoch", "monitor", "best")
_LAST = ("started", "duration")
_SPARE = ("epoch", "step", "monitor")  # what a narrow terminal does without, after those
_NAME_WIDTH = 20  # to which a run's name is folded in a narrow terminal
_NUMBER_WIDTH = 12  # enough for any number as it is shown
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
        spare = [] if wanted else [*_LAST, *reversed([k for k in keys if k not in _FIRST]), *_SPARE]
        _print_table(keys, [[run.get(key) for key in keys] for run in chosen], may_drop=spare)
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


def _print_table(
    keys: list[str], rows: list[list[Any]], by_key: bool = False, may_drop: Sequence[str] = ()
) -> None:
    """Prints a table. In a terminal too narrow for it, text is folded, and no number is.

    Args:
        keys: the columns.
        rows: their values.
        by_key: whether the second column is the key of the row's values.
        may_drop: columns to leave out of a terminal too narrow for them, from the first on.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from paceline.runs.text import cell, printable

    # Without a terminal nothing is cut off.
    terminal = Console().width if sys.stdout.isatty() else 100_000
    columns: dict[str, list[str]] = {}
    for i, key in enumerate(keys):
        named = (row[1] if by_key else key for row in rows)
        columns[key] = [cell(name, row[i]) for name, row in zip(named, rows, strict=True)]

    def is_number(i: int) -> bool:
        return not by_key and all(isinstance(row[i], int | float | None) for row in rows)

    def width(key: str) -> int:
        longest = max(map(len, [printable(key), *columns[key]]))
        return min(longest, _NAME_WIDTH) if key == keys[0] else longest

    def total(kept: list[str]) -> int:
        return sum(map(width, kept)) + 2 * (len(kept) - 1)

    shown, dropped = list(keys), list[str]()
    for key in may_drop:
        if total(shown) > terminal and key in shown:
            shown.remove(key)
            dropped.append(key)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for key in shown:
        numbers = is_number(keys.index(key))
        table.add_column(
            Text(printable(key)),
            justify="right" if numbers else "left",
            overflow="fold",
            no_wrap=not by_key and key != shown[0],
            min_width=_NUMBER_WIDTH if by_key else None,
        )
    for cells in zip(*(columns[key] for key in shown), strict=True):
        table.add_row(*map(Text, cells))
    # Wider than the terminal if need be: a wrapped line is still complete.
    needed = 0 if by_key else total(shown)
    Console(width=max(terminal, needed), highlight=False).print(table)
    if dropped:
        _note(f"too narrow for {', '.join(dropped)}; --columns chooses, --json has all.")


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

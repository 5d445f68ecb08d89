"""`paceline sync`: sends a run's missing rows to a tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sync(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
    to: Annotated[
        str, typer.Option("--to", metavar="NAME", help="The tracker, such as wandb or mlflow.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[k=v]...",
            help="Settings of the tracker, such as project=NAME.  [default: those of the training]",
        ),
    ] = None,
) -> None:
    """Sends what a tracker is missing of a run: after an outage, or from another machine.

    Rows that it has are not sent again.
    """
    import yaml

    from paceline.errors import ConfigError
    from paceline.trackers.sync import sync as send

    given = {}
    for setting in settings or ():
        key, found, value = setting.partition("=")
        if not found:
            raise ConfigError(f"{setting!r}: expected KEY=VALUE.")
        given[key] = yaml.safe_load(value)
    rows = send(run, to, given)
    typer.echo(f"{to} has {rows} rows of {run}")

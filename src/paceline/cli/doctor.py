"""`paceline doctor`: the machine, and the promises tested on it."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline.cli.reports import show_report
from paceline.exit_codes import FAILED


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    self_test: Annotated[
        bool, typer.Option(help="Train a few tiny runs, to see the promises kept here.")
    ] = True,
) -> None:
    """Looks at this machine, and tests in a few seconds that the promises hold on it.

    Exit codes: 0 all is well, 1 something fails.
    """
    from paceline.checkup.doctor import doctor

    report = doctor(self_test=self_test)
    show_report(report, json=json)
    if not report.passed:
        raise typer.Exit(FAILED)

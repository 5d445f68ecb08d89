"""`paceline doctor`: checks the machine, and tests the promises on it."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline.cli.reports import show_report
from paceline.exit_codes import FAILED


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    self_test: Annotated[
        bool, typer.Option(help="Train a few tiny runs, to test the promises here.")
    ] = True,
) -> None:
    """Checks this machine, and tests in a few seconds that the promises hold on it.

    Exit codes: 0 no check fails, 1 one does.
    """
    from paceline.checkup.doctor import doctor

    report = doctor(self_test=self_test)
    show_report(report, json=json)
    if not report.passed:
        raise typer.Exit(FAILED)

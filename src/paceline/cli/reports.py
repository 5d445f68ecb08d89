"""How commands print their reports: a table for people, or JSON alone on stdout."""

from __future__ import annotations

import contextlib
import json as _json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.checkup.report import Report

_STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red", "SKIP": "dim"}


def show_report(report: Report, *, json: bool) -> None:
    """Prints a report.

    Args:
        report: the report.
        json: print JSON instead, never wrapped to the terminal.
    """
    if json:
        print(_json.dumps(report.as_json(), indent=2, allow_nan=False))
        return
    for line in report.lines():
        print(line)
    if not sys.stdout.isatty():
        for check in report.checks:
            print(f"{check.status}  {check.name}: {check.detail}")
        print(_summary(report))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "check", "what was found", title_justify="left")
    for check in report.checks:
        # Text, since a "[64, 10]" in a detail would be taken for rich markup.
        status = Text(check.status, style=_STYLES[check.status])
        table.add_row(status, Text(check.name), Text(check.detail))
    console = Console()
    console.print(table)
    console.print(_summary(report))


def _summary(report: Report) -> str:
    count = {status: sum(c.status == status for c in report.checks) for status in _STYLES}
    outcome = "passed" if report.passed else "failed"
    return f"{outcome}: {count['FAIL']} fail, {count['WARN']} warn, {count['PASS']} pass"


@contextlib.contextmanager
def own_output_apart() -> Iterator[None]:
    """Redirects to stderr what a recipe's code (and its loader workers) prints on stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)

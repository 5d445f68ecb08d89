"""Where the command `paceline` begins: with the signals, before anything else is imported."""

from __future__ import annotations

from paceline.world.signals import leave_at_once_on_signals, trains


def main() -> None:
    """Runs the command line and exits with its code."""
    if trains():
        leave_at_once_on_signals()
    from paceline.cli.app import run

    run()

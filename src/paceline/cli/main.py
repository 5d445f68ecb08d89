"""Where the command `paceline` begins: with the signals, before anything else is imported."""

from __future__ import annotations

from paceline.world.signals import is_train, leave_at_once_on_signals


def main() -> None:
    """Runs the command line and exits with its code."""
    if is_train():
        leave_at_once_on_signals()
    from paceline.cli.app import run

    run()

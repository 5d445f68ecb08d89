"""How a process of Paceline ends, for shells, launchers and schedulers."""

from __future__ import annotations

from typing import Final

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
"""Wrong use of a command, or a recipe with mistakes: nothing was started."""
STOPPED: Final = 75
"""Stopped and saved; the same command resumes. The system calls it a temporary failure
(`EX_TEMPFAIL` of sysexits.h)."""

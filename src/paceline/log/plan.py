"""The plan: every decision that the trainer made by itself, and the setting that changes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class PlanLine:
    """One decision.

    Attributes:
        decision: what was decided, with its value, e.g. "8 samples a rank (64 over 8 ranks)".
        setting: the setting that changes it, e.g. "global_batch_size"; may be empty.
        given: whether the user has decided it: written down, but not printed.
    """

    decision: str
    setting: str = ""
    given: bool = False

    def __str__(self) -> str:
        return f"{self.decision}  [{self.setting}]" if self.setting else self.decision


class Plan:
    """The lines of a run's plan, in the order in which they were decided."""

    def __init__(self) -> None:
        self._lines: dict[PlanLine, None] = {}

    def add(self, decision: str, setting: str = "", *, given: bool = False) -> None:
        """Adds a line, unless it is already there (a second `train()`).

        Args:
            decision: what was decided, with its value.
            setting: the setting that changes it.
            given: whether it repeats what the user has set.
        """
        self._lines.setdefault(PlanLine(decision, setting, given))

    def as_list(self) -> list[dict[str, str]]:
        """The lines as plain data for run.json, `{"decision": ..., "setting": ...}` each."""
        return [{"decision": line.decision, "setting": line.setting} for line in self._lines]

    def __iter__(self) -> Iterator[PlanLine]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def show(self, file: TextIO | None = None) -> None:
        """Prints what was decided for the user; off a terminal each line begins with "plan: ".

        Args:
            file: where to; stdout by default.
        """
        stream: TextIO = sys.stdout if file is None else file
        lines = [line for line in self._lines if not line.given]
        if not lines:
            return
        if not stream.isatty():
            for line in lines:
                print(f"plan: {line}", file=stream, flush=True)
            return
        from rich.console import Console
        from rich.padding import Padding
        from rich.text import Text

        console = Console(file=stream, highlight=False)
        console.print("Plan")
        for line in lines:
            # Text, since a "[setting]" in a decision would be taken for rich markup.
            setting = Text(f"  [{line.setting}]" if line.setting else "", "dim")
            console.print(Padding(Text(line.decision) + setting, (0, 0, 0, 2), expand=False))

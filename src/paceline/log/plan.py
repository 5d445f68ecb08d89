"""The plan: every decision that the trainer made by itself, and the setting that changes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TextIO


@dataclass(frozen=True)
class PlanLine:
    """One decision.

    Attributes:
        decision: what was decided, with its value, e.g. "8 samples a rank (64 over 8 ranks)".
        setting: the setting that changes it, e.g. "global_batch_size"; may be empty.
    """

    decision: str
    setting: str = ""

    def __str__(self) -> str:
        return f"{self.decision}  [{self.setting}]" if self.setting else self.decision


class Plan:
    """The lines of a run's plan, in the order in which they were decided."""

    def __init__(self) -> None:
        self._lines: dict[PlanLine, None] = {}

    def add(self, decision: str, setting: str = "") -> None:
        """Adds a line, unless it is already there (a second `train()`).

        Args:
            decision: what was decided, with its value.
            setting: the setting that changes it.
        """
        self._lines.setdefault(PlanLine(decision, setting))

    def as_list(self) -> list[dict[str, str]]:
        """The lines as plain data for run.json, `{"decision": ..., "setting": ...}` each."""
        return [asdict(line) for line in self._lines]

    def __iter__(self) -> Iterator[PlanLine]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def show(self, file: TextIO | None = None) -> None:
        """Prints the plan to `file` (default: stdout): a table on a terminal, else plain lines."""
        stream: TextIO = sys.stdout if file is None else file
        if not self._lines:
            return
        if not stream.isatty():
            for line in self._lines:
                print(f"plan: {line}", file=stream, flush=True)
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("decision", "change it with", title="Plan", title_justify="left")
        for line in self._lines:
            # Text, since a "[setting]" in a decision would be taken for rich markup.
            table.add_row(Text(line.decision), Text(line.setting))
        Console(file=stream).print(table)

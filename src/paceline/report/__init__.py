"""Runs that are there already: listed, compared, shown. Only reads, and never runs what it reads.

`find_runs(folder)` finds them, `select` filters and sorts them, `differences` compares two.
"""

from paceline.report.difference import Difference, differences
from paceline.report.runs import Run, find_runs
from paceline.report.select import select

__all__ = ["Difference", "Run", "differences", "find_runs", "select"]

"""Reads run folders: lists, filters and compares them. Never executes what it reads.

`find_runs(folder)` finds them, `select` filters and sorts them, `differences` compares two.
"""

from paceline.runs.difference import Difference, differences
from paceline.runs.listing import RunFolder, find_runs
from paceline.runs.select import select

__all__ = ["Difference", "RunFolder", "differences", "find_runs", "select"]

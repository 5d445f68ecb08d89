"""Each row of another system's table of features, defects and acceptance cases has its test.

A row is answered by the name of a test anywhere below `tests/`, or by `Later("what and why")` for
what Paceline does not have yet, or leaves to another package on purpose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Later:
    """A row without a test.

    Args:
        reason: what is not there, and what to use instead if there is something.
    """

    reason: str


@cache
def known_tests() -> frozenset[str]:
    """The names of all test functions."""
    files = TESTS.rglob("test_*.py")
    return frozenset(
        name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    )


def unanswered(rows: dict[str, str | Later]) -> dict[str, str]:
    """Rows whose test does not exist, or whose reason is empty."""
    return {
        row: str(answer)
        for row, answer in rows.items()
        if (isinstance(answer, Later) and not answer.reason.strip())
        or (isinstance(answer, str) and answer not in known_tests())
    }


def without_test(ids: list[str], prefix: str) -> list[str]:
    """Those acceptance rows (`AH-07`) that no test is named after (`test_AH_07_...`)."""
    return [i for i in ids if not any(n.startswith(f"test_{prefix}_{i}_") for n in known_tests())]

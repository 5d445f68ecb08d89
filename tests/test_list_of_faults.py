"""The list of kinds of faults names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_each_test_in_the_list_of_faults_exists() -> None:
    named = re.findall(r"([\w/]+\.py)(?:::(\w+))?", (TESTS / "FAULTS.md").read_text())
    missing = [
        f"{file}::{test}"
        for file, test in named
        if file != "test_list_of_faults.py"
        and not ((TESTS / file).exists() and f"def {test}" in (TESTS / file).read_text())
    ]
    assert missing == []
    assert len(named) > 50

"""The README shows only what runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blocks import blocks, run_block
from command import Paceline
from paceline.testing import Ranks

README = Path(__file__).parents[1] / "README.md"
PYTHON = [block for block in blocks(README) if block.language == "python"]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_each_code_block_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: Ranks
) -> None:
    monkeypatch.chdir(tmp_path)
    run_block(PYTHON[number], README, Paceline(tmp_path, ranks))


def test_each_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert [x for x in links if "://" not in x and not (README.parent / x).exists()] == []

"""P3 The same mathematics at any layout: as `make layouts`, with a few draws."""

from __future__ import annotations

import pytest

from layouts import check
from paceline.testing import Ranks


@pytest.mark.parametrize("seed", [11])
def test_a_run_is_the_same_in_any_layout(ranks: Ranks, seed: int) -> None:
    """Given a model, data and settings, when it trains in one layout, and goes on in another, then
    rows, validations and weights are those of one process."""
    check(ranks, seed)

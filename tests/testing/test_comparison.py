"""What counts as the same: bytes, types and shapes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from paceline.checkpoint.comparison import differing
from paceline.testing import bits, rows
from paceline.testing.comparison import first_difference

LARGE = np.arange(5000.0)


def test_bits_tell_apart_what_numbers_do_not() -> None:
    zero = torch.zeros(2)
    assert bits({"a": [zero]}) == bits({"a": (zero.clone(),)})
    assert bits(torch.tensor(math.nan)) == bits(torch.tensor(math.nan))
    assert bits(zero) != bits(-zero)
    assert bits(zero) != bits(zero.double())
    assert bits(zero) != bits(zero[:, None])
    assert bits(torch.zeros(0)) != bits(torch.zeros(0, 3))
    assert bits(zero.to("meta")) == ("torch.float32", (2,), b"")


def test_every_path_that_differs_is_named() -> None:
    left = {"a": [1, torch.zeros(2)], "b": {"c": math.nan, "d": LARGE}, "gone": 1}
    right = {"a": [1.0, -torch.zeros(2)], "b": {"c": math.nan, "d": LARGE.copy()}, "new": 1}
    assert differing(left, right, "x") == ["x/a/0", "x/a/1", "x/gone", "x/new"]
    right["b"]["d"][2500] += 1  # in the middle, which numpy does not print
    assert "x/b/d" in differing(left, right, "x")
    assert differing(left, left, "x") == []


def test_the_first_row_that_differs_is_shown(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}\n')
    kept = rows(tmp_path)
    assert kept == [{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}]
    assert first_difference(kept, [kept[0], {"step": 2, "x": 3.0}]) == "step 2: x 2.0 != 3.0"
    assert first_difference(kept, kept[:1]) == "2 rows != 1 rows"
    assert first_difference(kept, kept) is None

"""Means over items: the same bits whether values are read at once or held on a device."""

from __future__ import annotations

import pytest
import torch

from paceline.errors import MetricError
from paceline.log.accumulator import Accumulator

KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.int64)


def filled(n: int, *, reads_are_free: bool, saved_at: tuple[int, ...] = ()) -> Accumulator:
    """n values of several kinds, weighted by numbers and by tensors, saved and loaded between."""
    generator = torch.Generator().manual_seed(1)
    accumulator = Accumulator(reads_are_free=reads_are_free)
    for i in range(n):
        value = (100 * torch.randn((), generator=generator)).to(KINDS[i % 7 % 4])
        accumulator.add("loss", value, torch.tensor(i % 5) if i % 3 == 0 else i % 5)
        accumulator.add("one", value.reshape(1, 1), 1)
        accumulator.add("number", float(value), torch.tensor(2.0))
        value.zero_()  # what is held is a copy
        if i in saved_at:
            state = accumulator.state_dict()
            accumulator = Accumulator(reads_are_free=reads_are_free)
            accumulator.load_state_dict(state)
    return accumulator


@pytest.mark.parametrize("n", [1, 10, 1024, 1025, 3000])
def test_held_values_sum_to_the_same_bits(n: int):
    at_once = filled(n, reads_are_free=True).sums()
    assert filled(n, reads_are_free=False).sums() == at_once


def test_saving_in_between_moves_no_bit():
    assert (
        filled(2500, reads_are_free=False, saved_at=(0, 17, 1023, 1024, 2000)).sums()
        == filled(2500, reads_are_free=True).sums()
    )


def test_memory_on_a_device_stays_small():
    """10,000 scalars would be 10,000 blocks of the device's allocator."""
    accumulator = Accumulator(reads_are_free=False)
    for _ in range(10_000):
        accumulator.add("loss", torch.ones(()), torch.ones(()))
    held = accumulator._held["loss"]
    assert len(held._values) + len(held._weights) < 2 * 1024


@pytest.mark.parametrize(("value", "weight"), [(1.0, -1), (1.0, float("nan")), (10**400, 1)])
def test_what_cannot_be_weighed_is_refused_with_its_name(value: float, weight: float) -> None:
    with pytest.raises(MetricError, match="'m'"):
        Accumulator(reads_are_free=True).add("m", value, weight)

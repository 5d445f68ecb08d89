"""Intervals and success rates, against values by hand."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest

from paceline.errors import DataError
from paceline.rl.statistics import bootstrap_interval, hit_at_k, paired_interval


def test_the_interval_is_that_of_all_resamples_of_three_cases() -> None:
    """Of 27 equally likely resamples, the 5 % and 95 % quantiles of the mean can be counted."""
    cases = [0.0, 1.0, 5.0]
    means = sorted(sum(draw) / 3 for draw in product(cases, repeat=3))
    low, high = bootstrap_interval(cases, seed=0, level=0.9, resamples=4000)
    assert (low, high) == pytest.approx((means[1], means[-2])), "1/27 lie below, and above"


def test_equal_seeds_give_equal_intervals() -> None:
    cases = list(np.random.default_rng(0).normal(size=50))
    assert bootstrap_interval(cases, 3) == bootstrap_interval(cases, 3)
    assert bootstrap_interval(cases, 3) != bootstrap_interval(cases, 4)
    assert bootstrap_interval([2.0], 0) == (2.0, 2.0)
    assert all(map(math.isnan, bootstrap_interval([], 0)))


def test_a_pair_s_common_part_does_not_widen_the_interval() -> None:
    common = np.random.default_rng(1).normal(size=40) * 100
    mean, low, high = paired_interval(list(common + 1), list(common), 0)
    assert (mean, low, high) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_hit_at_k_is_the_share_of_k_attempts_with_a_success(k: int) -> None:
    cases = [[True, False, False, False], [False] * 4, [True, True, False, False]]
    by_hand = [
        sum(any(chosen) for chosen in combinations(one, k)) / math.comb(4, k) for one in cases
    ]
    assert hit_at_k(cases, k) == pytest.approx(sum(by_hand) / 3)


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(DataError, match="make no pairs"):
        paired_interval([1.0], [1.0, 2.0], 0)
    with pytest.raises(DataError, match=r"k=3.*one has 2"):
        hit_at_k([[True] * 3, [True] * 2], 3)
    with pytest.raises(DataError, match="at least one resample"):
        bootstrap_interval([1.0], 0, level=1.0)

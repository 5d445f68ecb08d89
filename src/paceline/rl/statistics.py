"""How sure an evaluation is: intervals and success rates, from plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from paceline.errors import DataError


def bootstrap_interval(
    values: Sequence[float], seed: int, *, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Where the mean lies: the percentile interval of the bootstrap (Efron, 1979).

    Args:
        values: one an independent case, such as an episode or a prompt.
        seed: of the resampling; equal seeds give equal intervals.
        level: the share of means within the interval.
        resamples: how often as many cases are drawn anew.

    Returns:
        Its ends; NaN without a value.

    Raises:
        DataError: the level is not between 0 and 1, or there is no resample.
    """
    if not 0 < level < 1 or resamples < 1:
        raise DataError(
            f"bootstrap_interval(level={level}, resamples={resamples}): the level lies between 0 "
            "and 1, and there is at least one resample."
        )
    cases = np.asarray(values, dtype=np.float64)
    if not len(cases):
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = [
        cases[generator.integers(len(cases), size=len(cases))].mean() for _ in range(resamples)
    ]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(
    ones: Sequence[float],
    others: Sequence[float],
    seed: int,
    *,
    level: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float, float]:
    """By how much two of the same cases differ: the mean of `ones - others` and its interval.

    Args:
        ones, others: of the same cases in the same order.
        seed, level, resamples: as of `bootstrap_interval`.

    Returns:
        The mean difference and the interval's ends.

    Raises:
        DataError: they are not as many.
    """
    if len(ones) != len(others):
        raise DataError(f"paired_interval: {len(ones)} and {len(others)} values make no pairs.")
    differences = np.asarray(ones, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    low, high = bootstrap_interval(differences.tolist(), seed, level=level, resamples=resamples)
    return (float(differences.mean()) if len(differences) else math.nan), low, high


def hit_at_k(successes: Sequence[Sequence[bool]], k: int) -> float:
    """The chance that one of k attempts at a case succeeds, averaged over the cases.

    Of n attempts, c of which succeeded, the unbiased estimate is 1 - C(n - c, k) / C(n, k).

    Args:
        successes: of each case, whether each of its attempts succeeded; at least k each.
        k: attempts.

    Raises:
        DataError: k is below 1, there is no case, or one has fewer attempts.
    """
    fewest = min((len(one) for one in successes), default=0)
    if not 1 <= k <= fewest:
        raise DataError(
            f"hit_at_k(k={k}): every case needs at least that many attempts, one has {fewest}."
        )
    missed = [
        math.comb(len(one) - sum(map(bool, one)), k) / math.comb(len(one), k) for one in successes
    ]
    return 1 - sum(missed) / len(missed)

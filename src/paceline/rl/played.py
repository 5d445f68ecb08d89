"""What came of an evaluation's episodes, and what is said of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paceline.rl.statistics import bootstrap_interval, hit_at_k, paired_interval


@dataclass(frozen=True)
class Played:
    """An episode of an evaluation.

    Attributes:
        case: what it is compared by: the number of its prompt, or of the episode where there are no
            prompts. Attempts at one prompt are one case.
        value: the return, or the last turn's reward; None without a turn.
        length: steps, or turns.
        record: as `record_of` makes it; empty of an environment.
    """

    case: int
    value: float | None
    length: int
    record: Mapping[str, Any] = field(default_factory=dict)


def by_case(played: Sequence[Played]) -> dict[int, list[float]]:
    """The values of each case that has one, in order.

    Args:
        played: the episodes.
    """
    found: dict[int, list[float]] = {}
    for one in played:
        if one.value is not None:
            found.setdefault(one.case, []).append(one.value)
    return found


def summary(
    played: Sequence[Played], seed: int, threshold: float | None, attempts: int = 1
) -> dict[str, float]:
    """What is said of an evaluation's episodes.

    Args:
        played: the episodes.
        seed: of the interval's resampling.
        threshold: the value from which on an episode is a success; None to count none.
        attempts: at each case.

    Returns:
        "mean" over the episodes that have a value, "low" and "high", the ends of its 95 % interval,
        for which cases are drawn anew; with a threshold "success", the share of these episodes;
        with several attempts "best", the mean over the cases of their best attempt, and with a
        threshold "hit_at_<attempts>", the share of cases of which an attempt is a success.
    """
    cases = by_case(played)
    if not cases:
        return {}
    values = [value for found in cases.values() for value in found]
    low, high = bootstrap_interval([float(np.mean(v)) for v in cases.values()], seed)
    said = {"mean": float(np.mean(values)), "low": low, "high": high}
    if threshold is not None:
        said["success"] = float(np.mean([value >= threshold for value in values]))
    if attempts > 1:
        said["best"] = float(np.mean([max(v) for v in cases.values()]))
        whole = [found for found in cases.values() if len(found) == attempts]
        if whole and threshold is not None:
            hits = [[value >= threshold for value in found] for found in whole]
            said[f"hit_at_{attempts}"] = hit_at_k(hits, attempts)
    return said


def gain(
    ones: Sequence[Played], others: Sequence[Played], seed: int, *, best: bool = False
) -> tuple[float, float, float] | None:
    """By how much one policy's episodes are worth more than another's, case by case.

    Args:
        ones, others: their episodes of the same evaluation.
        seed: of the interval's resampling.
        best: whether to compare each case's best attempt, in place of the mean.

    Returns:
        The mean difference and its paired 95 % interval; None without a common case.
    """
    mine, theirs = by_case(ones), by_case(others)
    common = [case for case in mine if case in theirs]
    if not common:
        return None
    of = max if best else _mean
    pairs = [of(mine[case]) for case in common], [of(theirs[case]) for case in common]
    return paired_interval(*pairs, seed)


def diversity(played: Sequence[Played]) -> dict[str, float]:
    """How much the probes of an evaluation differ.

    Args:
        played: the episodes, with their records.

    Returns:
        "probes", how many there are; "distinct", the share of different ones; "distance", the mean
        over all pairs of 1 less the share of words and word pairs in common (Jaccard).
    """
    probes = [str(turn["probe"]) for one in played for turn in one.record.get("turns", ())]
    if not probes:
        return {}
    sets = [words(probe) for probe in probes]
    shares = [
        len(sets[i] & sets[j]) / max(1, len(sets[i] | sets[j]))
        for i in range(len(sets))
        for j in range(i)
    ]
    return {
        "probes": float(len(probes)),
        "distinct": len(set(probes)) / len(probes),
        "distance": 1.0 - float(np.mean(shares)) if shares else 0.0,
    }


def words(text: str) -> set[tuple[str, ...]]:
    """The words of a text and its pairs of neighbours.

    Args:
        text: of any language that has spaces.
    """
    found = str(text).lower().split()
    return {(word,) for word in found} | set(itertools.pairwise(found))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))

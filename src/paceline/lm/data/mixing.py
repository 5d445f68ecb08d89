"""Samples rows, mixes sources by weight, splits them by their content.

Nothing here draws from a global generator: what is chosen depends on the arguments alone.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paceline.errors import ConfigError
from paceline.lm.data.rows import Row, Rows, Selected, canonical

_log = logging.getLogger(__name__)


def sample(rows: Any, *, ratio: float | None = None, count: int | None = None, seed: int) -> Any:
    """Some of the rows, chosen at random without replacement, in the order they had.

    With the same seed a larger sample contains a smaller one.

    Args:
        rows: the rows, or how many there are.
        ratio: the share to take, above 0 and at most 1; rounded to whole rows, but at least one.
        count: the number to take; all, with a warning, if there are not as many.
        seed: another seed gives another choice.

    Returns:
        The rows, or their indices, [count] int64, if `rows` is a number.

    Raises:
        ConfigError: not exactly one of ratio and count, or it is out of range.
    """
    if (ratio is None) == (count is None):
        raise ConfigError("a sample needs either a ratio or a count.")
    n = rows if isinstance(rows, int) else len(rows)
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise ConfigError(f"ratio={ratio}: above 0 and at most 1; weights repeat rows.")
        count = min(n, max(1, round(n * ratio)))
    elif (count or 0) < 1:
        raise ConfigError(f"count={count}: at least 1.")
    count = count or 0
    if count > n:
        _log.warning("a sample of %d rows was asked for, but there are %d: all are taken", count, n)
    indices = _chosen(n, count, seed)
    return indices if isinstance(rows, int) else Selected(rows, indices)


def mix(sizes: Sequence[int], weights: Sequence[float], *, seed: int = 0) -> np.ndarray:
    """The order in which several sources are read as one.

    A source of weight 2 has each of its samples twice as often as one of weight 1; of weight 0.5
    half of its samples are taken, of weight 1.5 all once and half of them again. Each source is
    spread evenly over the whole, in its own order.

    Args:
        sizes: the number of samples of each source.
        weights: one for each source, 0 or more.
        seed: decides which samples a fraction of a weight takes.

    Returns:
        Indices into the sources laid one after the other, [n] int64.

    Raises:
        ConfigError: the numbers of sizes and weights differ, or a weight is negative.
    """
    if len(sizes) != len(weights):
        raise ConfigError(f"{len(sizes)} sources have {len(weights)} weights.")
    places, indices, first = [], [], 0
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"weights[{source}]={weight}: 0 or more.")
        whole = math.floor(weight)
        rest = _chosen(size, round((weight - whole) * size), seed + source)
        own = np.concatenate([np.tile(np.arange(size, dtype=np.int64), whole), rest])
        places.append((np.arange(len(own)) + 0.5) / max(1, len(own)))
        indices.append(own + first)
        first += size
    if not indices:
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(np.concatenate(places), kind="stable")  # ties: the first source first
    return np.concatenate(indices)[order]


def content(row: Row) -> bytes:
    """What a row says: its messages' roles and texts, or its text, or else all of its columns.

    So rows that differ in an id or a source alone have the same content.
    """
    if isinstance(messages := row.get("messages"), list | tuple):
        said = [[m.get("role"), m.get("content")] for m in messages if isinstance(m, Mapping)]
        return canonical(["messages", said])
    if isinstance(text := row.get("text"), str):
        return canonical(["text", text])
    return canonical(row)


def split(
    rows: Rows,
    shares: Mapping[str, float],
    *,
    by: Callable[[Row], bytes] = content,
    seed: int = 0,
) -> dict[str, Rows]:
    """Parts of the rows by a hash of what each says, in the order they had.

    Rows with the same content are in the same part, and so is a row whatever else is in the set.
    Shares are met on average, not to the row.

    Args:
        rows: the rows.
        shares: of the parts by name, which sum to 1: `{"train": 0.9, "eval": 0.1}`.
        by: what of a row is hashed.
        seed: another seed gives another split; a part that is split again needs one.

    Returns:
        The parts by name.

    Raises:
        ConfigError: the shares do not sum to 1.
    """
    values = [*shares.values()]
    if not values or min(values) < 0 or not math.isclose(sum(values), 1, abs_tol=1e-6):
        raise ConfigError(f"the shares {values} have to be 0 or more and sum to 1.")
    key = seed.to_bytes(8, "little", signed=True)
    hashes = [hashlib.blake2b(by(row), digest_size=8, key=key).digest() for row in rows]
    at = np.frombuffer(b"".join(hashes), dtype="<u8") / 2.0**64
    part = np.searchsorted(np.cumsum(values)[:-1], at, side="right")
    return {name: Selected(rows, np.flatnonzero(part == i)) for i, name in enumerate(shares)}


def _chosen(n: int, count: int, seed: int) -> np.ndarray:
    """`count` of range(n), rising: those with the smallest of n raw draws, which no version of
    numpy changes."""
    draws = np.random.PCG64(np.random.SeedSequence([seed % 2**64, 0x5A3])).random_raw(n)
    return np.sort(np.argsort(draws, kind="stable")[:count])

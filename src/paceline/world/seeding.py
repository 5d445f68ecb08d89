"""Random streams that are derived, never stored.

Every draw of random numbers during a run has a seed that is a function of the run's seed and of its
*purpose* (this micro-batch of this step, this sample of this pass, ...). So a resumed run needs no
saved generator state, and observing a run cannot disturb it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# `random.seed` without its look at the argument's type, for every micro-batch has it done.
_instance: Any = random.seed.__self__  # pyright: ignore[reportFunctionMemberAccess]
_seed_random: Any = super(random.Random, _instance).seed  # pyright: ignore[reportAttributeAccessIssue]

_MASK = (1 << 64) - 1
_LABELS = {
    "model": 1,
    "sample": 2,
    "order": 3,
    "val": 4,
    "val-sample": 5,
    "batch": 6,
    "loader": 7,
    "init": 8,
    "name": 9,
    "source": 10,
    "env": 11,
    "probe": 12,
    "response": 13,
    "eval": 14,
    "generate": 15,
}


def mix(key: int, value: int) -> int:
    """Folds a value into a key: one round of splitmix64 (Steele, Lea and Flood, 2014).

    Args:
        key: 64 bits.
        value: any integer; its lowest 64 bits count.

    Returns:
        The new key, 64 bits.
    """
    key = (key + value + 0x9E3779B97F4A7C15) & _MASK
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK
    return key ^ (key >> 31)


def stream(seed: int, label: str, *parts: int) -> int:
    """The 64-bit seed of one stream.

    Args:
        seed: the run's seed.
        label: the stream's purpose, one of a fixed list, so that no two purposes can collide.
        *parts: numbers that distinguish streams of one purpose, e.g. step and micro-batch.
    """
    key = mix(mix(0, seed), _LABELS[label])
    for part in parts:
        key = mix(key, part)
    return key


def seed_of(name: str | None, seed: int) -> int:
    """The seed of one of several things of a kind, which depends on no other's.

    Args:
        name: its own; None for the only one of its kind, whose seed is the run's.
        seed: the run's.
    """
    if name is None:
        return seed
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return stream(seed, "name", int.from_bytes(digest, "little"))


def seed_everything(seed: int) -> None:
    """Seeds the generators of torch (every device), numpy and `random`.

    Cheap enough for the loop: the generators are seeded directly, without the loop over back ends
    in torch.manual_seed (114 us).
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # the legacy generator takes 32 bits
    _seed_random(seed)
    _instance.gauss_next = None  # the second of a pair that `random.gauss` has drawn


RandomState = tuple[torch.Tensor, Any, Any]


def random_state() -> RandomState:
    """Where the CPU's generators of torch, numpy and `random` stand."""
    return torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()


def same_state(one: RandomState, other: RandomState) -> bool:
    """Whether nothing was drawn between two states.

    Args:
        one: from `random_state`.
        other: a later one.
    """
    numpy, later = ({**held[1], **held[1]["state"], "state": None} for held in (one, other))
    return (
        torch.equal(one[0], other[0])
        and one[2] == other[2]
        and np.array_equal(numpy.pop("key"), later.pop("key"))
        and numpy == later
    )


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Afterwards the generators of the CPU stand where they stood before."""
    held = random_state()
    try:
        yield
    finally:
        torch.set_rng_state(held[0])
        np.random.set_state(held[1])
        random.setstate(held[2])

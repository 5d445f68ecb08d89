"""Random streams that are derived, never stored.

Whatever draws random numbers during a run gets a seed that is a function of the run's seed and of
*what it is for* (this micro-batch of this step, this sample of this pass, ...). So a resumed run
needs no saved generator state, and observing a run cannot disturb it.
"""

from __future__ import annotations

import random

import numpy as np
import torch

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
    "source": 9,
}


def mix(key: int, value: int) -> int:
    """Folds `value` into a 64-bit key: one round of splitmix64 (Steele, Lea and Flood, 2014)."""
    key = (key + value + 0x9E3779B97F4A7C15) & _MASK
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK
    return key ^ (key >> 31)


def stream(seed: int, label: str, *parts: int) -> int:
    """The 64-bit seed of one stream.

    Args:
        seed: the run's seed.
        label: what the stream is for, one of a fixed list so that no two uses can collide.
        *parts: what tells this stream from its siblings, e.g. step and micro-batch.
    """
    key = mix(mix(0, seed), _LABELS[label])
    for part in parts:
        key = mix(key, part)
    return key


def seed_everything(seed: int) -> None:
    """Seeds the generators of torch (every device), numpy and `random`.

    Cheap enough for the loop: the generators are seeded directly, without torch.manual_seed's
    walk over back ends (114 us).
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # the legacy generator takes 32 bits
    random.seed(seed)

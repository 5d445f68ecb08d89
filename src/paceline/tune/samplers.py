"""What suggests the values of a trial."""

from __future__ import annotations

import hashlib
from typing import Any

from paceline.errors import ConfigError, nearest


def sampler_for(
    settings: Any, seed: int, number: int, *, space: Any = None, workers: int = 1
) -> Any:
    """A fresh sampler for one trial."""
    import optuna

    kind = settings.sampler["type"]
    own = int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "big")
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=own)
    if kind == "tpe":
        return optuna.samplers.TPESampler(seed=own, constant_liar=workers > 1)
    if kind == "grid":
        return optuna.samplers.RandomSampler(seed=own)
    raise ConfigError(f"there is no sampler {kind!r}{nearest(kind, ['random', 'tpe', 'grid'])}")

"""What `${name:...}` in a recipe may compute, beside OmegaConf's own `oc.*`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf


def length(values: Sequence[object]) -> int:
    """`${len:${vocabulary}}`: the number of items of a list or mapping, or of a text's letters."""
    return len(values)


def product(*factors: float) -> float:
    """`${multiply:${batch},${length}}`: the product; a whole number if all factors are."""
    return math.prod(factors)


def register_resolvers(own: Mapping[str, Callable[..., Any]] = {}) -> None:
    """Makes them known to OmegaConf. Whoever has given a name a meaning of their own keeps it.

    Args:
        own: further ones, which take the place of what has their name.
    """
    for name, resolver in own.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    for name, resolver in (("len", length), ("multiply", product)):
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_new_resolver(name, resolver)

"""Functions that `${name:...}` in a recipe may call, besides OmegaConf's own `oc.*`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf


def length(values: Sequence[object]) -> int:
    """`${len:${vocabulary}}`: the length of a list, a mapping or a text."""
    return len(values)


def product(*factors: float) -> float:
    """`${multiply:${batch},${length}}`: the product; an integer if all factors are."""
    return math.prod(factors)


def register_resolvers(own: Mapping[str, Callable[..., Any]] = {}) -> None:
    """Registers the resolvers with OmegaConf, unless the user has registered the name.

    Args:
        own: further resolvers, which replace any of the same name.
    """
    for name, resolver in own.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    for name, resolver in (("len", length), ("multiply", product)):
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_new_resolver(name, resolver)

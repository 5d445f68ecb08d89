"""Functions that `${name:...}` in a recipe may call, besides OmegaConf's own `oc.*`.

What one gives that depends on the time or on chance (`${now:%H-%M}`) is asked for once: a launcher
hands it to its ranks and their restarts, and ranks that it does not reach agree in their store.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

from paceline.recipe.interpolation import PURE
from paceline.world.meeting import agreed_text

HANDED = "PACELINE_RESOLVED"
"""The environment variable with what resolvers gave a launcher, as JSON."""

_given: dict[str, Any] = {}  # by the call, as JSON


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


def forget() -> None:
    """Has resolvers be asked anew, for another recipe; what a launcher has handed over stays."""
    _given.clear()
    with contextlib.suppress(ValueError, TypeError):
        _given.update(json.loads(os.environ.get(HANDED, "{}")))


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """Within it, a resolver whose answer may be another each time is asked once for each call."""
    resolvers = BaseContainer._resolvers  # pyright: ignore[reportPrivateUsage]
    before = dict(resolvers)
    for name, resolver in before.items():
        if name not in PURE and not name.startswith("oc."):
            resolvers[name] = _once(name, resolver)
    try:
        yield
    finally:
        resolvers.clear()
        resolvers.update(before)


def _once(name: str, resolver: Callable[..., Any]) -> Callable[..., Any]:
    def resolved(config: Any, parent: Any, node: Any, args: Any, texts: Any) -> Any:
        key = json.dumps([name, *map(str, args)])
        if key not in _given:
            _given[key] = resolver(config, parent, node, args, texts)
        return _given[key]

    return resolved


def answers() -> dict[str, Any]:
    """What resolvers gave, by `name:argument`, as far as it can be handed over."""
    return {
        f"{name}:{','.join(args)}": value
        for (name, *args), value in ((json.loads(k), v) for k, v in _portable().items())
    }


def _portable() -> dict[str, Any]:
    return {k: v for k, v in _given.items() if isinstance(v, str | int | float | bool | None)}


@contextlib.contextmanager
def handed_over() -> Iterator[None]:
    """Within it, processes that are started get what resolvers gave here."""
    before = os.environ.get(HANDED)
    if _given:
        os.environ[HANDED] = json.dumps(_portable())
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(HANDED, None)
        else:
            os.environ[HANDED] = before


def agree() -> bool:
    """Has all ranks go by the answers of one of them, unless their launcher has handed some over.

    Returns:
        Whether this rank's have changed.
    """
    if HANDED in os.environ or not _given:
        return False
    mine = json.dumps(_portable())
    agreed = agreed_text("resolved", mine)
    if agreed != mine:
        _given.update(json.loads(agreed))
    return agreed != mine

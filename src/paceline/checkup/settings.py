"""The settings of a recipe, each with the place where it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from paceline.log.secrets import mask_credentials, without_credentials
from paceline.recipe.compose import Composed
from paceline.recipe.mistakes import Path, dotted

# `${oc.env:TOKEN}` and other look-ups outside the recipe; `${model.width}` is not one.
_LOOK_UP = re.compile(r"\$\{[^{}]*:")


@dataclass(frozen=True)
class Setting:
    """One value of a recipe.

    Attributes:
        key: its dotted place in the recipe.
        value: with references to other keys resolved; look-ups (e.g. of the environment) are left
            as they are written, and credentials are `???`, so that no secret is shown.
        place: `file:line`, or the override that set it.
    """

    key: str
    value: Any
    place: str


def settings_of(composed: Composed) -> list[Setting]:
    """Every value of a composed recipe, in the order of its keys."""
    locate = composed.mistakes().locate

    def place_of(path: Path) -> str:
        return mask_credentials(locate(path))

    tree = _resolved(composed.config)
    return [
        Setting(dotted(path), without_credentials(value, str(path[-1])), place_of(path))
        for path, value in _leaves(tree, ())
    ]


def _resolved(config: DictConfig) -> Any:
    """The tree with references resolved, while look-ups are hidden from OmegaConf."""
    hidden: list[str] = []
    copy = config.copy()
    OmegaConf.set_struct(copy, False)
    _hide(copy, hidden)
    return _shown(OmegaConf.to_container(copy, resolve=True), hidden)


def _hide(node: DictConfig | ListConfig, hidden: list[str]) -> None:
    keys: Any = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        child: Any = node._get_node(key)
        if isinstance(child, DictConfig | ListConfig) and not child._is_interpolation():
            if not (child._is_missing() or child._is_none()):
                _hide(child, hidden)
            continue
        written = child._value()
        if isinstance(written, str) and _LOOK_UP.search(written):
            node[key] = f"\0{len(hidden)}\0"
            hidden.append(written)


def _shown(value: Any, hidden: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _shown(v, hidden) for key, v in value.items()}
    if isinstance(value, list):
        return [_shown(v, hidden) for v in value]
    if isinstance(value, str):
        return re.sub("\0(\\d+)\0", lambda match: hidden[int(match[1])], value)
    return value


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """The plain values; a list without mappings in it counts as one."""
    if isinstance(value, dict) and (value or not path):
        for key, below in value.items():
            yield from _leaves(below, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        for i, below in enumerate(value):
            yield from _leaves(below, (*path, str(i)))
    else:
        yield path, value

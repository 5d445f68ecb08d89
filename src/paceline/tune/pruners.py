"""What ends trials early."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.errors import ConfigError, nearest


def wrong_pruner(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with the section `tune.pruner`."""
    kind = settings["type"]
    if kind in ("none", "median"):
        return []
    near = nearest(kind, ["none", "median"])
    return [("type", f"there is no pruner {kind!r}{near}")]


def pruner_for(settings: Mapping[str, Any]) -> Any:
    """The pruner of a study."""
    import optuna

    given = dict(settings)
    kind = given.pop("type")
    if kind == "none":
        return optuna.pruners.NopPruner()
    if kind == "median":
        return optuna.pruners.MedianPruner(**given)
    raise ConfigError(f"there is no pruner {kind!r}")

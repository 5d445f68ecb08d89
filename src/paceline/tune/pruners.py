"""What ends trials early."""

from __future__ import annotations

from typing import Any

from paceline.errors import ConfigError, nearest


def pruner_for(settings: Any) -> Any:
    """The pruner of a study."""
    import optuna

    given = dict(settings.pruner)
    kind = given.pop("type")
    if kind == "none":
        return optuna.pruners.NopPruner()
    if kind == "median":
        return optuna.pruners.MedianPruner(**given)
    raise ConfigError(f"there is no pruner {kind!r}{nearest(kind, ['none', 'median'])}")

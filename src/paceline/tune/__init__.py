"""RunConfig: one YAML file of dotted paths and keyword dictionaries, trained once per seed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.tune.run_config import CheckpointConfig, EarlyStoppingConfig, RunConfig
    from paceline.tune.running import run

_WHERE = {
    "CheckpointConfig": "paceline.tune.run_config",
    "EarlyStoppingConfig": "paceline.tune.run_config",
    "RunConfig": "paceline.tune.run_config",
    "run": "paceline.tune.running",
}
__all__ = ["CheckpointConfig", "EarlyStoppingConfig", "RunConfig", "run"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name not in _WHERE:
        raise AttributeError(f"module 'paceline.tune' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)

"""RunConfig: one YAML file of dotted paths and keyword dictionaries, trained once per seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.lazy import lazily

if TYPE_CHECKING:
    from paceline.tune.run_config import CheckpointConfig, EarlyStoppingConfig, RunConfig
    from paceline.tune.running import run
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "CheckpointConfig": "paceline.tune.run_config",
            "EarlyStoppingConfig": "paceline.tune.run_config",
            "RunConfig": "paceline.tune.run_config",
            "run": "paceline.tune.running",
        },
    )

__all__ = ["CheckpointConfig", "EarlyStoppingConfig", "RunConfig", "run"]

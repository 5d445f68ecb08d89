"""Studies, which search settings; and RunConfig, one YAML file that is trained once per seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.lazy import lazily

if TYPE_CHECKING:
    from paceline.tune.predicted_final import PredictedFinal
    from paceline.tune.run_config import CheckpointConfig, EarlyStoppingConfig, RunConfig
    from paceline.tune.running import run
    from paceline.tune.settings import TuneSettings
    from paceline.tune.study import Study, TrialsFailed
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "CheckpointConfig": "paceline.tune.run_config",
            "EarlyStoppingConfig": "paceline.tune.run_config",
            "PredictedFinal": "paceline.tune.predicted_final",
            "RunConfig": "paceline.tune.run_config",
            "Study": "paceline.tune.study",
            "TrialsFailed": "paceline.tune.study",
            "TuneSettings": "paceline.tune.settings",
            "run": "paceline.tune.running",
        },
    )

__all__ = [
    "CheckpointConfig",
    "EarlyStoppingConfig",
    "PredictedFinal",
    "RunConfig",
    "Study",
    "TrialsFailed",
    "TuneSettings",
    "run",
]

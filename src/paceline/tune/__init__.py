"""Studies, which search settings; and RunConfig, one YAML file that is trained once per seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.lazy import lazily

if TYPE_CHECKING:
    from paceline.tune.optimize_config import (
        OptimizeConfig,
        load_best_model,
        load_model,
        load_study,
        run,
    )
    from paceline.tune.predicted_final import PredictedFinal
    from paceline.tune.run_config import CheckpointConfig, EarlyStoppingConfig, RunConfig
    from paceline.tune.settings import TuneSettings
    from paceline.tune.study import Study, TrialsFailed
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "CheckpointConfig": "paceline.tune.run_config",
            "EarlyStoppingConfig": "paceline.tune.run_config",
            "OptimizeConfig": "paceline.tune.optimize_config",
            "PredictedFinal": "paceline.tune.predicted_final",
            "RunConfig": "paceline.tune.run_config",
            "Study": "paceline.tune.study",
            "TrialsFailed": "paceline.tune.study",
            "TuneSettings": "paceline.tune.settings",
            "load_best_model": "paceline.tune.optimize_config",
            "load_model": "paceline.tune.optimize_config",
            "load_study": "paceline.tune.optimize_config",
            "run": "paceline.tune.optimize_config",
        },
    )

__all__ = [
    "CheckpointConfig",
    "EarlyStoppingConfig",
    "OptimizeConfig",
    "PredictedFinal",
    "RunConfig",
    "Study",
    "TrialsFailed",
    "TuneSettings",
    "load_best_model",
    "load_model",
    "load_study",
    "run",
]

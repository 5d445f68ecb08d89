"""Callbacks: one behaviour per file, each of which plugs into any Trainer.

Each is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.lazy import lazily

if TYPE_CHECKING:
    from paceline.callbacks.averaged_weights import AveragedWeights
    from paceline.callbacks.early_stopping import EarlyStopping
    from paceline.callbacks.exit_step import ExitStep
    from paceline.callbacks.freeze import Freeze
    from paceline.callbacks.gradient_explosion import GradientExplosion
    from paceline.callbacks.gradient_monitor import GradientMonitor
    from paceline.callbacks.learning_rate import LearningRate
    from paceline.callbacks.loss_prediction import LossPrediction
    from paceline.callbacks.memory_snapshot import MemorySnapshot
    from paceline.callbacks.overfit_detection import OverfitDetection
    from paceline.callbacks.profiler import Profiler
    from paceline.callbacks.progress import Progress
    from paceline.callbacks.schedule_free import ScheduleFree
    from paceline.callbacks.swa import SWA
    from paceline.callbacks.throughput import Throughput
    from paceline.callbacks.time_limit import TimeLimit
    from paceline.callbacks.update_ratio import UpdateRatio
    from paceline.trainer.callback import Callback
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "AveragedWeights": "paceline.callbacks.averaged_weights",
            "Callback": "paceline.trainer.callback",
            "EarlyStopping": "paceline.callbacks.early_stopping",
            "ExitStep": "paceline.callbacks.exit_step",
            "Freeze": "paceline.callbacks.freeze",
            "GradientExplosion": "paceline.callbacks.gradient_explosion",
            "GradientMonitor": "paceline.callbacks.gradient_monitor",
            "LearningRate": "paceline.callbacks.learning_rate",
            "LossPrediction": "paceline.callbacks.loss_prediction",
            "MemorySnapshot": "paceline.callbacks.memory_snapshot",
            "OverfitDetection": "paceline.callbacks.overfit_detection",
            "Profiler": "paceline.callbacks.profiler",
            "Progress": "paceline.callbacks.progress",
            "SWA": "paceline.callbacks.swa",
            "ScheduleFree": "paceline.callbacks.schedule_free",
            "Throughput": "paceline.callbacks.throughput",
            "TimeLimit": "paceline.callbacks.time_limit",
            "UpdateRatio": "paceline.callbacks.update_ratio",
        },
    )

__all__ = [
    "SWA",
    "AveragedWeights",
    "Callback",
    "EarlyStopping",
    "ExitStep",
    "Freeze",
    "GradientExplosion",
    "GradientMonitor",
    "LearningRate",
    "LossPrediction",
    "MemorySnapshot",
    "OverfitDetection",
    "Profiler",
    "Progress",
    "ScheduleFree",
    "Throughput",
    "TimeLimit",
    "UpdateRatio",
]

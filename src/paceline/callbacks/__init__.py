"""Callbacks: one behaviour a file, each plugging into any Trainer.

Imported when first used, so that none costs anything to who does not use it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.callbacks.averaged_weights import AveragedWeights
    from paceline.callbacks.early_stopping import EarlyStopping
    from paceline.callbacks.gradient_monitor import GradientMonitor
    from paceline.callbacks.learning_rate import LearningRate
    from paceline.callbacks.progress import Progress
    from paceline.callbacks.schedule_free import ScheduleFree
    from paceline.callbacks.swa import SWA
    from paceline.callbacks.throughput import Throughput
    from paceline.callbacks.time_limit import TimeLimit
    from paceline.trainer.events import Callback

_MODULES = {
    "AveragedWeights": "paceline.callbacks.averaged_weights",
    "Callback": "paceline.trainer.events",
    "EarlyStopping": "paceline.callbacks.early_stopping",
    "GradientMonitor": "paceline.callbacks.gradient_monitor",
    "LearningRate": "paceline.callbacks.learning_rate",
    "Progress": "paceline.callbacks.progress",
    "SWA": "paceline.callbacks.swa",
    "ScheduleFree": "paceline.callbacks.schedule_free",
    "Throughput": "paceline.callbacks.throughput",
    "TimeLimit": "paceline.callbacks.time_limit",
}

__all__ = [
    "SWA",
    "AveragedWeights",
    "Callback",
    "EarlyStopping",
    "GradientMonitor",
    "LearningRate",
    "Progress",
    "ScheduleFree",
    "Throughput",
    "TimeLimit",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__

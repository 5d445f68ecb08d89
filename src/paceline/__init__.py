"""Paceline: a PyTorch trainer that keeps its promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.lazy import lazily

if TYPE_CHECKING:
    from paceline.checkpoint import CheckpointPolicy
    from paceline.data.source import Draw, Source, StopCollecting, WindowSize
    from paceline.trainer.abstract import AbstractTrainer, AbstractTrainerConfig
    from paceline.trainer.callback import Callback
    from paceline.trainer.identity import HasRunIdentity
    from paceline.trainer.monitor import MetricMonitor
    from paceline.trainer.result import Result
    from paceline.trainer.settings import Resume, ValidationPolicy
    from paceline.trainer.trainer import Trainer
    from paceline.trainer.window import Window
    from paceline.world.device_parameters import DeviceParameters
    from paceline.world.layout import Parallel
    from paceline.world.world import World
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "AbstractTrainer": "paceline.trainer.abstract",
            "AbstractTrainerConfig": "paceline.trainer.abstract",
            "Callback": "paceline.trainer.callback",
            "CheckpointPolicy": "paceline.checkpoint",
            "DeviceParameters": "paceline.world.device_parameters",
            "HasRunIdentity": "paceline.trainer.identity",
            "Draw": "paceline.data.source",
            "MetricMonitor": "paceline.trainer.monitor",
            "Parallel": "paceline.world.layout",
            "Result": "paceline.trainer.result",
            "Resume": "paceline.trainer.settings",
            "Source": "paceline.data.source",
            "StopCollecting": "paceline.data.source",
            "Trainer": "paceline.trainer.trainer",
            "ValidationPolicy": "paceline.trainer.settings",
            "Window": "paceline.trainer.window",
            "WindowSize": "paceline.data.source",
            "World": "paceline.world.world",
        },
    )

__version__ = "0.1.0"

__all__ = [
    "AbstractTrainer",
    "AbstractTrainerConfig",
    "Callback",
    "CheckpointPolicy",
    "DeviceParameters",
    "Draw",
    "HasRunIdentity",
    "MetricMonitor",
    "Parallel",
    "Result",
    "Resume",
    "Source",
    "StopCollecting",
    "Trainer",
    "ValidationPolicy",
    "Window",
    "WindowSize",
    "World",
]

"""Trainers whose components are made by factories, each from a typed section of a recipe."""

from __future__ import annotations

from paceline.factories.bases import (
    DataConfig,
    DataFactory,
    DataSource,
    DataSourceConfig,
    Factory,
    ModelFactory,
    OptimizerFactory,
    SchedulerFactory,
    TokenizerFactory,
)
from paceline.factories.checkpoint import CheckpointEngine, CheckpointEngineConfig
from paceline.factories.factory_trainer import FactoryTrainer, TrainerConfig, get_config
from paceline.recipe.typed import Config, HumanFloat, HumanInt, OfKind
from paceline.registry import register

__all__ = [
    "CheckpointEngine",
    "CheckpointEngineConfig",
    "Config",
    "DataConfig",
    "DataFactory",
    "DataSource",
    "DataSourceConfig",
    "Factory",
    "FactoryTrainer",
    "HumanFloat",
    "HumanInt",
    "ModelFactory",
    "OfKind",
    "OptimizerFactory",
    "SchedulerFactory",
    "TokenizerFactory",
    "TrainerConfig",
    "get_config",
    "register",
]

"""Learning-rate schedules from a typed section; the length of the run is known by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic

from paceline.errors import ConfigError
from paceline.factories.bases import SchedulerFactory
from paceline.recipe.schedules import (
    Warmup,
    WarmupConstant,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
)
from paceline.recipe.typed import Config, HumanFloat


class WarmupConfig(Config):
    """The settings of a schedule that begins with a warm-up.

    Attributes:
        warmup: a share of the run below 1, rounded down; or a number of the schedule's steps
            (optimizer steps, or epochs with `lr_scheduler_interval: epoch`).
        min_ratio: the last learning rate, as a share of the optimizer's.
    """

    warmup: HumanFloat = pydantic.Field(0.1, ge=0)
    min_ratio: HumanFloat = pydantic.Field(0.0, ge=0, le=1)


class StableDecayConfig(WarmupConfig):
    """The settings of warmup-stable-decay.

    Attributes:
        decay: the decay at the end, a share of the run below 1 or a number of steps.
    """

    decay: HumanFloat = pydantic.Field(0.1, ge=0)


class _Warmup(SchedulerFactory):
    """A schedule for each optimizer."""

    config_type = WarmupConfig
    schedule: type[Warmup]

    def create_scheduler(self, optimizer: Any) -> Any:
        horizon = self.trainer.schedule_length
        if horizon is None:
            raise ConfigError(
                "lr_scheduler: the length of the run is not known in advance: set "
                "trainer.max_steps, or trainer.epochs with lr_scheduler_interval=epoch."
            )
        given = self.config.model_dump(exclude={"type"})
        lengths = {
            name: _steps(given[name], horizon) for name in ("warmup", "decay") if name in given
        }
        if isinstance(optimizer, Mapping):
            return {
                name: self.schedule(one, horizon, **{**given, **lengths})
                for name, one in optimizer.items()
            }
        return self.schedule(optimizer, horizon, **{**given, **lengths})


def _steps(value: float, horizon: int) -> int:
    return int(value * horizon) if value < 1 else int(value)


class LinearFactory(_Warmup):
    """Warm-up, then a straight line down."""

    name = "linear"
    schedule = WarmupLinear


class CosineFactory(_Warmup):
    """Warm-up, then half a cosine."""

    name = "cosine"
    schedule = WarmupCosine


class ConstantFactory(_Warmup):
    """Warm-up, then the optimizer's own learning rate."""

    name = "constant"
    schedule = WarmupConstant


class StableDecayFactory(_Warmup):
    """Warm-up, the optimizer's own learning rate, and a decay at the end."""

    name = "wsd"
    config_type = StableDecayConfig
    schedule = WarmupStableDecay

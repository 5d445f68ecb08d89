"""Reinforcement learning: a Trainer whose data are rollouts of what it trains."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.rl.algorithm import Algorithm
    from paceline.rl.algorithms.ppo import PPO
    from paceline.rl.control.actor_critic import ActorCritic, Policy
    from paceline.rl.control.environment import Environment, GymEnvironment
    from paceline.rl.evaluation import Evaluation
    from paceline.rl.trainer import RLTrainer

__all__ = [
    "PPO",
    "ActorCritic",
    "Algorithm",
    "Environment",
    "Evaluation",
    "GymEnvironment",
    "Policy",
    "RLTrainer",
]

# Where the public names are, so that importing one imports no other part.
_HOMES = {
    "PPO": "algorithms.ppo",
    "ActorCritic": "control.actor_critic",
    "Algorithm": "algorithm",
    "Environment": "control.environment",
    "Evaluation": "evaluation",
    "GymEnvironment": "control.environment",
    "Policy": "control.actor_critic",
    "RLTrainer": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

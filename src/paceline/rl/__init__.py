"""Reinforcement learning: a Trainer whose data are rollouts of what it trains."""

from typing import TYPE_CHECKING

from paceline.lazy import lazily

if TYPE_CHECKING:
    from paceline.rl.algorithm import Algorithm
    from paceline.rl.algorithms.ppo import PPO
    from paceline.rl.control.actor_critic import ActorCritic, Policy
    from paceline.rl.control.environment import Environment, GymEnvironment
    from paceline.rl.engine import Completion, Engine, Request, Sampling
    from paceline.rl.evaluation import Evaluation
    from paceline.rl.graph import Graph, Node
    from paceline.rl.recorded import RecordRollouts, read_rollouts
    from paceline.rl.sampler import Sampler
    from paceline.rl.scorer import Scorer
    from paceline.rl.system import System, ValueFunctionSystem
    from paceline.rl.trainer import RLTrainer
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "PPO": "paceline.rl.algorithms.ppo",
            "ActorCritic": "paceline.rl.control.actor_critic",
            "Algorithm": "paceline.rl.algorithm",
            "Completion": "paceline.rl.engine",
            "Engine": "paceline.rl.engine",
            "Environment": "paceline.rl.control.environment",
            "Evaluation": "paceline.rl.evaluation",
            "Graph": "paceline.rl.graph",
            "GymEnvironment": "paceline.rl.control.environment",
            "Node": "paceline.rl.graph",
            "Policy": "paceline.rl.control.actor_critic",
            "RLTrainer": "paceline.rl.trainer",
            "RecordRollouts": "paceline.rl.recorded",
            "Request": "paceline.rl.engine",
            "Sampler": "paceline.rl.sampler",
            "Sampling": "paceline.rl.engine",
            "Scorer": "paceline.rl.scorer",
            "System": "paceline.rl.system",
            "ValueFunctionSystem": "paceline.rl.system",
            "read_rollouts": "paceline.rl.recorded",
        },
    )

__all__ = [
    "PPO",
    "ActorCritic",
    "Algorithm",
    "Completion",
    "Engine",
    "Environment",
    "Evaluation",
    "Graph",
    "GymEnvironment",
    "Node",
    "Policy",
    "RLTrainer",
    "RecordRollouts",
    "Request",
    "Sampler",
    "Sampling",
    "Scorer",
    "System",
    "ValueFunctionSystem",
    "read_rollouts",
]

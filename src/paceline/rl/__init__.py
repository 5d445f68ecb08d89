"""Reinforcement learning: a Trainer whose data are rollouts of what it trains."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.rl.algorithm import Algorithm
    from paceline.rl.algorithms.dpo import DPO, IPO, DPOBatch, DPOStep
    from paceline.rl.algorithms.grpo import GRPO
    from paceline.rl.algorithms.ppo import PPO
    from paceline.rl.algorithms.reinforce import REINFORCE, RLOO
    from paceline.rl.control.actor_critic import ActorCritic, Policy
    from paceline.rl.control.environment import Environment, GymEnvironment
    from paceline.rl.engine import Completion, Engine, Request, Sampling
    from paceline.rl.evaluation import Evaluation
    from paceline.rl.graph import Graph, Node
    from paceline.rl.harness import Harness
    from paceline.rl.old_names import with_present_names
    from paceline.rl.redteam.ast_sampler import ASTSampler
    from paceline.rl.redteam.ast_system import ASTSystem
    from paceline.rl.redteam.evaluators import ASTEvaluator, Evaluator, GraphMetrics
    from paceline.rl.redteam.hf_ast_system import HFASTSystem, HFEvaluationSystem
    from paceline.rl.redteam.scorers import (
        ClassifierScorer,
        DetoxifyScorer,
        LlamaGuardScorer,
        ProfanityScorer,
        RuleScorer,
    )
    from paceline.rl.rollout_trainer import (
        HFRolloutConfiguration,
        HFRolloutTrainer,
        RolloutTrainer,
        TrainingConfiguration,
    )
    from paceline.rl.sampler import Sampler
    from paceline.rl.scorer import Scorer
    from paceline.rl.system import System, ValueFunctionSystem
    from paceline.rl.text.local import LocalEngine
    from paceline.rl.text.policy_system import PolicySystem
    from paceline.rl.text.prompt_sampler import PromptSampler
    from paceline.rl.trainer import RLTrainer

__all__ = [
    "DPO",
    "GRPO",
    "IPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "ASTEvaluator",
    "ASTSampler",
    "ASTSystem",
    "ActorCritic",
    "Algorithm",
    "ClassifierScorer",
    "Completion",
    "DPOBatch",
    "DPOStep",
    "DetoxifyScorer",
    "Engine",
    "Environment",
    "Evaluation",
    "Evaluator",
    "Graph",
    "GraphMetrics",
    "GymEnvironment",
    "HFASTSystem",
    "HFEvaluationSystem",
    "HFRolloutConfiguration",
    "HFRolloutTrainer",
    "Harness",
    "LlamaGuardScorer",
    "LocalEngine",
    "Node",
    "Policy",
    "PolicySystem",
    "ProfanityScorer",
    "PromptSampler",
    "RLTrainer",
    "Request",
    "RolloutTrainer",
    "RuleScorer",
    "Sampler",
    "Sampling",
    "Scorer",
    "System",
    "TrainingConfiguration",
    "ValueFunctionSystem",
    "with_present_names",
]

# Where the public names are, so that importing one imports no other part.
_HOMES = {
    "Completion": "engine",
    "Engine": "engine",
    "Request": "engine",
    "Sampling": "engine",
    "LocalEngine": "text.local",
    "DPO": "algorithms.dpo",
    "GRPO": "algorithms.grpo",
    "IPO": "algorithms.dpo",
    "PPO": "algorithms.ppo",
    "REINFORCE": "algorithms.reinforce",
    "RLOO": "algorithms.reinforce",
    "ASTEvaluator": "redteam.evaluators",
    "ASTSampler": "redteam.ast_sampler",
    "ASTSystem": "redteam.ast_system",
    "ActorCritic": "control.actor_critic",
    "Algorithm": "algorithm",
    "ClassifierScorer": "redteam.scorers",
    "DPOBatch": "algorithms.dpo",
    "DPOStep": "algorithms.dpo",
    "DetoxifyScorer": "redteam.scorers",
    "Environment": "control.environment",
    "Evaluation": "evaluation",
    "Evaluator": "redteam.evaluators",
    "Graph": "graph",
    "GraphMetrics": "redteam.evaluators",
    "GymEnvironment": "control.environment",
    "HFASTSystem": "redteam.hf_ast_system",
    "HFEvaluationSystem": "redteam.hf_ast_system",
    "HFRolloutConfiguration": "rollout_trainer",
    "HFRolloutTrainer": "rollout_trainer",
    "Harness": "harness",
    "LlamaGuardScorer": "redteam.scorers",
    "Node": "graph",
    "Policy": "control.actor_critic",
    "PolicySystem": "text.policy_system",
    "ProfanityScorer": "redteam.scorers",
    "PromptSampler": "text.prompt_sampler",
    "RLTrainer": "trainer",
    "RolloutTrainer": "rollout_trainer",
    "RuleScorer": "redteam.scorers",
    "Sampler": "sampler",
    "Scorer": "scorer",
    "System": "system",
    "TrainingConfiguration": "rollout_trainer",
    "ValueFunctionSystem": "system",
    "with_present_names": "old_names",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

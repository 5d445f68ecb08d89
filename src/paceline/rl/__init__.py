"""Reinforcement learning: a Trainer whose data are rollouts of what it trains."""

from typing import TYPE_CHECKING

from paceline.lazy import lazily

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
    from paceline.rl.recorded import RecordRollouts, read_rollouts
    from paceline.rl.redteam.ast_sampler import ASTSampler
    from paceline.rl.redteam.ast_system import ASTSystem
    from paceline.rl.redteam.evaluators import ASTEvaluator, Evaluator, GraphMetrics
    from paceline.rl.redteam.hf_ast_system import HFASTSystem, HFEvaluationSystem
    from paceline.rl.redteam.hf_ast_value_system import HFASTValueSystem
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
    from paceline.rl.text.value_system import PolicyValueSystem
    from paceline.rl.trainer import RLTrainer
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "ASTEvaluator": "paceline.rl.redteam.evaluators",
            "ASTSampler": "paceline.rl.redteam.ast_sampler",
            "ASTSystem": "paceline.rl.redteam.ast_system",
            "ActorCritic": "paceline.rl.control.actor_critic",
            "Algorithm": "paceline.rl.algorithm",
            "ClassifierScorer": "paceline.rl.redteam.scorers",
            "Completion": "paceline.rl.engine",
            "DPO": "paceline.rl.algorithms.dpo",
            "DPOBatch": "paceline.rl.algorithms.dpo",
            "DPOStep": "paceline.rl.algorithms.dpo",
            "DetoxifyScorer": "paceline.rl.redteam.scorers",
            "Engine": "paceline.rl.engine",
            "Environment": "paceline.rl.control.environment",
            "Evaluation": "paceline.rl.evaluation",
            "Evaluator": "paceline.rl.redteam.evaluators",
            "GRPO": "paceline.rl.algorithms.grpo",
            "Graph": "paceline.rl.graph",
            "GraphMetrics": "paceline.rl.redteam.evaluators",
            "GymEnvironment": "paceline.rl.control.environment",
            "HFASTSystem": "paceline.rl.redteam.hf_ast_system",
            "HFASTValueSystem": "paceline.rl.redteam.hf_ast_value_system",
            "HFEvaluationSystem": "paceline.rl.redteam.hf_ast_system",
            "HFRolloutConfiguration": "paceline.rl.rollout_trainer",
            "HFRolloutTrainer": "paceline.rl.rollout_trainer",
            "Harness": "paceline.rl.harness",
            "IPO": "paceline.rl.algorithms.dpo",
            "LlamaGuardScorer": "paceline.rl.redteam.scorers",
            "LocalEngine": "paceline.rl.text.local",
            "Node": "paceline.rl.graph",
            "PPO": "paceline.rl.algorithms.ppo",
            "Policy": "paceline.rl.control.actor_critic",
            "PolicySystem": "paceline.rl.text.policy_system",
            "PolicyValueSystem": "paceline.rl.text.value_system",
            "ProfanityScorer": "paceline.rl.redteam.scorers",
            "PromptSampler": "paceline.rl.text.prompt_sampler",
            "REINFORCE": "paceline.rl.algorithms.reinforce",
            "RLOO": "paceline.rl.algorithms.reinforce",
            "RLTrainer": "paceline.rl.trainer",
            "RecordRollouts": "paceline.rl.recorded",
            "Request": "paceline.rl.engine",
            "RolloutTrainer": "paceline.rl.rollout_trainer",
            "RuleScorer": "paceline.rl.redteam.scorers",
            "Sampler": "paceline.rl.sampler",
            "Sampling": "paceline.rl.engine",
            "Scorer": "paceline.rl.scorer",
            "System": "paceline.rl.system",
            "TrainingConfiguration": "paceline.rl.rollout_trainer",
            "ValueFunctionSystem": "paceline.rl.system",
            "read_rollouts": "paceline.rl.recorded",
            "with_present_names": "paceline.rl.old_names",
        },
    )

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
    "HFASTValueSystem",
    "HFEvaluationSystem",
    "HFRolloutConfiguration",
    "HFRolloutTrainer",
    "Harness",
    "LlamaGuardScorer",
    "LocalEngine",
    "Node",
    "Policy",
    "PolicySystem",
    "PolicyValueSystem",
    "ProfanityScorer",
    "PromptSampler",
    "RLTrainer",
    "RecordRollouts",
    "Request",
    "RolloutTrainer",
    "RuleScorer",
    "Sampler",
    "Sampling",
    "Scorer",
    "System",
    "TrainingConfiguration",
    "ValueFunctionSystem",
    "read_rollouts",
    "with_present_names",
]
